"""Settings of the ten lessons, and the granularities that are compared."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

import sparsejax as sj
from experiments.harness.characters import CharacterConfig, Optimizer
from experiments.harness.config import ExperimentError

SLUG = "ten_lessons"
LESSONS = ("L3", "L5", "L9")
GROUP = 8  # of inputs8
UNSTRUCTURED = "unstructured"
GRANULARITIES = {
    UNSTRUCTURED: "unstructured",
    "units": "hidden units",
    "outputs4": "4 outputs",
    "outputs16": "16 outputs",
    "blocks8": "8 x 8 blocks",
    "inputs8": "n:8 of inputs",
}


@dataclasses.dataclass(frozen=True)
class Config(CharacterConfig):
    """Settings of `python -m experiments.ten_lessons`."""

    lesson: str = "L3"
    """L3: granularities; L5 or L9: operations, bytes and times of training."""
    sparsity: float = 0.875
    """Final sparsity, the same in every arm; a multiple of 1/8, so that n:8 has it too."""
    arms: tuple[str, ...] = tuple(GRANULARITIES)
    """Granularities that L3 compares."""
    steps: int = 2000
    """Training steps of every network."""
    begin: int = 200
    """Step at which pruning begins."""
    end: int = 1400
    """Step of the last mask update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lesson not in LESSONS:
            known = ", ".join(LESSONS)
            raise ExperimentError(
                f"lesson is {self.lesson!r}; known are {known} (L2 is experiments.gradual_pruning)"
            )
        unknown = [name for name in self.arms if name not in GRANULARITIES]
        if unknown or len(set(self.arms)) < max(2, len(self.arms)) or self.arms[0] != UNSTRUCTURED:
            raise ExperimentError(
                f"arms are {self.arms}; give {UNSTRUCTURED} first and one or more of "
                f"{', '.join(n for n in GRANULARITIES if n != UNSTRUCTURED)}"
            )
        if not 0 < self.sparsity < 1 or (self.sparsity * GROUP) % 1:
            raise ExperimentError(
                f"sparsity is {self.sparsity}; it must be a multiple of 1/{GROUP} between 0 and 1"
            )
        if self.hidden % 16:
            raise ExperimentError(
                f"hidden is {self.hidden}; it must be a multiple of 16, the widest block"
            )

    @property
    def schedule(self) -> sj.Schedule:
        """Sparsity as a function of the step."""
        return sj.cubic(begin=self.begin, end=self.end, freq=self.freq, power=self.power)


PRESETS = {
    "laptop": Config(checkpoint_every=1000),
    "test": Config(
        preset="test",
        seeds=2,
        arms=("unstructured", "units", "inputs8"),
        hidden=32,
        steps=40,
        batch=32,
        begin=5,
        end=30,
        freq=5,
        learning_rates=(2e-3,),
        checkpoint_every=40,
        log_every=5,
    ),
    "paper": Config(preset="paper", steps=125_000, begin=5_000, end=100_000, freq=100),
}


@dataclasses.dataclass(frozen=True)
class GradualNM:
    """n of every group of inputs stay, where n follows the density."""

    group: int

    def mask(self, scores: Float[Array, "*s"], density: Any = None) -> Bool[Array, "*s"]:
        """Keeps `max(1, round(group * density))` in every group along axis -2."""
        groups = scores.reshape(-1, self.group, scores.shape[-1])
        kept = sj.exact_topk_mask(groups, sj.keep_count(self.group, density), axis=1)
        return kept.reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Units:
    """Whole hidden units stay, in a leaf whose entries all have the score of their unit."""

    count: int

    def mask(self, scores: Float[Array, "*s"], density: Any = None) -> Bool[Array, "*s"]:
        """Keeps all entries of `max(1, round(count * density))` units."""
        kept = sj.keep_count(self.count, density) * (scores.size // self.count)
        return sj.exact_topk_mask(scores, kept, axis=None)


def unit_scores(params: Any) -> Any:
    """Gives every weight the magnitude of all that enters and leaves its hidden unit."""
    scores = sj.magnitude(params)
    into, out = scores["hidden"]["kernel"], scores["output"]["kernel"]
    units = into.sum(0) + out.sum(1)
    return scores | {
        "hidden": scores["hidden"] | {"kernel": jnp.broadcast_to(units, into.shape)},
        "output": scores["output"] | {"kernel": jnp.broadcast_to(units[:, None], out.shape)},
    }


def pattern(config: Config, name: str) -> sj.Pattern:
    """A granularity by name; kernels are `[in, out]`."""
    known: dict[str, sj.Pattern] = {
        "unstructured": sj.Unstructured(),
        "units": Units(config.hidden),
        "outputs4": sj.Block((1, 4)),
        "outputs16": sj.Block((1, 16)),
        "blocks8": sj.Block((8, 8)),
        "inputs8": GradualNM(GROUP),
    }
    return known[name]


def pruning(config: Config, name: str) -> Optimizer:
    """Adam that prunes along the cubic schedule in a granularity."""
    return lambda rate: sj.gradual_pruning(
        optax.adam(rate),
        pattern=pattern(config, name),
        allocation=1 - config.sparsity,
        schedule=config.schedule,
        scores=unit_scores if name == "units" else sj.magnitude,
    )
