"""`python -m experiments.benchmarks.decoding`."""

from collections.abc import Iterator

import experiments.benchmarks.decoding
from experiments.benchmarks.decoding.config import PRESETS, Config
from experiments.benchmarks.decoding.feed_forward import feed_forward_rows
from experiments.benchmarks.decoding.reading import Notes
from experiments.benchmarks.decoding.whole_model import whole_model_rows
from experiments.benchmarks.suite import Group, run_suite
from sparsejax.models import parameter_count


def sizes(config: Config) -> str:
    """What is measured."""
    dense = config.dense
    return (
        f"one token (tokens a second: 1000 / ms): {dense.n_layers} layers of width "
        f"{dense.d_model}, {parameter_count(dense) / 1e6:.3g} M parameters, "
        f"{dense.vocab_size:,} of them words, {config.context} tokens in the cache"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/decoding.json`."""
    notes: Notes = {}

    def feed_forward_groups(config: Config) -> Iterator[Group]:
        return feed_forward_rows(config, notes)

    def whole_model_groups(config: Config) -> Iterator[Group]:
        return whole_model_rows(config, notes)

    run_suite(
        "decoding",
        experiments.benchmarks.decoding.__doc__,
        PRESETS,
        (feed_forward_groups, whole_model_groups),
        sizes,
        arguments,
        columns=lambda config: notes,
    )


if __name__ == "__main__":
    main()
