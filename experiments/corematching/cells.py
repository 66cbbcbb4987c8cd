"""Images of marked digits with a question for one of them, and decoders trained to answer it."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.corematching.config import SLUG, Config, vision_model
from experiments.harness import digits
from experiments.harness.language import cross_entropy
from experiments.harness.run import Run
from experiments.harness.training import train
from sparsejax.models.vision_language import VisionLanguage

TRAIN = 1297  # digits; the other 500 are for testing
MEASURED, SHOWN = 1, 2  # streams of random numbers beside that of training


class Cells(NamedTuple):
    """Samples: the pixels of every cell, the markers of all tokens, and what is asked for."""

    patches: Float[Array, "n cells 64"]
    markers: Int[Array, "n cells+1"]
    labels: Int[Array, " n"]
    asked: Int[Array, " n"]

    @property
    def tokens(self) -> Int[Array, "n 1"]:
        """The question, which is the same but for its marker."""
        return jnp.zeros((len(self.labels), 1), jnp.int32)


def split_digits(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Pixels in 0..1 and labels for training and for testing, cut by the permutation of a seed."""
    whole = digits.load_digits(TRAIN, 0.0)
    x = np.concatenate([whole.train_x, whole.test_x])
    y = np.concatenate([whole.train_y, whole.test_y])
    order = np.random.default_rng(seed).permutation(len(x))
    return tuple((x[part], y[part]) for part in (order[:TRAIN], order[TRAIN:]))


def draw_cells(
    rng: np.random.Generator, count: int, x: np.ndarray, y: np.ndarray, config: Config
) -> Cells:
    """Samples of digits at random, each cell with a marker of its own."""
    cells = config.vision_tokens
    chosen = rng.integers(0, len(x), (count, cells))
    markers = rng.random((count, config.markers)).argsort(1)[:, :cells]
    asked = rng.integers(0, cells, count)
    rows = np.arange(count)
    question = markers[rows, asked][:, None]
    tokens = np.concatenate([markers, question], axis=1).astype(np.int32)
    drawn = (x[chosen], tokens, y[chosen[rows, asked]], asked.astype(np.int32))
    return Cells(*drawn)  # type: ignore[arg-type]


class CellBatches:
    """Endless batches that depend on the seed and their number alone, which is the whole state."""

    def __init__(self, config: Config, seed: int):
        self._config, self._seed, self._number = config, seed, 0
        self._digits = split_digits(seed)[0]

    def __next__(self) -> Cells:
        rng = np.random.default_rng((self._seed, 0, self._number))
        self._number += 1
        return draw_cells(rng, self._config.vision_batch, *self._digits, self._config)

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"number": self._number}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on from a state."""
        self._number = int(state["number"])


def test_cells(config: Config, seed: int, count: int, stream: int) -> Cells:
    """Samples of the digits that were not trained on."""
    rng = np.random.default_rng((seed, stream))
    drawn = draw_cells(rng, count, *split_digits(seed)[1], config)
    return Cells(*(jnp.asarray(leaf) for leaf in drawn))


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with clipped gradients."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.vision_learning_rate, config.warmup, config.vision_steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def make_step(graph: Any, tx: optax.GradientTransformation) -> Any:
    """A training step on samples: patches, text, markers or None, and the label at its end."""

    def step(
        state: Any, patches: Array, tokens: Array, markers: Array | None, labels: Array
    ) -> tuple[Any, dict[str, Array]]:
        def loss(params: Any) -> Array:
            logits = nnx.merge(graph, params)(patches, tokens, markers)
            return cross_entropy(logits[:, -1], labels)

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {
            "loss": value
        }

    return step


def train_decoders(config: Config, run: Run) -> tuple[Any, list[Any]]:
    """The graph of the decoder, and its trained parameters for every seed."""
    tx = optimizer(config)
    build = functools.partial(VisionLanguage, vision_model(config))
    graph = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))[0]
    step = make_step(graph, tx)

    @jax.jit
    def on_cells(state: Any, cells: Cells) -> tuple[Any, dict[str, Array]]:
        return step(state, cells.patches, cells.tokens, cells.markers, cells.labels)

    trained = []
    for seed in config.seed_list():
        params = nnx.split(build(rngs=nnx.Rngs(seed)))[1]
        state = train(
            run,
            f"decoder-s{seed}",
            state={"params": params, "opt": tx.init(params)},
            step=on_cells,
            batches=CellBatches(config, seed),
            steps=config.vision_steps,
            slug=SLUG,
        )
        trained.append(state["params"])
    return graph, trained
