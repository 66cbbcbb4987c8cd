"""`python -m experiments.crate`: `--variant` chooses what is trained."""

from experiments.crate.classify import check_classify, run_classify
from experiments.crate.config import (
    PRESETS,
    SLUG,
    VARIANTS,
    AnyConfig,
    DinoConfig,
    MaeConfig,
    TextConfig,
)
from experiments.crate.dino import check_dino, run_dino
from experiments.crate.mae import check_mae, run_mae
from experiments.crate.text import check_text, run_text
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.run import Run


def run(config: AnyConfig, run: Run) -> Result:
    """Classifiers, a masked autoencoder, self-distillation, or text models."""
    if isinstance(config, MaeConfig):
        return run_mae(config, run)
    if isinstance(config, DinoConfig):
        return run_dino(config, run)
    if isinstance(config, TextConfig):
        return run_text(config, run)
    return run_classify(config, run)


def check(config: AnyConfig) -> list[str]:
    """What the preset of a paper would train, as far as it can be built without its data."""
    if isinstance(config, MaeConfig):
        return check_mae(config)
    if isinstance(config, DinoConfig):
        return check_dino(config)
    if isinstance(config, TextConfig):
        return check_text(config)
    return check_classify(config)


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="White-Box Transformers via Sparse Rate Reduction",
    presets=PRESETS,
    run=run,
    check=check,
    variants=VARIANTS,
)

if __name__ == "__main__":
    main(EXPERIMENT)
