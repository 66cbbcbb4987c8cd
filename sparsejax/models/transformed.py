"""A decoder whose residual stream is rotated so that k and gate have orthogonal rows (WINA).

It computes what the model does that it was made from; what inputs are worth dropping is seen better
in it. See `sparsejax.activations.column_orthogonal_transform`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.models.blocks import matrix_dot_general
from sparsejax.models.decoding import KVCache
from sparsejax.models.llama import DecoderBlock, Llama
from sparsejax.models.llama_config import LlamaConfig, require
from sparsejax.models.llama_layers import Rope, rope_tables

_LAYERS = {
    **{name: f"attention/{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"ffn/{name}_proj" for name in ("gate", "up", "down")},
}
_NORMS = {"norm1": "attention_norm", "norm2": "ffn_norm"}
_SHORTCUTS = {"attn": "attention_shortcut", "mlp": "ffn_shortcut"}


class TransformedBlock(DecoderBlock):
    """A block whose residual stream changes its basis with every sum.

    Beside the parameters of a `DecoderBlock`: `attention_shortcut [d, d]` and `ffn_shortcut
    [d, d]`, which multiply the residual stream. They cost `2 d^2` multiply-adds a token.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention_shortcut = nnx.Param(jnp.eye(config.d_model, dtype=config.param_dtype))
        self.ffn_shortcut = nnx.Param(jnp.eye(config.d_model, dtype=config.param_dtype))

    def detailed(
        self, x: Float[Array, "b t d"], rope: Rope | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """As `DecoderBlock.detailed`."""
        if rope is None:
            rope = rope_tables(self.config, jnp.arange(x.shape[1])[None])
        attended, found = self.attention.detailed(self.attention_norm(x), rope)
        x = _moved(x, self.attention_shortcut) + attended
        fed, more = self.ffn.detailed(self.ffn_norm(x))
        return _moved(x, self.ffn_shortcut) + fed, {**found, **more}

    def decode(
        self, x: Float[Array, "b t d"], rope: Rope, cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """As `DecoderBlock.decode`."""
        attended, cache = self.attention.decode(self.attention_norm(x), rope, cache, layer)
        x = _moved(x, self.attention_shortcut) + attended
        return _moved(x, self.ffn_shortcut) + self.ffn.decode(self.ffn_norm(x)), cache


class TransformedLlama(Llama):
    """A `Llama` of `TransformedBlock`s, called and decoded as it is; made by `transform_llama`.

    Its head is its own: the rotations at both ends differ, so that tied embeddings become two.
    Shortcuts of a fresh one are identities.

    Raises ValueError for tied embeddings.

    >>> from sparsejax.models import llama_config
    >>> model = TransformedLlama(llama_config("laptop"), rngs=nnx.Rngs(0))
    >>> model.blocks.ffn_shortcut.shape
    (2, 96, 96)
    """

    block_type = TransformedBlock

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        require(
            not config.tie_embeddings,
            "tie_embeddings is True; a transformed model has a head of its own.",
        )
        super().__init__(config, rngs=rngs)


def transform_llama(model: Llama) -> TransformedLlama:
    """The same model in the bases in which k and gate of every layer have orthogonal rows.

    The weights of its norms are folded into the kernels. Logits are equal up to rounding. On the
    host in float64, so not under `jit`: room for 8 bytes a parameter is needed; not differentiated.

    Args:
      model: with stacked blocks, so transform first and `unroll` then. Not changed.

    Raises:
      ValueError: a model whose sparse layers, positions or separate blocks this is not for.

    Source: WINA (2025, arXiv 2505.19427), section on the tensor transformation.

    >>> from sparsejax.models import llama_config
    >>> model = Llama(llama_config("laptop"), rngs=nnx.Rngs(0))
    >>> tokens = jnp.arange(8)[None]
    >>> bool(jnp.allclose(transform_llama(model)(tokens), model(tokens), atol=1e-4))
    True
    """
    from sparsejax.activations import column_orthogonal_transform  # imports Pallas: takes long

    config = model.config
    needed = {"ffn": "gated", "attention": "dense", "positions": "rope", "sparsity_pattern": None}
    for name, value in needed.items():
        given = getattr(config, name)
        require(given == value, f"{name} is {given!r}; a model is transformed with {value!r} only.")
    require(
        not isinstance(model.blocks, nnx.List),
        "model has separate blocks; transform it before it is unrolled.",
    )
    rotated, shortcuts = column_orthogonal_transform(_as_params(model))
    layers = rotated["layers"]
    arrays = {
        "embed/embedding": rotated["embed"],
        "head/kernel": rotated["head"],
        "norm/scale": rotated["final_norm"],
        **{
            f"blocks/{path}": jnp.stack([layer[name] for layer in layers])
            for name, path in _paths(layers[0]).items()
        },
        **{
            f"blocks/{path}": jnp.stack([pair[name] for pair in shortcuts])
            for name, path in _SHORTCUTS.items()
        },
    }
    untied = dataclasses.replace(config, tie_embeddings=False)
    abstract = nnx.eval_shape(lambda: TransformedLlama(untied, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    filled = [
        (path, variable.replace(arrays["/".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _as_params(model: Llama) -> dict[str, Any]:
    """The parameters as `column_orthogonal_transform` takes them."""
    embedding = model.embed.embedding[...]
    stacked = {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model.blocks))
    }
    names = {path: name for name, path in _paths(stacked).items()}
    layers = [
        {names[path]: array[i] for path, array in stacked.items()}
        for i in range(model.config.n_layers)
    ]
    head = embedding.T if model.config.tie_embeddings else model.head.kernel[...]
    final = model.norm.scale[...]
    return {"embed": embedding, "head": head, "final_norm": final, "layers": layers}


def _paths(present: Any) -> dict[str, str]:
    """The path in a block of every part of a layer, by its name; of biases those that are there."""
    paths = {name: f"{path}/kernel" for name, path in _LAYERS.items()}
    paths |= {name: f"{path}/scale" for name, path in _NORMS.items()}
    biases = {f"{name}_bias": f"{path}/bias" for name, path in _LAYERS.items()}
    return paths | {n: p for n, p in biases.items() if n in present or p in present}


def _moved(x: Float[Array, "b t d"], shortcut: nnx.Param) -> Float[Array, "b t d"]:
    """The residual stream in its next basis."""
    return matrix_dot_general(x, shortcut[...].astype(x.dtype))
