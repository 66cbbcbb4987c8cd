"""Progressive gradient flow: N:M training in which pruned entries withdraw little by little.

Either the mask decays (MdGf: pruned entries are multiplied by a factor that falls from 1 to 0) or
its structure does (SdGf: the N:M pattern tightens in stages). A recipe is one view of the
parameters; dense, sparsifying and fine-tuning phases follow from the step.

Source: Bambhaniya et al., Progressive gradient flow for robust N:M sparsity training in
transformers (2024).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.gradients import MaskGradient, mask_decay, sr_ste, ste
from sparsejax.core.patterns import NM
from sparsejax.core.schedules import exponential_mask_decay, linear_mask_decay, stepwise_nm
from sparsejax.core.selection import Where, named_leaves, selected_paths

Recipe = Literal[
    "mdgf_exp",
    "mdgf_linear",
    "sdgf_stepwise",
    "sdgf_geometric",
    "sdgf_densify",
    "sdgf_custom",
    "srste",
    "ste",
    "dense",
]
NMTable = tuple[tuple[int, int, int], ...]
EXPONENTS = 16.0  # exp(-16) is left of a pruned entry when the exponential decay ends


@dataclasses.dataclass(frozen=True)
class ProgressiveConfig:
    """How a network reaches n of m.

    Attributes:
      recipe: "mdgf_exp" and "mdgf_linear" decay the mask; "sdgf_stepwise", "sdgf_geometric",
        "sdgf_densify" and "sdgf_custom" tighten the pattern, see `stepwise_nm` and `table`; "ste"
        is binary as soon as the dense phase ends; "srste" is binary from step 0; "dense".
      n, m, axis: the final pattern, see `NM`.
      epochs, steps_per_epoch: the length of training.
      dense_fraction, fine_tune_fraction: shares of the epochs, rounded down, in which nothing is
        pruned at the start and the final binary mask is used at the end.
      decay_coef: of the mask decay, a step. None: the linear decay reaches 0, and the exponential
        one exp(-16), when it ends.
      frames: stages of "sdgf_geometric" and "sdgf_densify".
      gradient: of the mask decay, see `mask_decay_weight`.
      srste_decay: the pull of "srste".
      update_every: the mask decay changes every so many steps.
      table: of "sdgf_custom", rows `(start epoch, n, m)`; the last row is the final pattern.

    Raises:
      ValueError: an unknown recipe or gradient; fractions that are negative or leave nothing;
        lengths, frames or update_every below 1; a negative coefficient; a table that is not sorted,
        missing, or not wanted; an impossible pattern.
    """

    recipe: Recipe
    n: int
    m: int
    axis: int | None = -2
    epochs: int = 1
    steps_per_epoch: int = 1
    dense_fraction: float = 0.1
    fine_tune_fraction: float = 0.1
    decay_coef: float | None = None
    frames: int = 4
    gradient: MaskGradient = "masked"
    srste_decay: float = 2e-4
    update_every: int = 1
    table: NMTable | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("recipe", self.recipe, get_args(Recipe)),
            ("gradient", self.gradient, get_args(MaskGradient)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
        for name in ("epochs", "steps_per_epoch", "frames", "update_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        dense, tuned = self.dense_fraction, self.fine_tune_fraction
        if min(dense, tuned) < 0 or dense + tuned >= 1:
            raise ValueError(
                f"dense_fraction is {dense} and fine_tune_fraction {tuned}; neither may be "
                "negative, and their sum must be below 1"
            )
        for name in ("decay_coef", "srste_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if (self.recipe == "sdgf_custom") != (self.table is not None):
            raise ValueError(
                f"table is {self.table} and recipe {self.recipe!r}; they go together as "
                "'sdgf_custom' with rows (start epoch, n, m)"
            )
        for _, n, m in self.stages():
            NM(n, m, self.axis)  # its checks
        if self.table is not None and self.table[-1][1:] != (self.n, self.m):
            raise ValueError(
                f"table ends with {self.table[-1]}; its last pattern must be {self.n}:{self.m}"
            )

    @property
    def dense_epochs(self) -> int:
        """Epochs before anything is pruned."""
        return int(self.dense_fraction * self.epochs)

    @property
    def fine_tune_epochs(self) -> int:
        """Epochs at the end with the final binary mask."""
        return int(self.fine_tune_fraction * self.epochs)

    @property
    def decay_steps(self) -> int:
        """Steps between the dense and the fine-tuning phase."""
        epochs = self.epochs - self.dense_epochs - self.fine_tune_epochs
        return epochs * self.steps_per_epoch

    def stages(self) -> NMTable:
        """Rows `(start epoch, n, m)` of the binary patterns, one for most recipes."""
        if self.table is not None:
            return _sorted_table(self.table)
        if not self.recipe.startswith("sdgf"):
            start = 0 if self.recipe == "srste" else self.dense_epochs
            return ((start, self.n, self.m),)
        return stepwise_nm(
            self.n,
            self.m,
            kind=self.recipe.removeprefix("sdgf_"),  # type: ignore[arg-type]
            epochs=self.epochs,
            dense_epochs=self.dense_epochs,
            fine_tune_epochs=self.fine_tune_epochs,
            frames=self.frames,
        )

    def beta(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """What is left of pruned entries at a step: 1 while dense, 0 while fine-tuning.

        Args:
          step: number of the step, from 0; may be traced.
        """
        step = jnp.asarray(step, jnp.int32)
        step = step - step % self.update_every
        start = self.dense_epochs * self.steps_per_epoch
        if self.recipe in ("mdgf_exp", "mdgf_linear"):
            kinds = {"mdgf_exp": (exponential_mask_decay, EXPONENTS),
                     "mdgf_linear": (linear_mask_decay, 1.0)}  # fmt: skip
            decay, whole = kinds[self.recipe]
            coef = whole / self.decay_steps if self.decay_coef is None else self.decay_coef
            left = decay(coef=coef, start=start)(step)
            return jnp.where(step < start + self.decay_steps, left, jnp.float32(0))
        return (step < start).astype(jnp.float32)


@runtime_checkable
class View(Protocol):
    """The parameters that the forward pass uses at a step."""

    def __call__(
        self, params: PyTree, step: int | Int[Array, ""], *, stage: int | None = None
    ) -> PyTree:
        """See `progressive_recipe`."""
        ...


def stage_at(schedule: Sequence[tuple[int, int, int]], epoch: int) -> int | None:
    """Which row of a pattern schedule holds in an epoch; None before the first.

    Args:
      schedule: rows `(start epoch, n, m)`, from `stepwise_nm` or hand-made. epoch: from 0.

    Raises:
      ValueError: no rows, rows that are not sorted by their start, or a negative epoch.

    >>> stage_at(((2, 4, 8), (5, 1, 8)), 4)
    0
    """
    if epoch < 0:
        raise ValueError(f"epoch is {epoch}; it must not be negative")
    started = [i for i, row in enumerate(_sorted_table(schedule)) if row[0] <= epoch]
    return started[-1] if started else None


def progressive_recipe(
    config: ProgressiveConfig, *, where: Where = None
) -> tuple[View, Callable[[int], int | None]]:
    """The view of a recipe, and the stage that it is in.

    `view(params, step, stage=None)` gives the parameters for the forward pass; differentiate
    through it. `step` may be traced. Only the "sdgf" recipes look at `stage`, a static number from
    `stage(epoch)` (None: dense); each stage is a program of its own, unless `progressive_view`
    makes it a branch of one.

    Args:
      config: the recipe. where: which leaves, see `selected_paths`; the feed-forward kernels in the
        paper.

    Returns:
      The view, and `stage(epoch) -> int | None`, which is None for recipes without stages.

    Raises:
      ValueError: from the view, `where` matches nothing, a leaf whose axis the group of some stage
        does not divide (both named), or a stage that does not exist.

    >>> view, stage = progressive_recipe(ProgressiveConfig("mdgf_linear", 1, 2, epochs=10))
    >>> params = {"kernel": jnp.asarray([[1.0], [2.0]])}
    >>> [float(view(params, step)["kernel"][0, 0]) for step in (0, 1, 5, 9)]
    [1.0, 1.0, 0.5, 0.0]
    """
    table = config.stages()
    patterns = [NM(n, m, config.axis) for _, n, m in table]
    staged = config.recipe.startswith("sdgf")

    def view(params: PyTree, step: int | Int[Array, ""], *, stage: int | None = None) -> PyTree:
        if config.recipe == "dense":
            return params
        _check_fit(params, patterns, where)
        if config.recipe == "srste":
            return sr_ste(params, patterns[0], decay=config.srste_decay, where=where)
        if not staged:
            gradient = "straight_through" if config.recipe == "ste" else config.gradient
            beta = config.beta(step)
            return mask_decay(params, beta, patterns[0], gradient=gradient, where=where)
        if stage is None:
            return params
        if not 0 <= stage < len(patterns):
            raise ValueError(f"stage is {stage}; there are 0 to {len(patterns) - 1}")
        return ste(params, patterns[stage], where=where)

    return view, lambda epoch: stage_at(table, epoch) if staged else None


def progressive_view(
    config: ProgressiveConfig, *, where: Where = None
) -> Callable[[PyTree, int | Int[Array, ""]], PyTree]:
    """The view of a recipe by the step alone: its stages are branches of one program.

    Args:
      config, where: see `progressive_recipe`.

    Returns:
      `view(params, step)`; after the last epoch, its stage holds.

    >>> config = ProgressiveConfig("sdgf_stepwise", 1, 4, epochs=3, dense_fraction=0.0)
    >>> params = {"kernel": jnp.arange(4.0).reshape(4, 1)}
    >>> view = jax.jit(progressive_view(config))
    >>> [view(params, step)["kernel"][:, 0].tolist() for step in (0, 2)]
    [[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 3.0]]
    """
    view, stage_of = progressive_recipe(config, where=where)
    stages = [stage_of(epoch) for epoch in range(config.epochs)]
    if set(stages) == {None}:
        return view
    present = list(dict.fromkeys(stages))
    branch_of = jnp.asarray([present.index(stage) for stage in stages], jnp.int32)
    branches = [functools.partial(view, step=0, stage=stage) for stage in present]

    def by_step(params: PyTree, step: int | Int[Array, ""]) -> PyTree:
        epoch = jnp.clip(step // config.steps_per_epoch, 0, config.epochs - 1)
        return lax.switch(branch_of[epoch], branches, params)

    return by_step


def gradient_noise(grads: PyTree) -> PyTree:
    """Variance over the entries of each leaf, in float32 at least.

    Args:
      grads: gradients as the optimiser receives them.

    Source: Bambhaniya et al. (2024), the diagnostic of gradient noise.
    """
    return jax.tree.map(lambda g: jnp.var(widen(g)), grads)


def _check_fit(params: PyTree, patterns: Sequence[NM], where: Where) -> None:
    leaves: dict[str, Any] = dict(named_leaves(params))
    for path in selected_paths(params, where):
        shape = leaves[path].shape
        for stage, pattern in enumerate(patterns):
            length = leaves[path].size if pattern.axis is None else shape[pattern.axis]
            if length % pattern.m:
                raise ValueError(
                    f"leaf {path!r} of shape {shape}: stage {stage} ({pattern}) needs groups of "
                    f"{pattern.m} along axis {pattern.axis}, which has length {length}"
                )


def _sorted_table(table: Sequence[tuple[int, int, int]]) -> NMTable:
    starts = [row[0] for row in table]
    if not starts or starts != sorted(starts) or starts[0] < 0:
        raise ValueError(
            f"the schedule starts at epochs {starts}; it needs rows (start epoch, n, m) in rising "
            "order"
        )
    return tuple(table)
