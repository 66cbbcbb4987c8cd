"""`python -m experiments.lazy_neuron`."""

import functools

from experiments.harness.arms import as_metrics, print_table, run_arms
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.decoder_arms import check_arms
from experiments.harness.digits import kept_arm
from experiments.harness.run import Run
from experiments.lazy_neuron.config import PRESETS, SLUG, Config, PretrainedConfig, arm_label
from experiments.lazy_neuron.label_noise import train_seeds
from experiments.lazy_neuron.language import trainer
from experiments.lazy_neuron.lemma import signs
from experiments.lazy_neuron.pretrained import run_pretrained
from experiments.lazy_neuron.report import draw, make_card, make_claims, make_tables


def run(config: Config | PretrainedConfig, run: Run) -> Result:
    """Byte models, the sign of the gradient and wrong labels; or a pretrained model."""
    if isinstance(config, PretrainedConfig):
        return run_pretrained(config, run)
    keep = functools.partial(kept_arm, run, SLUG)
    lemma = keep("lemma", functools.partial(signs, config))
    noise = {
        k: {
            share: keep(
                f"digits-k{k}-noise{share:g}", functools.partial(train_seeds, k, share, config)
            )
            for share in config.label_noise
        }
        for k in config.digits_topk
    }
    train = trainer(run, config)
    found = run_arms(run, SLUG, config, train, list(config.arms()), config.learning_rates)
    tables = make_tables(config, found, lemma, noise)
    for table in tables:
        print_table(run, table)
    if run.is_main:
        draw(run, config, found, noise)
    metrics = {
        "arms": as_metrics(found, curves=("curves", "neuron_rate")),
        "lemma": lemma,
        "digits": {f"k{k}-noise{s:g}": m for k, row in noise.items() for s, m in row.items()},
    }
    return Result(make_claims(config, found, lemma), make_card(config), metrics, tables)


def check(config: Config) -> list[str]:
    """Builds every language model at full size and traces a training step; nothing if it can run.

    T5 itself is an encoder and a decoder that fill in spans; this is a decoder of its sizes.
    """
    arms = {arm_label(name): arm for name, arm in config.arms().items()}
    setting = (
        f"a decoder of T5-Base's sizes on the bytes of {config.dataset}, where the paper has an "
        "encoder and a decoder that fill in spans of words"
    )
    return check_arms(config, setting, arms, dataset=PRESETS["paper"].dataset)


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
