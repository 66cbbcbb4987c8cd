"""Settings of the CAST experiment, and its presets."""

import dataclasses

import sparsejax as sj
from experiments.harness.config import ExperimentError
from experiments.harness.language import LanguageConfig

SLUG = "cast_llama"
PROJECTIONS = r"_proj/kernel$"
ONE_SHOT = ("magnitude", "wanda")
TRAINED = ("dense", "naive", "srste", "ast", "cast")
LABELS = {
    "magnitude": "magnitude, one-shot",
    "wanda": "Wanda, one-shot",
    "dense": "dense, trained on",
    "naive": "fixed mask + teacher",
    "srste": "SR-STE",
    "ast": "AST",
    "cast": "CAST",
}


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of `python -m experiments.cast_llama`."""

    methods: tuple[str, ...] = (*ONE_SHOT, *TRAINED)
    """Which methods to run."""
    pattern: str = "2:4"
    """Kept and group size along the inputs of every projection."""
    steps: int = 600
    """Steps of sparse training; part of CAST's algorithm, not a place to stop early."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates; every method is shown at its best."""
    l1_decay: float = 5e-3
    """CAST's lambda."""
    eta: float = 1 / 3
    """Share of the distillation term, for CAST and the fixed mask."""
    scale_groups: int = 2
    """CAST's scales for each output."""
    mask_period: int = 10
    """Steps between two refreshes of CAST's and AST's masks."""
    srste_decay: float = 2e-4
    """SR-STE's pull on pruned weights."""
    ast_decay: float = 1e-4
    """AST's pull on pruned weights at its height."""
    calibration: int = 128
    """Training windows that Wanda sees."""
    force: bool = False
    """Run CAST even where its learning rate cannot bring the masked weights to zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            sj.NM.parse(self.pattern)
        except ValueError as error:
            raise ExperimentError(str(error)) from error
        unknown = [name for name in self.methods if name not in LABELS]
        if unknown or not self.methods:
            raise ExperimentError(f"methods are {self.methods}; known are {', '.join(LABELS)}")
        if self.steps < 1 or self.calibration < 1:
            raise ExperimentError(
                f"steps is {self.steps} and calibration {self.calibration}; both must be positive"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ExperimentError(f"learning_rates are {self.learning_rates}; give positive ones")

    @property
    def nm(self) -> sj.NM:
        """The pattern, with CAST's rule for ties."""
        return sj.NM.parse(self.pattern, ties="lowest")


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test",
        seeds=2,
        dense_steps=30,
        steps=20,
        batch=4,
        seq_len=32,
        learning_rates=(3e-3,),
        l1_decay=5e-2,
        calibration=16,
        checkpoint_every=10,
        log_every=5,
        force=True,
    ),
    "paper": Config(
        preset="paper",
        model="llama-2-7b",
        dataset="c4/en",
        seeds=1,
        batch=256,
        seq_len=4096,
        steps=7500,
        learning_rates=(2e-5,),
        l1_decay=4e-7,
        methods=("cast",),
        mesh="data=8,model=8",
    ),
}
