"""`python -m experiments.blockffn`."""

import functools
from collections.abc import Callable
from typing import Any

from experiments.blockffn.config import DATASET, DRAFT, PRESETS, SLUG, Config
from experiments.blockffn.measures import measure_experts, union_difference
from experiments.blockffn.report import compared, draw, make_card, make_claims, make_tables
from experiments.blockffn.speculation import speculate
from experiments.blockffn.training import make_arms
from experiments.harness.arms import Found, as_metrics, best_rate, print_table, run_arms
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.data import TokenizedText, validation_windows
from experiments.harness.decoder_arms import (
    Trained,
    as_arm,
    check_arms,
    decoder_runner,
    load_text,
)
from experiments.harness.digits import kept_arm
from experiments.harness.run import Run

Trainer = Callable[[str, float, int], Trained]


def run(config: Config, run: Run) -> Result:
    """Trains every arm and measures what its experts share; reads the best ones by chunks."""
    text = load_text(config)
    arms = make_arms(config, text.vocab_size)
    trained = decoder_runner(run, SLUG, config, text, arms)
    windows = validation_windows(text.validation, config.seq_len)[: config.eval_windows or None]
    windows = windows[:, :-1]  # what is read; the last token is only predicted

    def train(name: str, rate: float, seed: int) -> dict[str, Any]:
        model = trained(name, rate, seed)
        if name == DRAFT:
            return as_arm(model)
        measured = measure_experts(arms[name].model, model.params, windows, config.eval_chunks)
        return as_arm(model) | measured

    found = run_arms(run, SLUG, config, train, list(arms), config.learning_rates)
    found = compared(config, found)
    decoding = kept_arm(
        run, SLUG, "decoding", functools.partial(decode, config, text, trained, found)
    )
    tables = make_tables(config, found, decoding)
    for table in tables:
        print_table(run, table)
    if run.is_main:
        draw(run, config, found)
    metrics = {"arms": as_metrics(found, curves=("curves",)), "decoding": decoding}
    return Result(make_claims(config, found, decoding), make_card(config), metrics, tables)


def decode(
    config: Config, text: TokenizedText, trained: Trainer, found: Found
) -> dict[str, list[float]]:
    """Reads our models by the union of every chunk's experts; see `union_difference`.

    The arms that are shown also continue prompts; see `speculate`.
    """
    windows = validation_windows(text.validation, config.seq_len)[: config.prompts, :-1]
    model, draft = config.model(text.vocab_size), config.draft(text.vocab_size)
    result: dict[str, list[float]] = {}

    def keep(name: str, value: Any) -> None:
        result.setdefault(name, []).append(float(value))

    for seed in config.seed_list():
        params = {
            name: trained(name, best_rate(found[name])[0], seed).params
            for name in (*config.shown, DRAFT)
        }
        for chunk in config.eval_chunks:
            difference = union_difference(model, params[config.ours], windows, chunk=chunk)
            keep(f"difference-{chunk}", difference)
        for name in config.shown:
            for k in config.draft_tokens:
                measured = speculate(
                    model,
                    draft,
                    params[name],
                    params[DRAFT],
                    windows[:, : config.prompt_tokens],
                    new_tokens=config.new_tokens(k),
                    draft_tokens=k,
                )
                for key, value in measured.items():
                    keep(f"{name}-{k}-{key}", value)
    return result


def check(config: Config) -> list[str]:
    """Builds the paper's setting abstractly: the model, its losses, and a training step.

    Vocabulary, key and value heads, optimiser and schedule are this project's: the paper has muP
    with a warm-up-stable-decay schedule.
    """
    arms, labels = make_arms(config, 256), config.labels()
    setting = (
        f"d_model {config.d_model}, {config.experts} experts of {config.expert_width} in each of "
        f"{config.layers} layers; {config.steps:,} steps of {config.batch * config.seq_len:,} "
        f"bytes of {config.dataset}, by AdamW with a cosine in place of muP"
    )
    checked = [name for name, losses in config.losses().items() if losses.cs] + [DRAFT]
    return check_arms(
        config, setting, {labels[name]: arms[name] for name in checked}, dataset=DATASET
    )


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level "
    "Activation Sparsity",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
