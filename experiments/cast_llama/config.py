"""Settings of the CAST experiment, and its presets."""

import dataclasses

import sparsejax as sj
from experiments.harness.config import ExperimentError
from experiments.harness.language import LanguageConfig
from experiments.harness.multiple_choice import LAYOUTS

SLUG = "cast_llama"
PROJECTIONS = r"_proj/kernel$"
ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
# trained with their masks held, and what these masks are from
HELD = {"naive": "magnitude", "sparsegpt_retrained": "sparsegpt", "wanda_retrained": "wanda"}
TRAINED = ("dense", *HELD, "srste", "ast", "maskllm", "cast")
LABELS = {
    "magnitude": "magnitude, one-shot",
    "wanda": "Wanda, one-shot",
    "sparsegpt": "SparseGPT, one-shot",
    "dense": "dense, trained on",
    "naive": "fixed mask + teacher",
    "wanda_retrained": "Wanda, then trained + teacher",
    "sparsegpt_retrained": "SparseGPT, then trained + teacher",
    "srste": "SR-STE",
    "ast": "AST",
    "maskllm": "MaskLLM",
    "cast": "CAST",
}


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of `python -m experiments.cast_llama`."""

    methods: tuple[str, ...] = (*ONE_SHOT, *TRAINED)
    """Which methods to run; wanda_retrained and sparsegpt_retrained train on what those gave, with
    the mask held."""
    pattern: str = "2:4"
    """Kept and group size along the inputs of every projection."""
    steps: int = 600
    """Steps of sparse training; part of CAST's algorithm, not a place to stop early."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 6e-3)
    """Peak learning rates; every method is shown at its best, and compared at the first, too."""
    l1_decay: float = 5e-3
    """CAST's lambda."""
    eta: float = 1 / 3
    """Share of the distillation term, for CAST and for masks that are held."""
    scale_groups: int = 2
    """CAST's scales for each output."""
    mask_period: int = 10
    """Steps between two refreshes of CAST's and AST's masks."""
    srste_decay: float = 2e-4
    """SR-STE's pull on pruned weights."""
    ast_decay: float = 1e-4
    """AST's pull on pruned weights at its height."""
    maskllm_kappa: tuple[float, float] = (100.0, 500.0)
    """What MaskLLM's logits are multiplied by, at the first step and at the last."""
    maskllm_tau: tuple[float, float] = (4.0, 0.05)
    """Temperature of MaskLLM's masks, likewise."""
    calibration: int = 128
    """Training windows that Wanda and SparseGPT see."""
    bits: tuple[int, ...] = (8, 4)
    """The sparse model is also measured with its weights rounded to so many bits: 8, 4 or none."""
    quantize_group: int = 32
    """Inputs of an output that share a scale then."""
    questions: tuple[str, ...] = ()
    """Multiple-choice questions that the models answer without training, as LAYOUT=FILE.jsonl; the
    layouts are hellaswag, arc, piqa, winogrande, openbookqa and race."""
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
        if not set(self.bits) <= {4, 8} or self.quantize_group < 1:
            raise ExperimentError(
                f"bits are {self.bits} and quantize_group is {self.quantize_group}; bits are 8 or "
                "4, groups positive"
            )
        unknown = [q for q in self.questions if q.partition("=")[0] not in LAYOUTS]
        if unknown:
            raise ExperimentError(
                f"questions are {unknown}; give LAYOUT=FILE with one of {', '.join(LAYOUTS)}"
            )
        if "maskllm" in self.methods and self.pattern != "2:4":
            raise ExperimentError(
                f"pattern is {self.pattern}; MaskLLM knows 2:4 alone: leave maskllm out of methods"
            )
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


PRETRAINED = Config(
    preset="pretrained",
    model="smollm2",
    seeds=1,
    batch=1,
    seq_len=511,
    steps=1200,
    learning_rates=(2.5e-4,),
    schedule="wsd",
    l1_decay=1e-3,
    methods=(*ONE_SHOT, "cast"),
    calibration=32,
    eval_windows=24,
    log_every=50,
    checkpoint_every=150,
)
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
    "pretrained": PRETRAINED,
    # the same for masks that are held, as long again for each
    "retrained": dataclasses.replace(PRETRAINED, preset="retrained", methods=tuple(HELD)),
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
