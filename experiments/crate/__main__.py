"""`python -m experiments.crate`: `--variant` chooses what is trained."""

from collections.abc import Callable
from typing import Any

from experiments.crate.classify import check_classify, run_classify
from experiments.crate.config import (
    PRESETS,
    SLUG,
    VARIANTS,
    ClassifyConfig,
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

TRAININGS: dict[type, tuple[Callable[[Any, Run], Result], Callable[[Any], list[str]]]] = {
    ClassifyConfig: (run_classify, check_classify),
    MaeConfig: (run_mae, check_mae),
    DinoConfig: (run_dino, check_dino),
    TextConfig: (run_text, check_text),
}


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="White-Box Transformers via Sparse Rate Reduction",
    presets=PRESETS,
    run=lambda config, run: TRAININGS[type(config)][0](config, run),
    check=lambda config: TRAININGS[type(config)][1](config),
    variants=VARIANTS,
)

if __name__ == "__main__":
    main(EXPERIMENT)
