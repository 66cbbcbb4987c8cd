"""`python -m experiments.crate`: what is trained follows from the preset."""

from experiments.crate.classify import check_classify, run_classify
from experiments.crate.config import PRESETS, SLUG, AnyConfig, DinoConfig, MaeConfig, TextConfig
from experiments.crate.dino import run_dino
from experiments.crate.mae import run_mae
from experiments.crate.text import run_text
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


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="White-Box Transformers via Sparse Rate Reduction",
    presets=PRESETS,
    run=run,
    check=check_classify,
)

if __name__ == "__main__":
    main(EXPERIMENT)
