"""The digits network under every method, with weights masked on the fly or made before."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, PyTree

import sparsejax as sj
from experiments.bdwp.config import LAYERS, Config
from experiments.harness import digits
from experiments.harness.nm_training import digits_setup, digits_sgd
from sparsejax import weights


def network(
    params: PyTree, x: Array, *, method: str, pattern: sj.NM, decay: float, pairs: Any = None
) -> Array:
    """The digits network: hidden layers multiply as the method says, the head is dense.

    pairs: pre-generated weights of the hidden layers, or None to mask them here.
    """
    for i in range(len(params)):
        w, bias = params[f"layer{i}"]["kernel"], params[f"layer{i}"]["bias"]
        x = jax.nn.relu(x) if i else x
        if i == len(params) - 1:
            x = x @ w + bias
        elif pairs is None:
            x = weights.bdwp_dot(x, w, pattern.n, pattern.m, decay=decay, method=method) + bias  # type: ignore[arg-type]
        else:
            x = weights.bdwp_dot_compact(x, w, pairs[i], decay=decay) + bias
    return x


@functools.partial(jax.jit, static_argnames=("method", "pattern", "config"))
def train_digits(params: PyTree, order: Array, data: digits.Digits, peak: Array, *, method: str,
                 pattern: sj.NM, config: Config) -> dict[str, Array]:  # fmt: skip
    """One training of the digits network."""
    forward = functools.partial(network, method=method, pattern=pattern, decay=config.decay)

    def observe(before: PyTree, after: PyTree) -> Array:
        return digits.accuracy(after, (data.test_x, data.test_y), forward)

    trained = digits.train(
        digits_sgd(config, peak), params, order, data, network=forward, observe=observe
    )
    return {
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "train_loss": trained.train_loss,
        "accuracy_curve": trained.observed,
    }


@functools.partial(jax.jit, static_argnames=("pattern", "config"))
def pregenerated_training(params: PyTree, order: Array, data: digits.Digits, *, pattern: sj.NM,
                          config: Config) -> PyTree:  # fmt: skip
    """The parameters after BDWP steps that read compact weights made at the end of the last one."""
    tx = digits_sgd(config, config.lr[0])

    def generate(params: PyTree) -> list[weights.NMPair]:
        kernels = [params[f"layer{i}"]["kernel"] for i in range(LAYERS)]
        return [weights.pregenerate(w, pattern.n, pattern.m) for w in kernels]

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        params, state, pairs = carry
        forward = functools.partial(
            network, method="bdwp", pattern=pattern, decay=config.decay, pairs=pairs
        )
        batch = (data.train_x[rows], data.train_y[rows])
        grads = jax.grad(digits.cross_entropy)(params, batch, forward)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, generate(params)), None

    return lax.scan(step, (params, tx.init(params), generate(params)), order)[0][0]


def pregeneration_is_exact(config: Config) -> bool:
    """Whether some steps of both kinds give the same weights, bit for bit."""
    params, order, data = digits_setup(config, config.seed, layers=LAYERS, hidden=config.width)
    rows = order.reshape(-1, config.batch)[: config.pregenerate_steps]
    pattern, static = config.patterns()[0], digits.static_settings(config)
    forward = functools.partial(network, method="bdwp", pattern=pattern, decay=config.decay)
    on_the_fly = jax.jit(
        lambda p: digits.train(digits_sgd(config, config.lr[0]), p, rows, data, network=forward)
    )(params).params
    made = pregenerated_training(params, rows, data, pattern=pattern, config=static)
    pairs = zip(jax.tree.leaves(on_the_fly), jax.tree.leaves(made), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def mlp_products(config: Config) -> tuple[list[tuple[int, int, int]], tuple[int, int, int]]:
    """(P, K, Q) of the hidden layers of the digits network, and of its head."""
    sizes = (digits.INPUTS, *[config.width] * LAYERS)
    hidden = [(config.batch, k, q) for k, q in itertools.pairwise(sizes)]
    return hidden, (config.batch, config.width, digits.CLASSES)


def mac_ratio(config: Config, method: str, pattern: sj.NM) -> float:
    """Multiply-accumulates of a training step of the digits network over the dense ones."""
    hidden, head = mlp_products(config)
    sparse = weights.training_macs(hidden, pattern.n, pattern.m, method=method)["total"]  # type: ignore[arg-type]
    dense = [weights.training_macs(x, 1, 1, method="dense")["total"] for x in (hidden, [head])]
    return (sparse + dense[1]) / sum(dense)


def digits_arm(config: Config, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One training on the digits."""
    method, pattern = config.arms()[arm]
    params, order, data = digits_setup(config, seed, layers=LAYERS, hidden=config.width)
    found = train_digits(params, order, data, jnp.float32(rate), method=method, pattern=pattern,
                         config=digits.static_settings(config))  # fmt: skip
    result = {k: [float(v) for v in x] if x.ndim else float(x) for k, x in found.items()}
    return result | {"macs": mac_ratio(config, method, pattern)}
