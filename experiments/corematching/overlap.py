"""Which image tokens are kept, whether the asked one is among them, and what the answer is then."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from experiments.corematching.cells import MEASURED, Cells, test_cells
from experiments.corematching.config import CHUNK, Config
from experiments.harness import digits
from sparsejax.activations import core_neurons, core_tokens, neuron_overlap, reference_set
from sparsejax.core.topk import exact_topk_mask
from sparsejax.models.vision_language_layers import Layer

MEASURES = ("kept", "recall", "accuracy")


def image_scores(layer: Layer, config: Config) -> Float[Array, "references b cells"]:
    """The scores of the image tokens in one layer, by every reference; the last token asks."""

    def one(q: Array, k: Array, a: Array) -> Array:
        def scores(reference: str) -> Array:
            if reference == "attention":
                asks = jnp.einsum("hw,mhw->hm", q[-1], k) * q.shape[-1] ** -0.5
                return jax.nn.softmax(asks, axis=-1).mean(0)
            if reference == "token":
                return neuron_overlap(a, reference_set(a, token=-1))
            core = core_neurons(a, rho=config.rho, beta=config.vision_beta)[0]
            return neuron_overlap(a, reference_set(a, reference="core_neurons", core=core))

        found = jnp.stack([scores(name).astype(jnp.float32) for name in config.reference])
        return found[:, : config.vision_tokens]

    return jax.vmap(one, out_axes=1)(layer.q, layer.k, layer.a)


def kept_tokens(scores: Float[Array, "*s cells"], config: Config) -> Bool[Array, "rules *s cells"]:
    """The image tokens that stay by every rule."""
    image = jnp.ones(config.vision_tokens, bool)

    def elbow(scores: Array) -> Array:
        return core_tokens(scores, image, on_flat=config.on_flat)[0]

    by_rule = {}
    counts = [int(rule) for rule in config.keep if rule != "elbow"]
    if counts:
        k = jnp.asarray(counts).reshape(-1, *[1] * (scores.ndim - 1))
        repeated = jnp.broadcast_to(scores, (len(counts), *scores.shape))
        top = exact_topk_mask(repeated, jnp.broadcast_to(k, repeated.shape[:-1]))
        by_rule = dict(zip(map(str, counts), top))
    if "elbow" in config.keep:
        flat = jax.vmap(elbow)(scores.reshape(-1, config.vision_tokens))
        by_rule["elbow"] = flat.reshape(scores.shape)
    return jnp.stack([by_rule[rule] for rule in config.keep])


def arms(config: Config) -> list[tuple[str, str]]:
    """`(reference, rule)` of everything that is measured behind a layer; random ones at the end."""
    return [(name, rule) for name in (*config.reference, "random") for rule in config.keep]


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def measure(
    graph: Any,
    params: Any,
    cells: Cells,
    key: PRNGKeyArray,
    after: Int[Array, ""],
    *,
    config: Config,
) -> dict[str, Array]:
    """What stays behind a layer, and the answers: means over the samples, one a arm.

    Returns:
      `kept`, tokens; `recall`, samples whose asked cell is kept; `accuracy`; `full`, the accuracy
      with all tokens. The random tokens of a rule are as many as overlap with the question keeps.
    """
    model = nnx.merge(graph, params)

    def chunk(inputs: tuple[Cells, Array]) -> dict[str, Array]:
        cells, key = inputs
        given = (cells.patches, cells.tokens, cells.markers)
        logits, layers = model.watched(*given, watch=lambda layer: image_scores(layer, config))
        scores = jnp.stack(layers)[after]
        kept = kept_tokens(scores, config).swapaxes(0, 1)  # references, rules, samples, cells
        overlap = kept[config.reference.index("token")]
        drawn = jnp.broadcast_to(jax.random.uniform(key, overlap.shape[1:]), overlap.shape)
        random = exact_topk_mask(drawn, jnp.sum(overlap, axis=-1, dtype=jnp.int32))
        keeps = jnp.concatenate([kept, random[None]]).reshape(-1, *overlap.shape[1:])

        def answers(kept: Array) -> tuple[Array, Array, Array]:
            keep = jnp.concatenate([kept, jnp.ones((len(kept), 1), bool)], axis=1)
            found = model(*given, keep=keep, after=after)[:, -1]
            asked = jnp.take_along_axis(kept, cells.asked[:, None], axis=1)
            right = jnp.argmax(found, -1) == cells.labels
            return jnp.sum(kept) / len(kept), jnp.mean(asked), jnp.mean(right)

        found = dict(zip(MEASURES, lax.map(answers, keeps)))
        return found | {"full": jnp.mean(jnp.argmax(logits[:, -1], -1) == cells.labels)}

    count = len(cells.labels)
    parts = max(1, count // CHUNK)
    split = jax.tree.map(lambda leaf: leaf.reshape(parts, count // parts, *leaf.shape[1:]), cells)
    found = lax.map(chunk, (split, jax.random.split(key, parts)))
    return jax.tree.map(lambda leaf: leaf.mean(0), found)


def measure_layer(
    config: Config, graph: Any, trained: list[Any], layer: int
) -> dict[str, list[float]]:
    """Everything behind one layer, by `<reference>-<rule>-<measure>`, one value a seed."""
    static = digits.static_settings(config)
    found: dict[str, list[float]] = {}
    for seed, params in zip(config.seed_list(), trained):
        cells = test_cells(config, seed, config.samples, MEASURED)
        values = measure(
            graph, params, cells, jax.random.key(seed), jnp.int32(layer), config=static
        )
        found.setdefault("full", []).append(float(values["full"]))
        for i, (name, rule) in enumerate(arms(config)):
            for what in MEASURES:
                found.setdefault(f"{name}-{rule}-{what}", []).append(float(values[what][i]))
    return found


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def overlap_maps(
    graph: Any, params: Any, cells: Cells, *, config: Config
) -> Float[Array, "layers n cells"]:
    """The overlap of every cell with the question, in every layer."""
    given = (cells.patches, cells.tokens, cells.markers)
    _, layers = nnx.merge(graph, params).watched(
        *given, watch=lambda layer: image_scores(layer, config)
    )
    return jnp.stack(layers)[:, config.reference.index("token")]
