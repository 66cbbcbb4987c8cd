"""The laptop preset: random layers, a network on digits with dropped inputs, a layer's time."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from experiments.harness import digits
from experiments.harness.timing import compare
from experiments.wina.config import TRAIN, Config
from sparsejax import activations as act

WIDTH, OUTPUTS, DRAWS, LAYER_SPARSITY = 512, 256, 256, 0.65  # of the random layer
SMALL, CASES = 10, 50  # inputs of a layer whose masks can all be tried, and such layers
SMALL_SPARSITY = 0.6
TIMED_SPARSITY, TIMED_TOKENS = (0.5, 0.8, 0.9), 16
BASES = ("teal", "wina", "teal-t", "wina-t")


# a random layer


@functools.partial(jax.jit, static_argnames="criterion")
def layer_error(seed: Array, spread: Array, *, criterion: str) -> Float[Array, ""]:
    """What a random layer loses of its output, relative, mean over inputs.

    Args:
      spread: the norms of its inputs' weights are multiplied by exp(spread * normal).
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (DRAWS, WIDTH))
    scale = jnp.exp(spread * jax.random.normal(keys[1], (WIDTH, 1)))
    kernel = scale * jax.random.normal(keys[2], (WIDTH, OUTPUTS))
    y = x @ kernel
    lost = act.sparse_linear(x, kernel, _norms(kernel, criterion), LAYER_SPARSITY) - y
    return jnp.mean(jnp.linalg.norm(lost, axis=-1) / jnp.linalg.norm(y, axis=-1))


def random_layers(config: Config) -> dict[str, list[float]]:
    """Relative errors by criterion and spread, `teal-0.5`, one for each seed."""
    return {
        f"{criterion}-{spread:g}": [
            float(layer_error(jnp.uint32(seed), jnp.float32(spread), criterion=criterion))
            for seed in config.seed_list()
        ]
        for spread in config.spreads
        for criterion in ("teal", "wina")
    }


def best_masks(config: Config) -> dict[str, list[float]]:
    """How often WINA's mask is the best of all masks of its size, in percent, for each seed."""
    return {
        kind: [100 * float(share_of_best(jnp.uint32(s), kind=kind)) for s in config.seed_list()]
        for kind in ("orthogonal", "any")
    }


@functools.partial(jax.jit, static_argnames="kind")
def share_of_best(seed: Array, *, kind: str) -> Float[Array, ""]:
    """Share of random layers, with orthogonal rows or any, where no other mask loses less."""
    kept = act.kept_inputs(SMALL, SMALL_SPARSITY)
    every = [np.isin(np.arange(SMALL), c) for c in itertools.combinations(range(SMALL), kept)]
    masks = jnp.asarray(np.stack(every))

    def is_best(key: Array) -> Bool[Array, ""]:
        keys = jax.random.split(key, 3)
        kernel = jax.random.normal(keys[0], (SMALL, 2 * SMALL))
        if kind == "orthogonal":
            rows = jnp.linalg.qr(kernel.T)[0].T
            kernel = rows * jnp.exp(jax.random.normal(keys[1], (SMALL, 1)))
        x = jax.random.normal(keys[2], (SMALL,))
        losses = jnp.linalg.norm((~masks * x) @ kernel, axis=-1)
        ours = act.wina_mask(x, _norms(kernel, "wina"), SMALL_SPARSITY)
        return jnp.linalg.norm((~ours * x) @ kernel) <= losses.min() * (1 + 1e-5)

    return jnp.mean(jax.lax.map(is_best, jax.random.split(jax.random.key(seed), CASES)))


def _norms(kernel: Array, criterion: str) -> Array:
    """The norms of a criterion, as many as there are inputs."""
    if criterion == "teal":
        return jnp.ones(kernel.shape[0])
    return act.column_norms(kernel, where=lambda path, leaf: True)


# a network on digits


class Layer(NamedTuple):
    """A linear layer in a basis of its inputs: `(x @ rotation) @ kernel + bias`.

    `c` scores the rotated inputs.
    """

    rotation: Float[Array, "i i"]
    kernel: Float[Array, "i o"]
    bias: Float[Array, " o"]
    c: Float[Array, " i"]


