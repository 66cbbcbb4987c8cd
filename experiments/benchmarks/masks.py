"""What masks cost: making them, training with them, storing them.

`python -m experiments.benchmarks.masks` times each against plain JAX, in turns, and prints one
table. Masks that are timed against a sort are compared with it first, entry by entry.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from experiments.benchmarks.suite import (
    Group,
    nm_by_argsort,
    run_suite,
    small_llama,
    stepping,
    topk_by_argsort,
)
from experiments.harness.timing import Goal
from sparsejax import weights
from sparsejax.core.patterns import Ties
from sparsejax.models import LlamaConfig, llama_config, parameter_count

PROJECTIONS = r"_proj/kernel$"
PATTERN = sj.NM(2, 4)
DENSITY = 0.25
MASK_PERIOD = 10
TIES: tuple[Ties, ...] = ("last", "lowest")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
      side: the masks are of `[side, side]` weights.
      model, batch, seq_len: the LLaMA whose training steps are timed, and its batch.
      mask_rounds, step_rounds: measurements of each mask and of each step.
      min_seconds: what one measurement lasts at least.
    """

    side: int = 1024
    model: LlamaConfig = llama_config("laptop")  # noqa: RUF009 (frozen)
    batch: int = 16
    seq_len: int = 64
    mask_rounds: int = 11
    step_rounds: int = 31
    min_seconds: float = 0.01


PRESETS = {
    "laptop": Config(),
    "test": Config(
        side=64,
        model=llama_config("laptop", vocab_size=32, d_model=16, n_layers=1, d_ff=32),
        batch=2,
        seq_len=8,
        mask_rounds=2,
        step_rounds=2,
        min_seconds=1e-4,
    ),
}


def nm_groups(config: Config) -> Iterator[Group]:
    """2:4 masks by magnitude, along either axis, against two argsorts inside every group."""
    w = _distinct(config.side)
    for axis in (-2, -1):
        by_sort = f"2:4 along axis {axis}: two argsorts"
        ours = {f"nm_mask along {axis}, ties {ties}": _nm_by_rank(axis, ties) for ties in TIES}
        functions = {
            by_sort: jax.jit(lambda w, axis=axis: nm_by_argsort(jnp.abs(w), axis)),
            **ours,
        }
        yield _mask_group(functions, w, by_sort, Goal(1 / 100), config)


def unstructured_groups(config: Config) -> Iterator[Group]:
    """Exact masks over a whole leaf against an argsort, without and with equal scores."""
    scores = jnp.abs(_distinct(config.side))
    tied = scores.astype(jnp.bfloat16).astype(jnp.float32)
    keep = sj.keep_count(scores.size, DENSITY)
    for kind, values in (("distinct", scores), ("tied", tied)):
        by_sort = f"top {DENSITY:.0%}, {kind} scores: argsort"
        functions = {
            by_sort: jax.jit(lambda s: topk_by_argsort(s, keep)),
            f"Unstructured, {kind} scores": jax.jit(lambda s: sj.Unstructured().mask(s, DENSITY)),
        }
        yield _mask_group(functions, values, by_sort, Goal(1 / 15), config)


def packing_groups(config: Config) -> Iterator[Group]:
    """Masks at one bit an entry against a copy of the bool array."""
    mask = _distinct(config.side) > 0
    copy, pack, unpack = jax.jit(jnp.copy), jax.jit(sj.pack_masks), jax.jit(sj.unpack_masks)
    packed = pack(mask)
    functions = {
        "bool mask: copy": lambda: copy(mask),
        "pack_masks": lambda: pack(mask),
        "unpack_masks": lambda: unpack(packed),
        "pack and unpack": lambda: unpack(pack(mask)),
    }
    yield Group(functions, "bool mask: copy", config.mask_rounds)


