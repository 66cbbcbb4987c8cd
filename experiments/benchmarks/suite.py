"""What the benchmarks share: groups of alternatives, their report, and what they are timed on."""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console

from experiments.harness.run import versions, write_json
from experiments.harness.timing import Goal, Timing, compare, timing_table
from sparsejax.models import Llama, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Group:
    """Alternatives that are timed in turns.

    Attributes:
      functions: by name. baseline: what the others are compared with.
      goals: by name. rounds: measurements of each.
    """

    functions: Mapping[str, Callable[[], Any]]
    baseline: str
    rounds: int
    goals: Mapping[str, Goal] = dataclasses.field(default_factory=dict)


Builder = Callable[[Any], Iterator[Group]]


def run_suite(
    name: str,
    description: str | None,
    presets: Mapping[str, Any],
    builders: Sequence[Builder],
    sizes: Callable[[Any], str],
    arguments: list[str] | None = None,
    *,
    columns: Callable[[Any], Mapping[str, Mapping[str, str]]] = lambda config: {},
) -> None:
    """Measures the groups of a benchmark, prints a table and writes `<out>/benchmarks/<name>.json`.

    Args:
      name: `python -m experiments.benchmarks.<name>`. description: for its help.
      presets: settings by name; they have `min_seconds`.
      builders: settings -> groups. sizes: settings -> what is measured, in words.
      columns: settings -> row -> more columns, by heading.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.benchmarks.{name}", description=description
    )
    parser.add_argument("--preset", choices=tuple(presets), default="laptop", help="sizes")
    parser.add_argument("--out", default="runs", help="folder for the figures")
    names = [build.__name__.removesuffix("_groups") for build in builders]
    parser.add_argument("--only", choices=names, help="one part of the table")
    chosen = parser.parse_args(arguments)
    if chosen.only is not None:
        builders = [builders[names.index(chosen.only)]]
    folder = pathlib.Path(chosen.out) / "benchmarks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {folder} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    config = presets[chosen.preset]
    started, load = time.time(), os.getloadavg()[0]
    timings: list[Timing] = []
    goals: dict[str, Goal] = {}
    for build in builders:
        with console.status(f"timing: {build.__name__.removesuffix('_groups')}"):
            for group in build(config):
                found = compare(
                    group.functions,
                    baseline=group.baseline,
                    rounds=group.rounds,
                    min_seconds=config.min_seconds,
                )
                timings += found.values()
                goals |= group.goals
    with console.status("measuring what is beside the time"):
        more = columns(config)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    title = f"{sizes(config)}\n({chosen.preset}, {device})"
    table, rows = timing_table(title, timings, goals, more)
    console.print(table)
    loads = [round(load, 2), round(os.getloadavg()[0], 2)]
    report = {
        "preset": chosen.preset,
        "sizes": sizes(config),
        "device": device,
        "load_average": loads,
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
        "rows": rows,
    }
    write_json(folder / f"{name}.json", report)
    met = [row["met"] for row in rows if row["met"] is not None]
    console.print(
        f"{sum(met)} of {len(met)} goals met; load average {loads[0]} before, {loads[1]} after; "
        f"figures in {folder / f'{name}.json'}",
        soft_wrap=True,
    )


def stepping(
    step: Callable[..., Any], params: Any, tx: optax.GradientTransformation, *inputs: Any
) -> Callable[[], Any]:
    """A call that moves its own parameters and optimiser state one step on, in place."""
    compiled = jax.jit(step, donate_argnums=0)
    # copies, because donation deletes what is shared with other states
    state = jax.jit(lambda p: jax.tree.map(jnp.copy, (p, tx.init(p))))(params)

    def call() -> Any:
        nonlocal state
        state = compiled(state, *inputs)
        return state

    return call


@functools.cache
def small_llama(config: LlamaConfig) -> tuple[Any, Any]:
    """Graph and random parameters of a LLaMA."""

    def build() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0))

    graph, _ = nnx.split(nnx.eval_shape(build))
    return graph, jax.jit(lambda: nnx.state(build()))()


def nm_by_argsort(scores: jax.Array, axis: int) -> jax.Array:
    """2:4 by the rank that two argsorts give every entry of its group."""
    axis %= scores.ndim
    shape = scores.shape
    grouped = scores.reshape(*shape[:axis], -1, 4, *shape[axis + 1 :])
    rank = jnp.argsort(jnp.argsort(grouped, axis=axis + 1), axis=axis + 1)
    return (rank >= 2).reshape(shape)


def topk_by_argsort(scores: jax.Array, keep: Any) -> jax.Array:
    """The `keep` largest entries of an array by a full sort."""
    order = jnp.argsort(-scores.reshape(-1))
    return jnp.zeros(scores.size, bool).at[order[:keep]].set(True).reshape(scores.shape)
