"""What sparsity transforms cost around an optimiser: between mask updates, and at one.

`python -m experiments.benchmarks.transforms` times whole steps against the plain optimiser, on the
small LLaMA and on square layers, in turns. The mask of a step with an update is also timed as
JaxPruner makes it, by full sorts, written here in plain JAX.
"""

import dataclasses
from collections.abc import Callable, Iterator
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
from sparsejax.models import LlamaConfig, llama_config, parameter_count

WHERE = r"_proj/kernel$|layer"
DENSITY = 0.1
NEVER = 10**6


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
      model, batch, seq_len: the LLaMA whose training steps are timed, and its batch.
      side, layers, rows: square layers, how many, and the batch that goes through them.
      rounds: measurements of each. min_seconds: what one measurement lasts at least.
    """

    model: LlamaConfig = llama_config("laptop")  # noqa: RUF009 (frozen)
    batch: int = 16
    seq_len: int = 64
    side: int = 1024
    layers: int = 4
    rows: int = 64
    rounds: int = 15
    min_seconds: float = 0.01


PRESETS = {
    "laptop": Config(),
    "test": Config(
        model=llama_config("laptop", vocab_size=32, d_model=16, n_layers=1, d_ff=32),
        batch=2,
        seq_len=8,
        side=32,
        layers=2,
        rows=4,
        rounds=2,
        min_seconds=1e-4,
    ),
}


def llama_groups(config: Config) -> Iterator[Group]:
    """Steps of the small LLaMA."""
    graph, params = small_llama(config.model)
    shape = (config.batch, config.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    yield from _step_groups("LLaMA", loss, params, jnp.asarray(tokens, jnp.int32), config)


def square_groups(config: Config) -> Iterator[Group]:
    """Steps of a stack of square layers, in which weights are nearly all there is."""
    keys = jax.random.split(jax.random.key(0), config.layers)
    shape = (config.side, config.side)
    params = {f"layer{i}": jax.random.normal(k, shape) / 32 for i, k in enumerate(keys)}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.mean(x * x)

    x = jax.random.normal(jax.random.key(1), (config.rows, config.side))
    yield from _step_groups("square", loss, params, x, config)


def _step_groups(
    kind: str, loss: Callable[..., Any], params: Any, inputs: jax.Array, config: Config
) -> Iterator[Group]:
    adam = optax.adam(1e-3)
    masks = sj.random_masks(jax.random.key(2), params, DENSITY, where=WHERE)
    key = jax.random.key(3)

    def call(tx: optax.GradientTransformation) -> Callable[[], Any]:
        def one(state: Any, inputs: jax.Array) -> Any:
            params, opt = state
            updates, opt = tx.update(jax.grad(loss)(params, inputs), opt, params)
            return optax.apply_updates(params, updates), opt

        return stepping(one, params, tx, inputs)

    def gradual(pattern: sj.Pattern, schedule: Any) -> optax.GradientTransformation:
        return sj.gradual_pruning(
            adam, pattern=pattern, allocation=DENSITY, schedule=schedule, where=WHERE
        )

    plain = f"{kind}: optax.adam"
    between = {
        "static": sj.static_sparsity(adam, masks),
        "gradual": gradual(sj.Unstructured(), sj.Periodic(begin=NEVER, end=NEVER)),
        "RigL": sj.rigl(adam, masks=masks, freq=NEVER, end=NEVER),
        "SET": sj.sparse_evolution(adam, masks=masks, key=key, freq=NEVER, end=NEVER),
    }
    every = sj.Periodic(begin=0, end=NEVER, freq=1)
    at_update = {
        "gradual": gradual(sj.Unstructured(), every),
        "gradual 2:4": gradual(sj.NM(2, 4), every),
        "RigL": sj.rigl(adam, masks=masks, freq=1, begin=0, end=NEVER),
        "SET": sj.sparse_evolution(adam, masks=masks, key=key, freq=1, begin=0, end=NEVER),
    }
    functions = {plain: call(adam)}
    functions |= {f"{kind}, {name}: no mask update": call(tx) for name, tx in between.items()}
    goals = {name: Goal(1.10) for name in functions if name != plain}
    functions |= {f"{kind}, {name}: mask update": call(tx) for name, tx in at_update.items()}
    yield Group(functions, plain, config.rounds, goals)


def mask_groups(config: Config) -> Iterator[Group]:
    """All masks of the square layers, as JaxPruner makes them and as an update step does."""
    keys = jax.random.split(jax.random.key(0), config.layers)
    shape = (config.side, config.side)
    scores = {f"layer{i}": jax.random.uniform(k, shape) for i, k in enumerate(keys)}
    keep = sj.keep_count(config.side**2, DENSITY)

    def group(by_sort: str, theirs: Any, ours: str, mine: Any, goal: float) -> Group:
        theirs, mine = (jax.jit(lambda tree, f=f: jax.tree.map(f, tree)) for f in (theirs, mine))
        functions = {by_sort: lambda: theirs(scores), ours: lambda: mine(scores)}
        return Group(functions, by_sort, max(2, config.rounds // 3), {ours: Goal(goal)})

    yield group(
        "masks, unstructured: argsort",
        lambda s: topk_by_argsort(s, keep),
        "masks, unstructured: ours",
        lambda s: sj.Unstructured().mask(s, DENSITY),
        1 / 15,
    )
    yield group(
        "masks, 2:4: two argsorts",
        lambda s: nm_by_argsort(s, -2),
        "masks, 2:4: ours",
        lambda s: sj.nm_mask(s, 2, 4),
        1 / 100,
    )


def sizes(config: Config) -> str:
    """What is measured."""
    return (
        f"steps of a LLaMA with {parameter_count(config.model):,} parameters on {config.batch} x "
        f"{config.seq_len} tokens, and of {config.layers} layers {config.side} x {config.side} on "
        f"{config.rows} rows, at density {DENSITY:g}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/transforms.json`."""
    builders = (llama_groups, square_groups, mask_groups)
    run_suite("transforms", __doc__, PRESETS, builders, sizes, arguments)


if __name__ == "__main__":
    main()
