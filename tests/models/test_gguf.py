"""GGUF files: values, tokenizers, every message, and files that were damaged on purpose."""

import contextlib
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax.models import (
    CheckpointError,
    Llama,
    LlamaConfig,
    RopeScaling,
    gguf_tokenizer,
    load_gguf,
)
from sparsejax.models.gguf_file import GgufFile

CONFIG = LlamaConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, max_seq_len=64,
    rope_theta=5e4, tie_embeddings=True,
)  # fmt: skip
SHORT = {
    "attention/q_proj/kernel": "attn_q",
    "attention/k_proj/kernel": "attn_k",
    "attention/v_proj/kernel": "attn_v",
    "attention/o_proj/kernel": "attn_output",
    "ffn/gate_proj/kernel": "ffn_gate",
    "ffn/up_proj/kernel": "ffn_up",
    "ffn/down_proj/kernel": "ffn_down",
    "attention_norm/scale": "attn_norm",
    "ffn_norm/scale": "ffn_norm",
}
TOP = {"embed/embedding": "token_embd", "norm/scale": "output_norm", "head/kernel": "output"}
BYTES = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]  # the letters of byte-level BPE
MERGES = ["t h", "th e", "Ġ the", "Ġ a", "1 2"]
TOKENS = ["<|end|>", *BYTES, "th", "the", "Ġthe", "Ġa", "12"]
logits = nnx.jit(lambda model, tokens: model(tokens))


def random_model(config=CONFIG):
    return Llama(config, rngs=nnx.Rngs(3))