def step_groups(config: Config) -> Iterator[Group]:
    """Whole training steps of a LLaMA, with donated state."""
    graph, params = small_llama(config.model)
    shape = (config.batch, config.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    windows = jnp.asarray(tokens, jnp.int32)
    masks = sj.make_masks(sj.magnitude(params), pattern=PATTERN, where=PROJECTIONS)

    def step(
        tx: optax.GradientTransformation, view: Callable[[Any], Any] = lambda p: p
    ) -> Callable[[], Any]:
        def one(state: Any, windows: jax.Array) -> Any:
            params, opt = state

            def loss(params: Any) -> jax.Array:
                logits = nnx.merge(graph, view(params))(windows[:, :-1])
                labels = windows[:, 1:]
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return optax.apply_updates(params, updates), opt

        return stepping(one, params, tx, windows)

    plain = "step: optax.adamw"
    srste, static, adams = "step, SR-STE, new mask each", "step, static mask", "step, AdamS"
    functions = {
        plain: step(optax.adamw(1e-3)),
        srste: step(optax.adamw(1e-3), lambda p: sj.sr_ste(p, PATTERN, where=PROJECTIONS)),
        static: step(sj.static_sparsity(optax.adamw(1e-3), masks)),
        adams: step(_adams()),
    }
    goals = {srste: Goal(1.25), static: Goal(1.10), adams: Goal(1.25)}
    yield Group(functions, plain, config.step_rounds, goals)


def update_groups(config: Config) -> Iterator[Group]:
    """The optimisers alone on the model's parameters, one mask period of updates a call."""
    _, params = small_llama(config.model)
    grads = jax.tree.map(lambda w: 1e-3 * jnp.cos(1e3 * w), params)

    def update(tx: optax.GradientTransformation) -> Callable[[], Any]:
        def one(state: Any, grads: Any) -> Any:
            params, opt = state
            updates, opt = tx.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt

        call = stepping(one, params, tx, grads)

        def period() -> Any:
            for _ in range(MASK_PERIOD - 1):
                jax.block_until_ready(call())
            return call()

        return period

    adamw = f"{MASK_PERIOD} updates only: optax.adamw"
    adams = f"{MASK_PERIOD} updates only, AdamS"
    functions = {adamw: update(optax.adamw(1e-3)), adams: update(_adams())}
    yield Group(functions, adamw, config.step_rounds, {adams: Goal(1.25)})


def sizes(config: Config) -> str:
    """What is measured."""
    return (
        f"masks of {config.side**2:,} weights; steps of a LLaMA with "
        f"{parameter_count(config.model):,} parameters on {config.batch} x {config.seq_len} tokens"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/masks.json`."""
    builders = (nm_groups, unstructured_groups, packing_groups, step_groups, update_groups)
    run_suite("masks", __doc__, PRESETS, builders, sizes, arguments)


def _distinct(side: int) -> jax.Array:
    """A square of weights in random order, no two of equal size: a sort breaks no tie its way."""
    rng = np.random.default_rng(0)
    sizes = 1 + rng.permutation(side * side)
    signs = rng.choice([-1, 1], side * side)
    return jnp.asarray((signs * sizes).reshape(side, side), jnp.float32)


def _nm_by_rank(axis: int, ties: Ties) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda w: sj.nm_mask(jnp.abs(w), 2, 4, axis=axis, ties=ties))


def _mask_group(
    functions: Mapping[str, Callable[[jax.Array], jax.Array]],
    values: jax.Array,
    baseline: str,
    goal: Goal,
    config: Config,
) -> Group:
    """Masks of the same values; all must be equal."""
    expected = functions[baseline](values)
    for name, function in functions.items():
        if not bool(jnp.array_equal(function(values), expected)):
            raise RuntimeError(f"{name} and {baseline} give two different masks")
    calls = {name: (lambda f=f: f(values)) for name, f in functions.items()}
    goals = {name: goal for name in functions if name != baseline}
    return Group(calls, baseline, config.mask_rounds, goals)


def _adams() -> optax.GradientTransformation:
    # so many steps that the pull stays what it is at the start
    return weights.adams(
        1e-3, total_steps=10**6, l1_decay=1e-3, mask_period=MASK_PERIOD, where=PROJECTIONS
    )


if __name__ == "__main__":
    main()
