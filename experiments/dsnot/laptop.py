"""The two halves of the laptop preset: digit networks with DSnoT, a language model at 2:4."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from experiments.dsnot.config import LABELS, SLUG, Arm, Config
from experiments.harness import digits
from experiments.harness.data import validation_windows
from experiments.harness.language import LanguageModel, dense_model
from experiments.harness.perplexity import make_perplexity
from experiments.harness.run import Run
from sparsejax import weights

HIDDEN = ("layer0", "layer1", "layer2")  # the head stays dense
ONE_SHOT = ("magnitude", "wanda", "sparsegpt")


class Layer(nnx.Module):
    """A hidden layer of a trained network: linear, then ReLU."""

    def __init__(self, params: dict[str, Array]):
        self.linear = nnx.Linear(*params["kernel"].shape, rngs=nnx.Rngs(0))
        self.linear.kernel = nnx.Param(params["kernel"])
        self.linear.bias = nnx.Param(params["bias"])

    def __call__(self, x: Array) -> Array:
        """The activations of the next layer's inputs."""
        return nnx.relu(self.linear(x))


@functools.partial(jax.jit, static_argnames="config")
def train_network(params: PyTree, order: Array, data: digits.Digits, *, config: Config) -> PyTree:
    """SGD with momentum, coupled weight decay and a cosine."""
    rate = optax.cosine_decay_schedule(config.mlp_learning_rate, config.mlp_steps)
    tx = digits.sgd(rate, momentum=config.momentum, weight_decay=config.weight_decay)
    return digits.train(tx, params, order, data).params


def train_networks(config: Config, data: digits.Digits) -> list[PyTree]:
    """One dense network for each seed."""
    config = digits.static_settings(config)
    sizes = (digits.INPUTS, *[config.width] * len(HIDDEN), digits.CLASSES)
    return [
        train_network(
            digits.init_mlp(jax.random.key(seed), sizes),
            digits.batch_order(
                seed, steps=config.mlp_steps, batch=config.mlp_batch, examples=digits.SPLIT
            ),
            data,
            config=config,
        )
        for seed in config.seed_list()
    ]


def prune_networks(
    arm: Arm, config: Config, networks: list[PyTree], data: digits.Digits
) -> dict[str, Any]:
    """The arm on every network: accuracy and loss on the test set, errors on calibration images."""
    images = data.train_x[: config.images]
    grouped = images.reshape(config.sequences, config.sequence_length, -1)
    found: dict[str, list[float]] = {}
    for dense in networks:
        blocks = [Layer(dense[name]) for name in HIDDEN]
        _, reports = weights.prune_sequential(blocks, grouped, method=arm.method(config))
        kernels = {name: block.linear.kernel[...] for name, block in zip(HIDDEN, blocks)}
        pruned = dense | {n: dense[n] | {"kernel": kernel} for n, kernel in kernels.items()}
        measured = evaluate(pruned, data) | {
            "rel_mse": np.mean([report["linear/kernel"] for report in reports]),
            "rel_mean": mean_errors(dense, pruned, images),
        }
        for name, value in measured.items():
            found.setdefault(name, []).append(float(value))
    return found


@jax.jit
def evaluate(params: PyTree, data: digits.Digits) -> dict[str, Array]:
    """Test accuracy in percent and test loss in nats."""
    test = (data.test_x, data.test_y)
    return {
        "accuracy": digits.accuracy(params, test),
        "loss": digits.cross_entropy(params, test),
    }


@jax.jit
def mean_errors(dense: PyTree, pruned: PyTree, x: Array) -> Array:
    """Relative squared error of the mean output, mean over the hidden layers.

    Each layer gets the inputs that it gets in the pruned network.
    """
    errors = []
    for name in HIDDEN:
        before, after = dense[name]["kernel"], pruned[name]["kernel"]
        average = x.mean(0)
        errors.append(jnp.sum((average @ (before - after)) ** 2) / jnp.sum((average @ before) ** 2))
        x = jax.nn.relu(x @ after + pruned[name]["bias"])
    return jnp.stack(errors).mean()


def language_methods(config: Config) -> dict[str, weights.PruneMethod]:
    """How the language model is pruned at once, by name."""
    methods = {
        name: weights.PruneMethod(name, pattern=config.nm)  # type: ignore[arg-type]
        for name in ONE_SHOT
    }
    methods["mask"] = weights.PruneMethod("sparsegpt", pattern=config.nm, update_weights=False)
    return methods


def prune_language_model(config: Config, run: Run) -> dict[str, Any]:
    """Validation perplexities of the dense model and of each way to prune it, one a draw."""
    model = dense_model(run, config, None, slug=SLUG)
    windows = validation_windows(model.text.validation, config.seq_len)
    perplexity = make_perplexity(model.logits)
    found = {"dense": [perplexity(model.params, windows)] * config.seeds}
    for name, method in language_methods(config).items():
        found[name] = []
        for seed in config.seed_list():
            if name == "magnitude" and found[name]:  # it looks at no window
                found[name].append(found[name][0])
                continue
            pruned = nnx.merge(model.graph, jax.tree.map(jnp.asarray, model.params))
            weights.prune_model(pruned, draw_windows(config, model, seed), method=method, chunk=64)
            found[name].append(perplexity(nnx.state(pruned), windows))
        run.show(f"{LABELS[name]} at {config.pattern}: perplexity {np.mean(found[name]):.3f}")
    return found


def draw_windows(config: Config, model: LanguageModel, seed: int) -> Array:
    """Calibration windows at random places of the training text."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(model.text.train) - config.seq_len, config.calibration)
    tokens = np.stack([model.text.train[s : s + config.seq_len] for s in starts])
    return jnp.asarray(tokens, jnp.int32)
