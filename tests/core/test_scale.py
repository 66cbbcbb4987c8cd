"""A mask over a billion parameters: compiled for 8 devices, never run."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import sparsejax as sj
from sparsejax.models import Llama, llama_config, param_specs

RULES = {"vocab": "model", "heads": "model", "mlp": "model", "embed": "data"}


def test_a_global_mask_over_a_billion_weights_moves_nothing_of_their_size(mesh):
    config = llama_config("llama-3.2-1b")
    params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[1]
    scores = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32, sharding=NamedSharding(mesh, spec)
        ),
        params,
        param_specs(params, RULES),
    )
    chosen = set(sj.selected_paths(scores))
    size = sum(math.prod(leaf.shape) for path, leaf in sj.named_leaves(scores) if path in chosen)
    assert size == 973_078_528
    compiled = jax.jit(lambda tree: sj.masks_from_scores(tree, 0.1)).lower(scores).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    moved = [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"\[([\d,]*)\]\S* all-reduce", text)
    ]
    assert moved
    assert max(moved) < 10_000
    memory = compiled.memory_analysis()
    ours = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert ours <= 1.2 * size * np.dtype(np.float32).itemsize / mesh.size