def pairs_from_halves(w, heads):
    """Rows in GGUF's rotary order; the inverse of what the loader does."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def tensors_of(model):
    """Tensors by GGUF name, `[out, in]`."""
    config, found = model.config, {}
    heads = {"attn_q": config.n_heads, "attn_k": config.kv_heads}
    for path, leaf in sj.named_leaves(nnx.state(model)):
        values = np.asarray(leaf)
        if path in TOP:
            found[f"{TOP[path]}.weight"] = values.T if path.endswith("kernel") else values
            continue
        short = SHORT[path.removeprefix("blocks/")]
        for i in range(config.n_layers):
            w = values[i].T if values.ndim == 3 else values[i]
            found[f"blk.{i}.{short}.weight"] = (
                pairs_from_halves(w, heads[short]) if short in heads else w
            )
    return found


def metadata_of(config):
    return {
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.d_model,
        "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_width,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.vocab_size": config.vocab_size,
    }


def tokenizer_of(pre="gpt-2"):
    padded = [*TOKENS, *(f"<unused{i}>" for i in range(CONFIG.vocab_size - len(TOKENS)))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": padded,
        "tokenizer.ggml.token_type": [3] + [1] * (len(padded) - 1),
        "tokenizer.ggml.merges": MERGES,
    }


def write(path, tensors, metadata, *, architecture="llama", kinds=None):
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        raw = np.ascontiguousarray(values, np.float32)
        raw = raw if kind == gguf.GGMLQuantizationType.F32 else gguf.quantize(raw, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, config=CONFIG, *, change=None, drop=(), **options):
    metadata = {**metadata_of(config), **tokenizer_of(), **(change or {})}
    metadata = {key: value for key, value in metadata.items() if key not in drop}
    return write(path, tensors_of(random_model(config)), metadata, **options)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf")


# values


def test_a_loaded_model_is_the_one_that_was_written(good):
    model = load_gguf(good)
    assert model.config == CONFIG.__class__(**{**vars(CONFIG), "head_dim": 8})
    for (path, ours), (_, theirs) in zip(
        sj.named_leaves(nnx.state(model)), sj.named_leaves(nnx.state(random_model()))
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


def test_an_untied_head_and_scaled_positions(tmp_path):
    scaling = RopeScaling("llama3", 8.0, original_max_seq_len=8192)
    config = LlamaConfig(
        **{**vars(CONFIG), "tie_embeddings": False, "rope_scaling": scaling, "head_dim": 8}
    )
    turns = 8192 * config.rope_theta ** -(np.arange(0, 8, 2) / 8) / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    tensors = tensors_of(random_model(config))
    tensors["rope_freqs.weight"] = 1 / (kept + (1 - kept) / 8)
    model = load_gguf(write(tmp_path / "m.gguf", tensors, metadata_of(config)))
    assert model.config == config
    np.testing.assert_array_equal(model.head.kernel[...], random_model(config).head.kernel[...])
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 4)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not LLaMA 3's scaling"):
        load_gguf(write(tmp_path / "odd.gguf", tensors, metadata_of(config)))
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    model = load_gguf(write_model(tmp_path / "linear.gguf", change=linear))
    assert model.config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_come_back_as_the_library_says(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    name = "blk.1.ffn_down.weight"
    path = write_model(tmp_path / "m.gguf", kinds={name: kind})
    want = gguf.dequantize(gguf.quantize(tensors_of(random_model())[name], kind), kind)
    np.testing.assert_array_equal(load_gguf(path).block(1).ffn.down_proj.kernel[...], want.T)
    np.testing.assert_allclose(want, tensors_of(random_model())[name], atol=0.1)


def test_dtypes_and_shards(good, mesh):
    narrow = load_gguf(good, param_dtype="bfloat16", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype("bfloat16")}
    spread = load_gguf(good, mesh=mesh)
    kernel = spread.blocks.ffn.up_proj.kernel[...]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, "model")
    tokens = jnp.arange(6)[None]
    np.testing.assert_allclose(logits(spread, tokens), logits(load_gguf(good), tokens), atol=1e-5)


# tokenizers


def test_the_byte_level_tokenizer(good):
    tokenizer = gguf_tokenizer(good)
    text = "the cat, äöü <|end|> in the 1234 house"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size
    assert {0, TOKENS.index("Ġthe"), TOKENS.index("12")} <= set(ids)
    assert tokenizer.from_str(tokenizer.to_str()).encode(text).ids == ids


@pytest.mark.parametrize(
    ("pre", "joined"), [("smollm", False), ("llama-bpe", True), ("qwen2", False), ("default", True)]
)
def test_how_digits_are_split(tmp_path, pre, joined):
    path = write(tmp_path / "m.gguf", {}, tokenizer_of(pre))
    assert (TOKENS.index("12") in gguf_tokenizer(path).encode("a 12").ids) == joined


def test_a_sentence_piece_tokenizer(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", "t", "h", "e", "th", "he", "the", "▁the", "▁t", "n"]
    data = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*pieces, *words],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.scores": [0.0] * 259
        + [-9.0, -8.0, -8.0, -8.0, -1.0, -5.0, -2.0, -3.0, -6.0, -8.0],
    }
    tokenizer = gguf_tokenizer(write(tmp_path / "m.gguf", {}, data))
    encoded = tokenizer.encode("the then ä")
    assert encoded.tokens == ["▁the", "▁the", "n", "▁", "<0xC3>", "<0xA4>"]
    assert tokenizer.decode(encoded.ids) == "the then ä"


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({}, ("tokenizer.ggml.tokens",), "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.model": "bert"}, (), "'gpt2' and 'llama' are known"),
        ({"tokenizer.ggml.pre": "viking"}, (), "known are default, gpt-2, smollm"),
        ({"tokenizer.ggml.merges": ["q z"]}, (), "joins tokens that it does not have"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, ("tokenizer.ggml.token_type",), "are the same"),
        ({"tokenizer.ggml.token_type": [1, 1]}, (), "300 tokens and 2 token types"),
        ({"tokenizer.ggml.tokens": [1, 2]}, (), "does not hold str values alone"),
    ],
)
def test_tokenizers_that_cannot_be(tmp_path, change, drop, message):
    data = {k: v for k, v in {**tokenizer_of(), **change}.items() if k not in drop}
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(write(tmp_path / "m.gguf", {}, data))


# what is refused


def test_all_problems_at_once(tmp_path):
    tensors = tensors_of(random_model())
    del tensors["blk.0.attn_k.weight"]
    tensors["blk.7.extra.weight"] = np.zeros((2, 2))
    tensors["output_norm.weight"] = np.ones(31)
    path = write(tmp_path / "m.gguf", tensors, metadata_of(CONFIG))
    with pytest.raises(CheckpointError) as caught:
        load_gguf(path)
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "tensor 'blk.0.attn_k.weight' is missing" in text
    assert "tensor 'blk.7.extra.weight' has no place" in text
    assert "'output_norm.weight' has shape (31,), the metadata say (32,)" in text


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({"llama.block_count": 2**30}, (), "llama.block_count is 1073741824, of 20 tensors in all"),
        ({"llama.block_count": 1}, (), "tensor 'blk.1.attn_k.weight' has no place"),
        ({}, ("llama.block_count",), "llama.block_count is missing"),
        ({"llama.embedding_length": 64}, (), "llama.rope.dimension_count is 8; only 16"),
        ({"llama.embedding_length": "32"}, (), "is '32'; it must be a positive integer"),
        ({"llama.attention.head_count": 3}, (), "llama.rope.dimension_count"),
        ({"llama.vocab_size": 299}, (), r"shape \(300, 32\), the metadata say \(299, 32\)"),
        ({"llama.rope.freq_base": -1.0}, (), "freq_base is -1.0; it must be a positive number"),
        ({"llama.rope.scaling.type": "yarn"}, (), "known are none and linear"),
        ({"llama.expert_count": 8}, (), "llama.expert_count is 8; that is not supported"),
    ],
)
def test_metadata_that_disagree_with_the_tensors(tmp_path, change, drop, message):
    with pytest.raises(CheckpointError, match=message):
        load_gguf(write_model(tmp_path / "m.gguf", change=change, drop=drop))


def test_another_architecture(tmp_path):
    path = write_model(tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(CheckpointError, match="architecture is 'mamba'; only 'llama' is known"):
        load_gguf(path)


def test_weights_that_are_not_finite(tmp_path):
    tensors = tensors_of(random_model())
    tensors["blk.1.ffn_up.weight"] = np.full_like(tensors["blk.1.ffn_up.weight"], np.nan)
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight' has values that are not"):
        load_gguf(write(tmp_path / "m.gguf", tensors, metadata_of(CONFIG)))


def test_files_that_are_none(tmp_path):
    for name, data, message in (
        ("empty", b"", "it is empty"),
        ("text", b"hello world, this is text", "does not begin with the mark GGUF"),
        ("old", b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1"),
        ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50331648"),
        ("counts", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "more than it can hold"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            GgufFile(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "missing")


def entry(key, kind, payload):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + payload


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (entry("a", 9, struct.pack("<IQ", 0, 2**62)), "it ends inside the value of 'a'"),
        (entry("a", 9, struct.pack("<IQ", 8, 2**62)), "claims 4611686018427387904 entries"),
        (entry("a", 9, struct.pack("<IQ", 9, 1)), "an array of arrays"),
        (entry("a", 8, struct.pack("<Q", 2**63)), "it ends inside the value of 'a'"),
        (entry("a", 13, b"0000"), "has the unknown type 13"),
        (entry("a", 7, b"\x07"), "is 7; a boolean is 0 or 1"),
        (entry("a", 8, struct.pack("<Q", 1) + b"\xff"), "is not UTF-8 text"),
    ],
)
def test_entries_that_lie(tmp_path, payload, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + payload + bytes(64))
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def tensor(name, shape, kind, offset):
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name.encode() + axes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([tensor("a", (2**40, 2**40), 0, 0)], "of a file of"),
        ([tensor("a", (8,), 0, 2**63)], "of a file of"),
        ([tensor("a", (8,), 0, 1)], r"alignment 32"),
        ([tensor("a", (8,), 99, 0)], "has the unknown type 99"),
        ([tensor("a", (33,), 3, 0)], "32 must divide its rows"),
        ([tensor("a", (0,), 0, 0)], r"has shape \(0,\)"),
        ([tensor("a", (1,) * 5, 0, 0)], "has 5 axes"),
        ([tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)], "stands in it twice"),
        ([tensor("a", (16,), 0, 0), tensor("b", (8,), 0, 32)], "'a' and 'b' overlap"),
    ],
)
def test_tensors_that_lie(tmp_path, infos, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(infos), 0) + b"".join(infos) + bytes(128))
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def mutate(data, rng, header):
    """A damaged copy; nine in ten changes fall into the header, where they can do harm."""
    data = bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    end = header if rng.random() < 0.9 else len(data)
    if kind == 1:
        at = int(rng.integers(end))
        return bytes(data[:at] + bytes(rng.integers(1, 40)) + data[at:])
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(end))
        if kind == 2:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", (0, 1, 2**31, 2**63, 2**64 - 1)[rng.integers(5)])
        else:
            data[at] = int(rng.integers(256))
    return bytes(data)


def test_mutated_files_are_refused_or_whole(good, tmp_path):
    data = good.read_bytes()
    header = min(t.start for t in GgufFile(good).tensors.values())
    like = {p: (x.shape, x.dtype) for p, x in sj.named_leaves(nnx.state(random_model()))}
    rng, path, refused = np.random.default_rng(0), tmp_path / "m.gguf", 0
    for _ in range(600):
        path.write_bytes(mutate(data, rng, header))
        try:
            model = load_gguf(path)
        except CheckpointError:
            refused += 1
        else:
            found = dict(sj.named_leaves(nnx.state(model)))
            assert {p: (x.shape, x.dtype) for p, x in found.items()} == like
            assert all(np.isfinite(leaf).all() for leaf in found.values())
        with contextlib.suppress(CheckpointError):
            gguf_tokenizer(path).encode("the 12")
    assert 300 < refused < 600  # some changes only touch a weight or a word of the tokenizer
