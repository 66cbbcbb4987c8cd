"""Pruning a whole model: the chain of blocks, a folder to continue from, meshes, damage."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights
from sparsejax.models import Llama, llama_config, param_specs
from sparsejax.weights.compact_file import load_compact, save_compact

CONFIG = llama_config("laptop", vocab_size=32, d_model=8, n_heads=2, n_kv_heads=1, d_ff=16,
                      n_layers=3, max_seq_len=16)  # fmt: skip
SPARSEGPT = weights.PruneMethod("sparsegpt", pattern=sj.NM(2, 4), block=8)
WANDA = weights.PruneMethod("wanda", pattern=sj.NM(2, 4))
LAYERS = 7


def model(**changes):
    return Llama(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def tokens(count=8):
    return jax.random.randint(jax.random.key(1), (count, 12), 0, 32)


def same_bits(one, two):
    for (path, a), b in zip(sj.named_leaves(nnx.state(one)), jax.tree.leaves(nnx.state(two))):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def same_masks(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole():
    """A model pruned in one go: the model, masks, reports, and what `on_layer` heard."""
    pruned, heard = model(), []
    masks, reports = weights.prune_model(
        pruned, tokens(), method=SPARSEGPT, chunk=4, on_layer=lambda *args: heard.append(args)
    )
    return pruned, masks, reports, heard


class StopError(Exception):
    """Stands for a kill."""


def stop_in(block, layer):
    """Raises at a layer of a block."""
    heard = []

    def on_layer(number, path, error):
        heard.append(path)
        if number == block and len(heard) % LAYERS == layer:
            raise StopError

    return on_layer


def test_is_the_chain_of_blocks(whole):
    pruned, masks, reports, heard = whole
    other = model()
    blocks = [other.block(i) for i in range(3)]
    wanted, errors = weights.prune_sequential(
        blocks, other.embedded(tokens()), method=SPARSEGPT, chunk=4
    )
    same_masks(masks, wanted)
    assert reports == errors
    assert heard == [(i, path, e) for i, part in enumerate(errors) for path, e in part.items()]
    for i, block in enumerate(blocks):
        same_bits(pruned.block(i), block)
        for (path, kept), w in zip(sj.named_leaves(masks[i]), jax.tree.leaves(nnx.state(block))):
            assert np.ndim(kept) == 0 or not np.asarray(w)[~np.asarray(kept)].any(), path
    assert sj.count_masks(masks[2]).density == 0.5
    np.testing.assert_array_equal(pruned.embed.embedding[...], model().embed.embedding[...])


def test_a_killed_run_continues_to_the_same_bits(whole, tmp_path):
    wanted, masks, reports, _ = whole
    options = {"method": SPARSEGPT, "chunk": 4, "folder": tmp_path}
    for block, layer in ((0, 3), (1, 0)):
        broken = model()
        with pytest.raises(StopError):
            weights.prune_model(broken, tokens(), **options, on_layer=stop_in(block, layer))
    assert len(list(tmp_path.iterdir())) == 2
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # the model that was being pruned, and a dense one from its checkpoint
    for start in (broken, model()):
        heard = []
        found, errors = weights.prune_model(
            start, tokens(), **options, on_layer=lambda *args, heard=heard: heard.append(args)
        )
        same_bits(start, wanted)
        same_masks(found, masks)
        assert errors == reports
        assert len(heard) == 3 * LAYERS
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.read_bytes() == data for path, data in before.items())  # not written again


def test_a_folder_of_something_else_is_refused(tmp_path):
    options = {"method": WANDA, "chunk": 4, "folder": tmp_path}
    weights.prune_model(model(), tokens(), **options)
    for changes, message in (
        ({"method": dataclasses.replace(WANDA, name="magnitude")}, "written with another method"),
        ({"method": dataclasses.replace(WANDA, pattern=sj.NM(1, 4))}, "another method: .*'n': 2"),
        ({"chunk": 8}, "written with another calibration"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.prune_model(model(), tokens(), **(options | changes))
    with pytest.raises(
        ValueError, match=r"written with another calibration: .*give another folder"
    ):
        weights.prune_model(model(), tokens().at[0, 0].add(1) % 32, **options)
    other = model()
    other.embed.embedding[...] = other.embed.embedding[...] * 2
    with pytest.raises(ValueError, match="written with another embeddings"):
        weights.prune_model(other, tokens(), **options)
    other = model()
    block = other.block(1)
    block.ffn.up_proj.kernel[...] = block.ffn.up_proj.kernel[...] * 2
    other.set_block(1, block)
    with pytest.raises(ValueError, match=r"block_0001.* is of a model with other weights"):
        weights.prune_model(other, tokens(), **options)


def test_a_damaged_file_is_named(tmp_path):
    options = {"method": WANDA, "chunk": 4, "folder": tmp_path}
    weights.prune_model(model(), tokens(), **options)
    path = tmp_path / "block_0001.safetensors"
    whole = path.read_bytes()
    message = "block_0001.safetensors is damaged .*: delete it and the block is pruned anew"

    def refused():
        with pytest.raises(ValueError, match=message):
            weights.prune_model(model(), tokens(), **options)

    for data in (b"", whole[:-100], whole[:500], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(data)
        refused()
    path.write_bytes(whole)
    sound = load_compact(path)

    def rewrite(**changes):
        tree = sound | changes
        save_compact(path, tree, sj.dense_masks(tree))
        refused()

    name = "ffn/up_proj/kernel"
    rewrite(**{f"weights/{name}": sound[f"weights/{name}"] * 2})
    rewrite(**{f"weights/{name}": sound[f"weights/{name}"][1:]})
    rewrite(**{f"masks/{name}": sound[f"masks/{name}"][1:]})
    for text in (b"{}", b"[]", b"\xff", b'{"weights": 3, "errors": {}}', b'{"weights": ["", ""]'):
        rewrite(settings=jnp.asarray(np.frombuffer(text, np.uint8)))
    path.unlink()
    weights.prune_model(model(), tokens(), **options)
    assert path.read_bytes() == whole


def test_narrow_models_stay_narrow(tmp_path):
    narrow = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    options = {"method": SPARSEGPT, "chunk": 4, "folder": tmp_path}
    one, two = model(**narrow), model(**narrow)
    with pytest.raises(StopError):
        weights.prune_model(one, tokens(), **options, on_layer=stop_in(0, 0))
    masks, reports = weights.prune_model(one, tokens(), **options)
    again, _ = weights.prune_model(two, tokens(), **options)
    same_bits(one, two)
    same_masks(masks, again)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(one))} == {jnp.dtype(jnp.bfloat16)}
    assert all(0 < error < 1 for report in reports for error in report.values())
    kept = masks[0]["ffn"]["down_proj"]["kernel"][...]
    np.testing.assert_array_equal(kept.reshape(4, 4, 8).sum(1), np.full((4, 8), 2))


@pytest.mark.parametrize("layout", ["plain", "sharded"])
def test_a_mesh_gives_the_masks_of_one_device(whole, mesh, layout):
    wanted, masks, reports, _ = whole
    spread = model()
    if layout == "sharded":
        state = nnx.state(spread)
        specs = jax.tree.leaves(param_specs(state), is_leaf=lambda s: isinstance(s, PartitionSpec))
        laid = [
            jax.device_put(w, NamedSharding(mesh, spec))
            for w, spec in zip(jax.tree.leaves(state), specs, strict=True)
        ]
        nnx.update(spread, jax.tree.unflatten(jax.tree.structure(state), laid))
    before = {path: w.sharding for path, w in sj.named_leaves(nnx.state(spread))}
    found, errors = weights.prune_model(spread, tokens(), method=SPARSEGPT, chunk=8, mesh=mesh)
    same_masks(found, masks)
    for one, two in zip(errors, reports):
        assert one == pytest.approx(two, rel=1e-3)
    for (path, a), b in zip(
        sj.named_leaves(nnx.state(spread)), jax.tree.leaves(nnx.state(wanted)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert a.sharding.is_equivalent_to(before[path], a.ndim), path


def test_errors(unchecked, mesh):
    for given, options, message in (
        (tokens()[:0], {}, "tokens has shape (0, 12): there are no calibration samples"),
        (tokens(), {"chunk": 0}, "chunk is 0; it must be at least 1"),
        (tokens(), {"skip": "mlp"}, "skip is 'mlp' and the method wanda: DSnoT alone skips"),
        (tokens(), {"chunk": 3, "mesh": mesh}, "a chunk has 3 sequences, which the 4 devices"),
        (tokens(6), {"chunk": 4, "mesh": mesh}, "a chunk has 2 sequences, which the 4 devices"),
        (tokens(), {"mesh": jax.make_mesh((8,), ("model",))}, "mesh has axes model; it needs one"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            weights.prune_model(model(), given, method=WANDA, **options)
    broken = model()
    block = broken.block(1)
    block.attention_norm.scale[...] = block.attention_norm.scale[...] * jnp.nan
    broken.set_block(1, block)
    with pytest.raises(ValueError, match=r"block 1: the inputs of 'attention/.*' are not finite"):
        weights.prune_model(broken, tokens(), method=WANDA)


def test_writing_a_block_leaves_the_others():
    changed, before = model(), model()
    block = changed.block(1)
    nnx.update(block, jax.tree.map(lambda w: w + 1, nnx.state(block)))
    changed.set_block(1, block)
    for i in range(3):
        same_bits(changed.block(i), block if i == 1 else before.block(i))