class RSparseLayer(NamedTuple):
    """A layer that gives what it drops to a product of low rank."""

    kernel: Float[Array, "i o"]
    bias: Float[Array, " o"]
    factors: tuple[Array, Array]
    threshold: Float[Array, ""]


def load(seed: int) -> digits.Digits:
    """The digits from 0 to 1, divided into training and test images anew by every seed."""
    given = digits.load_digits(TRAIN, 0.0)
    x = jnp.concatenate([given.train_x, given.test_x])
    y = jnp.concatenate([given.train_y, given.test_y])
    order = np.random.default_rng(seed).permutation(len(x))
    return digits.Digits(x[order[:TRAIN]], y[order[:TRAIN]], x[order[TRAIN:]], y[order[TRAIN:]])


@functools.partial(jax.jit, static_argnames="config")
def train_network(params: PyTree, order: Array, data: digits.Digits, *, config: Config) -> PyTree:
    """Adam at one rate."""
    return digits.train(optax.adam(config.mlp_learning_rate), params, order, data).params


def trained(config: Config, seed: int) -> tuple[PyTree, digits.Digits]:
    """The dense network of a seed and its data."""
    data = load(seed)
    steps = config.mlp_epochs * (TRAIN // config.mlp_batch)
    order = digits.batch_order(seed, steps=steps, batch=config.mlp_batch, examples=TRAIN)
    sizes = (digits.INPUTS, *config.hidden, digits.CLASSES)
    params = digits.init_mlp(jax.random.key(seed), sizes)
    return train_network(params, order, data, config=digits.static_settings(config)), data


def in_basis(params: PyTree, method: str) -> list[Layer]:
    """The network as a method sees it; "-t" has every layer in the basis of its singular vectors.

    The rotation of a decoder's residual stream does that to k and gate.
    """
    layers = []
    for i in range(len(params)):
        kernel, bias = params[f"layer{i}"]["kernel"], params[f"layer{i}"]["bias"]
        rotation = np.eye(kernel.shape[0])
        if method.endswith("-t"):
            rotation = np.linalg.svd(np.asarray(kernel, np.float64))[0]
        turned = jnp.asarray(rotation.T @ np.asarray(kernel, np.float64), jnp.float32)
        c = _norms(turned, method.removesuffix("-t"))
        layers.append(Layer(jnp.asarray(rotation, jnp.float32), turned, bias, c))
    return layers


@functools.partial(jax.jit, static_argnames="sparsity")
def measure(layers: list[Layer], data: digits.Digits, *, sparsity: float) -> dict[str, Array]:
    """Test accuracy and loss where every layer drops a share of its inputs."""

    def network(layers: list[Layer], x: Array) -> Array:
        for i, (rotation, kernel, bias, c) in enumerate(layers):
            x = (x if i == 0 else jax.nn.relu(x)) @ rotation
            x = act.sparse_linear(x, kernel, c, sparsity, bias=bias)
        return x

    return _figures(layers, data, network)


@jax.jit
def measure_r_sparse(layers: list[RSparseLayer], data: digits.Digits) -> dict[str, Array]:
    """The same for R-Sparse, with the loss on the training images."""

    def network(layers: list[RSparseLayer], x: Array) -> Array:
        for i, layer in enumerate(layers):
            x = r_sparse_outputs(layer, x if i == 0 else jax.nn.relu(x))
        return x

    train = (data.train_x, data.train_y)
    return _figures(layers, data, network) | {
        "train_loss": digits.cross_entropy(layers, train, network)
    }


@jax.jit
def r_sparse_outputs(layer: RSparseLayer, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
    """What a layer gives, all images sparsified."""
    kernel, bias, factors, threshold = layer
    options = {"factors": factors, "threshold": threshold, "prefill_ratio": 1.0}
    return act.r_sparse_linear(x, kernel, **options) + bias


def _figures(layers: Any, data: digits.Digits, network: Any) -> dict[str, Array]:
    test = (data.test_x, data.test_y)
    return {
        "accuracy": digits.accuracy(layers, test, network),
        "loss": digits.cross_entropy(layers, test, network),
    }


def r_sparse_layers(
    params: PyTree, data: digits.Digits, sparsity: float, alpha: float
) -> list[RSparseLayer]:
    """Ranks by the budget, thresholds from what each layer sees of the training images.

    The layers before it are sparse then: what they lose makes its inputs smaller.
    """
    layers, x = [], data.train_x
    for i in range(len(params)):
        kernel, bias = params[f"layer{i}"]["kernel"], params[f"layer{i}"]["bias"]
        x = x if i == 0 else jax.nn.relu(x)
        width, outputs = kernel.shape
        _, rank = act.r_sparse_budget(width, outputs, sparsity, alpha)
        factors = act.low_rank_factors(kernel, rank)
        scores = np.asarray(act.input_scores(x, _norms(kernel, "wina")))
        threshold = act.empirical_icdf(scores.ravel(), 1 - (1 - sparsity) * alpha)
        layers.append(RSparseLayer(kernel, bias, factors, jnp.float32(threshold)))
        x = r_sparse_outputs(layers[-1], x)
    return layers


def sparsify_networks(config: Config) -> dict[str, Any]:
    """Accuracy, loss and R-Sparse's alpha by method and sparsity: lists with one for each seed."""
    found: dict[str, list[float]] = {}
    for seed in config.seed_list():
        params, data = trained(config, seed)
        test = (data.test_x, data.test_y)
        row = {"dense accuracy": digits.accuracy(params, test)}
        for sparsity, method in itertools.product(config.sparsity, config.methods):
            if method in BASES:
                values = measure(in_basis(params, method), data, sparsity=sparsity)
            else:
                values = _best_r_sparse(config, params, data, sparsity)
            row |= {f"{method}-{sparsity:g} {name}": value for name, value in values.items()}
        for name, value in row.items():
            found.setdefault(name, []).append(float(value))
    return found


def _best_r_sparse(
    config: Config, params: PyTree, data: digits.Digits, sparsity: float
) -> dict[str, Any]:
    tried = {
        alpha: measure_r_sparse(r_sparse_layers(params, data, sparsity, alpha), data)
        for alpha in config.alphas
    }
    alpha = min(tried, key=lambda a: float(tried[a]["train_loss"]))
    return {"accuracy": tried[alpha]["accuracy"], "loss": tried[alpha]["loss"], "alpha": alpha}


# the time of a layer


def time_layer(config: Config) -> dict[str, Any]:
    """Tokens one by one through a layer that reads their kept rows alone, against the dense layer.

    Several tokens with rows of their own, so that not all they need is in a cache.
    """
    rng = np.random.default_rng(config.seed)
    width, outputs = config.timed
    kernel = jnp.asarray(rng.standard_normal((width, outputs)), jnp.float32)
    tokens = jnp.asarray(rng.standard_normal((TIMED_TOKENS, width)), jnp.float32)
    c = _norms(kernel, "wina")

    @functools.partial(jax.jit, static_argnames="sparsity")
    def outputs_of(tokens: Array, kernel: Array, *, sparsity: float | None) -> Array:
        def one(x: Array) -> Array:
            if sparsity is None:
                return x @ kernel
            return act.sparse_linear(x, kernel, c, sparsity, gather=True)

        return jax.lax.map(one, tokens)

    calls = {"dense": functools.partial(outputs_of, tokens, kernel, sparsity=None)} | {
        f"{share:.0%}": functools.partial(outputs_of, tokens, kernel, sparsity=share)
        for share in TIMED_SPARSITY
    }
    timings = compare(calls, baseline="dense", rounds=config.rounds, min_seconds=0.02)
    return {
        name: {"ms": 1e3 * t.median / TIMED_TOKENS, "ratio": t.ratio, "cpu_ratio": t.cpu_ratio}
        for name, t in timings.items()
    }
