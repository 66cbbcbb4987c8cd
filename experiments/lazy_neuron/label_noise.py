"""Top-k networks against wrong labels, on digits: accuracy and calibration on clean ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from experiments.harness import digits
from experiments.harness.metrics import corrupt_labels, expected_calibration_error
from experiments.lazy_neuron.config import DIGITS, TRAIN, Config
from sparsejax.activations import activation_stats, relu_mlp

BLOCKS = 2


def train_seeds(k: int, noise: float, config: Config) -> dict[str, Any]:
    """A network for every seed: k activations kept (0 for all), a share of labels drawn anew."""
    found = []
    for seed in config.seed_list():
        init, noisy = jax.random.split(jax.random.key(seed))
        data = _split(seed)
        data = data._replace(
            train_y=corrupt_labels(noisy, data.train_y, p=noise, num_classes=digits.CLASSES)
        )
        order = digits.batch_order(
            seed, steps=config.digits_steps, batch=config.digits_batch, examples=TRAIN
        )
        params = init_network(init, config.width)
        rate = jnp.float32(config.digits_learning_rate)
        found.append(jax.device_get(_train(params, order, data, rate, k=k)))
    return {name: [float(one[name]) for one in found] for name in found[0]}


@functools.partial(jax.jit, static_argnames="k")
def _train(
    params: PyTree, order: Array, data: digits.Digits, rate: Array, *, k: int
) -> dict[str, Array]:
    def network(params: PyTree, x: Array) -> Array:
        return forward(params, x, k)[0]

    trained = digits.train(optax.adamw(rate), params, order, data, network=network)
    logits, share = forward(trained.params, data.test_x, k)
    return {
        "test_accuracy": trained.test_accuracy,
        "train_loss": trained.train_loss,
        "ece": expected_calibration_error(jax.nn.softmax(logits), data.test_y),
        "share": share,
    }


def init_network(key: Array, width: int) -> PyTree:
    """Blocks `x + MLP(LayerNorm(x))` on the 64 pixels, and a linear head; He-normal weights."""
    initializer = jax.nn.initializers.he_normal()

    def block(key: Array) -> PyTree:
        first, second = jax.random.split(key)
        return {
            "scale": jnp.ones(digits.INPUTS),
            "bias": jnp.zeros(digits.INPUTS),
            "mlp": {
                "K": initializer(first, (digits.INPUTS, width)),
                "V": initializer(second, (width, digits.INPUTS)),
                "bK": jnp.zeros(width),
                "bV": jnp.zeros(digits.INPUTS),
            },
        }

    *keys, last = jax.random.split(key, BLOCKS + 1)
    head = {"kernel": initializer(last, (digits.INPUTS, digits.CLASSES)),
            "bias": jnp.zeros(digits.CLASSES)}  # fmt: skip
    return {"blocks": [block(k) for k in keys], "head": head}


def forward(
    params: PyTree, x: Float[Array, "n pixels"], k: int
) -> tuple[Float[Array, "n classes"], Float[Array, ""]]:
    """Logits, and the share of neurons that are not 0, mean of the blocks."""
    shares = []
    for block in params["blocks"]:
        normed = jax.nn.standardize(x, epsilon=1e-6) * block["scale"] + block["bias"]
        out, inside = relu_mlp(block["mlp"], normed, k=k or None)
        x = x + out
        shares.append(activation_stats(inside["activation"])["nonzero_fraction"])
    head = params["head"]
    return x @ head["kernel"] + head["bias"], jnp.mean(jnp.stack(shares))


@functools.cache
def _split(seed: int) -> digits.Digits:
    """All digits in the order of a seed; pixels standardised on the training part, times .5."""
    data = digits.load_digits(TRAIN, 0.0)
    order = np.random.default_rng(seed).permutation(DIGITS)
    x = np.concatenate([data.train_x, data.test_x])[order]
    y = np.concatenate([data.train_y, data.test_y])[order]
    mean, deviation = x[:TRAIN].mean(0), x[:TRAIN].std(0)
    x = 0.5 * (x - mean) / np.where(deviation > 0, deviation, 1)
    return digits.Digits(*(jnp.asarray(a) for a in (x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])))
