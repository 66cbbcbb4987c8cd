"""`python -m experiments.spark_transformer`."""

import functools

from experiments.harness.arms import as_metrics, print_table, run_arms
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.decoder_arms import as_arm, check_arms, decoder_runner, load_text
from experiments.harness.digits import kept_arm
from experiments.harness.run import Run
from experiments.spark_transformer.config import PRESETS, SLUG, Config, Rows, label
from experiments.spark_transformer.operator_cost import time_operators
from experiments.spark_transformer.report import draw, make_card, make_claims, make_tables


def run(config: Config, run: Run) -> Result:
    """Times the operators, then trains every arm."""
    costs = {
        text: kept_arm(
            run,
            SLUG,
            f"operators-{text.replace(':', '-')}",
            functools.partial(time_operators, Rows.parse(text), config),
        )
        for text in config.timed
    }
    arms = config.arms()
    train = decoder_runner(run, SLUG, config, load_text(config), arms)
    found = run_arms(
        run,
        SLUG,
        config,
        lambda arm, rate, seed: as_arm(train(arm, rate, seed)),
        list(arms),
        config.learning_rates,
    )
    tables = make_tables(config, costs, found)
    for table in tables:
        print_table(run, table)
    draw(run, config, costs, found)
    metrics = {"operators": costs, "arms": as_metrics(found, curves=("curves",))}
    return Result(make_claims(config, costs, found), make_card(config), metrics, tables)


def check(config: Config) -> list[str]:
    """Builds every arm at full size and traces a training step; nothing if the text is there."""
    arms = {label(name): arm for name, arm in config.arms().items()}
    setting = f"Gemma-2 2B's shape on the bytes of {config.dataset}"
    return check_arms(config, setting, arms, dataset=PRESETS["paper"].dataset)


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Spark Transformer: Reactivating Sparsity in FFN and Attention",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
