"""A small vision-language decoder whose prompt can be pruned: core tokens and core neurons.

Image patches and text are one sequence: `prefix` text tokens, the image, the rest of the text.
CoreMatching prunes both ways at once: image tokens are dropped after a layer, from later layers and
from the cache, and decoding reads the rows of the neurons that are core for the prompt alone.
Blocks are separate modules, not a stack, for their caches and feed-forward networks may differ in
size; compiling takes time in proportion to the depth.

Source: Liu et al., "Visual Instruction Tuning", 2023 (LLaVA); CoreMatching (2025, arXiv
2505.19235); the blocks are those of `Llama`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparsejax.activations import compact_ffn
from sparsejax.core.selection import is_concrete
from sparsejax.models.blocks import matrix_dot_general
from sparsejax.models.decoding import DType
from sparsejax.models.llama import RMSNorm, rope_tables
from sparsejax.models.llama_config import require
from sparsejax.models.partition import Rules, specs_of
from sparsejax.models.vision_language_cache import (
    LayerCache,
    choose_neurons,
    choose_tokens,
    drop_tokens,
    prune_keys,
    with_room,
)
from sparsejax.models.vision_language_config import CoreMatching, VisionLanguageConfig
from sparsejax.models.vision_language_layers import FFN, Layer, VisionLanguageBlock


class Prefilled(NamedTuple):
    """A prompt after its pass through the model.

    logits: of its last token, [b, outputs]. cache: of every layer. neurons: the core neurons of the
    layers that are pruned, [b, n_core] each; empty without pruning. keep: the tokens of the prompt
    that the cache of each layer holds, [layers, b, m].
    """

    logits: Array
    cache: tuple[LayerCache, ...]
    neurons: dict[int, Array]
    keep: Array


class VisionLanguage(nnx.Module):
    """A decoder of image patches and text; `nnx.split` gives a graph and exactly its parameters.

    Paths: `patch_embed/kernel [patch_inputs, d]`, `embed/embedding [vocab, d]`, `markers/embedding
    [markers, d]` if there are any, `blocks/0/attention/q_proj/kernel [in, out]` and so on,
    `blocks/0/ffn/gate [f, d]`, `norm/scale [d]`, `head/kernel [d, outputs]`.

    Every method takes `patches` `[b, vision_tokens, patch_inputs]`, `tokens` `[b, t]`, the text, of
    which the first `prefix` come before the image, and `markers`, one of each of the m tokens of
    the whole sequence in its order, -1 for none; None for none at all.

    >>> config = VisionLanguageConfig(vision_tokens=4, patch_inputs=6, vocab_size=10, d_model=8,
    ...                               n_layers=2, n_heads=2, d_ff=16, max_seq_len=12)
    >>> model = VisionLanguage(config, rngs=nnx.Rngs(0))
    >>> patches, tokens = jnp.ones((1, 4, 6)), jnp.zeros((1, 3), jnp.int32)
    >>> model(patches, tokens).shape
    (1, 3, 10)
    >>> select = CoreMatching(select_layer=0, capacity=5, token=-1)
    >>> prompt = model.prefill(patches, tokens, select=select, room=2)
    >>> core = model.compact(prompt.neurons)
    >>> logits, cache = model.decode(jnp.zeros((1, 1), jnp.int32), prompt.cache, core=core)
    >>> logits.shape, cache[0].k.shape, core[0]["gate"].shape
    ((1, 1, 10), (1, 7, 2, 4), (6, 8))
    """

    def __init__(self, config: VisionLanguageConfig, *, rngs: nnx.Rngs):
        def table(size: int) -> nnx.Embed:
            return nnx.Embed(
                size,
                config.d_model,
                param_dtype=jnp.dtype(config.param_dtype),
                embedding_init=nnx.initializers.normal(config.embed_std),
                rngs=rngs,
            )

        def matrix(size_in: int, size_out: int, dtype: DType) -> nnx.Linear:
            return nnx.Linear(
                size_in,
                size_out,
                use_bias=False,
                dtype=jnp.dtype(dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
                dot_general=matrix_dot_general,
                rngs=rngs,
            )

        self.config = config
        self.patch_embed = matrix(config.patch_inputs, config.d_model, config.dtype)
        self.embed = table(config.vocab_size)
        if config.markers:
            self.markers = table(config.markers)
        blocks = [VisionLanguageBlock(config, rngs=rngs) for _ in range(config.n_layers)]
        self.blocks = nnx.List(blocks)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, param_dtype=config.param_dtype)
        self.head = matrix(config.d_model, config.head_outputs, "float32")

    def __call__(
        self,
        patches: Float[Array, "b n p"],
        tokens: Int[Array, "b t"],
        markers: Int[Array, "b m"] | None = None,
        *,
        keep: Bool[Array, "b m"] | None = None,
        after: int | Int[Array, ""] = -1,
    ) -> Float[Array, "b t outputs"]:
        """Logits of every text token, float32.

        keep: the tokens that layers later than `after` see; None for all. `after` may be traced.
        Raises ValueError for inputs of another shape, or too many tokens. Differentiable in the
        parameters and patches.
        """
        return self.watched(patches, tokens, markers, keep=keep, after=after)[0]

    def watched(
        self,
        patches: Float[Array, "b n p"],
        tokens: Int[Array, "b t"],
        markers: Int[Array, "b m"] | None = None,
        *,
        keep: Bool[Array, "b m"] | None = None,
        after: int | Int[Array, ""] = -1,
        watch: Callable[[Layer], PyTree] = lambda layer: None,
    ) -> tuple[Float[Array, "b t outputs"], list[PyTree]]:
        """As `__call__`, and what `watch` makes of each layer."""
        x, positions = self._embedded(patches, tokens, markers)
        rope = rope_tables(self.config.decoder, positions)
        everything = jnp.ones(positions.shape, bool)
        seen = []
        for i, block in enumerate(self.blocks):
            valid = everything if keep is None else keep | jnp.asarray(i <= after)
            x, layer = block(x, rope, self._visible(i, positions, positions, valid))
            seen.append(watch(layer))
        prefix, behind = self.config.prefix, self.config.prefix + self.config.vision_tokens
        text = jnp.concatenate([x[:, :prefix], x[:, behind:]], axis=1)
        return self.head(self.norm(text)), seen

    def prefill(
        self,
        patches: Float[Array, "b n p"],
        tokens: Int[Array, "b t"],
        markers: Int[Array, "b m"] | None = None,
        *,
        select: CoreMatching | None = None,
        room: int = 0,
    ) -> Prefilled:
        """Passes a prompt through the model and prunes it.

        select: how; None keeps everything. room: tokens that will be decoded behind it.
        Raises ValueError as `__call__`, for a selection that the model has no layers for, a
        capacity without a place for an image token, or a room beyond `max_seq_len`.
        """
        x, positions = self._embedded(patches, tokens, markers)
        (b, m), limit = positions.shape, self.config.max_seq_len
        require(
            room >= 0 and m + room <= limit,
            f"room is {room} behind {m} tokens; max_seq_len allows {limit} in all.",
        )
        capacity = None if select is None else select.capacity
        require(
            capacity is None or capacity > tokens.shape[1],
            f"capacity is {capacity}; the prompt has {tokens.shape[1]} text tokens, and they stay.",
        )
        pruned, choosing = range(0), range(0)
        if select is not None:
            pruned, choosing = select.places(len(self.blocks))
        dropping = select is not None and select.mode == "drop_after"
        image, everything = self.config.is_image(positions[0]), jnp.ones((b, m), bool)
        valid, computed = everything, []
        neurons: dict[int, Array] = {}
        keeps: dict[int, Array] = {}
        for i, block in enumerate(self.blocks):
            visible = self._visible(i, positions, positions, valid)
            x, layer = block(x, rope_tables(self.config.decoder, positions), visible)
            computed.append(((layer.k, layer.v), (positions, valid)))
            if select is not None and i in pruned:
                neurons[i] = choose_neurons(layer.a, valid, select)
            if select is not None and i in choosing:
                keeps[i] = choose_tokens(layer.a, image, select)
                if dropping:
                    x, (positions, valid) = drop_tokens(x, keeps[i], capacity)
        last = jnp.argmax(jnp.where(valid, positions, -1), axis=1)
        hidden = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        held_by_others = everything
        if dropping:  # what stays behind the chosen layer is what the caches before it hold too
            held_by_others = keeps[choosing.start]
            keeps |= dict.fromkeys(range(choosing.start), held_by_others)
        cache = []
        for i, (keys, places) in enumerate(computed):
            if i in keeps:
                keys, places = prune_keys(keys, keeps[i], capacity)
            cache.append(with_room(keys, places, first=m, room=room))
        logits = self.head(self.norm(hidden))
        held = jnp.stack([keeps.get(i, held_by_others) for i in range(len(cache))])
        return Prefilled(logits, tuple(cache), neurons, held)

    def compact(
        self, neurons: Mapping[int, Int[Array, "b n_core"]], sample: int = 0
    ) -> dict[int, dict[str, Float[Array, "n_core d"]]]:
        """The rows of the core neurons of one sample, gathered once for all that is decoded."""
        return {i: compact_ffn(self.blocks[i].ffn.params(), idx[sample])
                for i, idx in neurons.items()}  # fmt: skip

    def decode(
        self,
        tokens: Int[Array, "b t"],
        cache: tuple[LayerCache, ...],
        markers: Int[Array, "b t"] | None = None,
        *,
        core: Mapping[int, FFN] | None = None,
    ) -> tuple[Float[Array, "b t outputs"], tuple[LayerCache, ...]]:
        """Logits of text that follows a pruned prompt, and the cache after it.

        core: from `compact`, by layer; the others, and all by default, use every neuron. Neurons
            are those of one sample: several samples with their own are a `vmap` of this method.
        Raises ValueError if the cache has not enough room. An end that is traced cannot be
        compared: there, an overflow turns all the logits into NaN.
        """
        (b, t), first = tokens.shape, cache[0]
        room, end = first.k.shape[1], first.end + t
        require(
            len(cache) == len(self.blocks) and first.k.shape[0] == b,
            f"cache has {len(cache)} layers of {first.k.shape[0]} samples; needed are "
            f"{len(self.blocks)} of {b}.",
        )
        if is_concrete(end):
            require(int(end) <= room, f"cache has {room} places; tokens would fill {int(end)}.")
        queries = lax.dynamic_slice_in_dim(first.positions, first.end, t, axis=1)
        x, rope, after = self._text(tokens, markers), rope_tables(self.config.decoder, queries), []
        for i, (block, layer) in enumerate(zip(self.blocks, cache)):
            visible = self._visible(i, queries, layer.positions, layer.valid)
            x, layer = block.decode(x, rope, layer, visible, (core or {}).get(i))
            after.append(layer)
        x = jnp.where(end > room, jnp.nan, x)
        return self.head(self.norm(x)), tuple(after)

    def _text(self, tokens: Int[Array, "b t"], markers: Int[Array, "b t"] | None) -> Array:
        return self._marked(self.embed(tokens).astype(self.config.dtype), markers)

    def _marked(self, x: Array, markers: Array | None) -> Array:
        if markers is None:
            return x
        require(self.config.markers > 0, "markers is given; the model has none.")
        added = self.markers(jnp.maximum(markers, 0)).astype(x.dtype)
        return x + jnp.where((markers >= 0)[..., None], added, jnp.zeros_like(added))

    def _embedded(
        self, patches: Array, tokens: Array, markers: Array | None
    ) -> tuple[Array, Array]:
        """The sequence that the first block reads, and its positions `[b, m]`."""
        config, b = self.config, patches.shape[0]
        wanted = (config.vision_tokens, config.patch_inputs)
        least, most = config.prefix + 1, config.max_seq_len - config.vision_tokens
        require(
            patches.ndim == 3 and patches.shape[1:] == wanted,
            f"patches has the shape {patches.shape}; it must be [batch, {wanted[0]}, {wanted[1]}].",
        )
        require(
            tokens.ndim == 2 and tokens.shape[0] == b and least <= tokens.shape[1] <= most,
            f"tokens has the shape {tokens.shape}; it must be [{b}, length], with a length from "
            f"{least} to {most}.",
        )
        image = self.patch_embed(patches.astype(config.dtype))
        before, behind = jnp.split(self._text(tokens, None), [config.prefix], axis=1)
        x = jnp.concatenate([before, image, behind], axis=1)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return self._marked(x, markers), positions

    def _visible(
        self,
        layer: int,
        queries: Int[Array, "b t"],
        keys: Int[Array, "b s"],
        valid: Bool[Array, "b s"],
    ) -> Bool[Array, "b t s"]:
        asks, asked = self.config.is_image(queries)[..., None], self.config.is_image(keys)[:, None]
        seen = keys[:, None] <= queries[..., None]
        if self.config.image_attention == "full":
            seen = seen | (asks & asked)
        if layer < self.config.blind_layers:
            seen = seen & (asks | ~asked)
        return seen & valid[:, None]


VISION_LANGUAGE_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "patch_embed/kernel": ("patch", "embed"),
        "embed/embedding": ("vocab", "embed"),
        "markers/embedding": ("markers", "embed"),
        "head/kernel": ("embed", "classes"),
        "q_proj/kernel": ("embed", "heads"),
        "o_proj/kernel": ("heads", "embed"),
        **{f"{name}/kernel": ("embed", "kv") for name in ("k_proj", "v_proj")},
        **{f"ffn/{name}": ("mlp", "embed") for name in ("gate", "up", "down")},
        **{f"{name}/scale": ("embed",) for name in ("norm", "attention_norm", "ffn_norm")},
    }
)
"""What each axis of a parameter means, by the end of its path."""


def vision_language_param_specs(
    params: PyTree, rules: Rules = MappingProxyType({"heads": "model", "mlp": "model"})
) -> PyTree:
    """The PartitionSpec of every leaf of a `VisionLanguage`, or of a tree whose paths end alike.

    rules: logical axis to mesh axis or axes; what it does not name is replicated.

    Raises ValueError for an unknown logical axis or parameter.

    >>> from jax.sharding import PartitionSpec
    >>> specs = vision_language_param_specs({"ffn": {"gate": jnp.ones((8, 4))}})
    >>> specs["ffn"]["gate"] == PartitionSpec("model", None)
    True
    """
    return specs_of(params, rules, VISION_LANGUAGE_AXES, "VisionLanguage")
