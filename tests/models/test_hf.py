"""Directories of Hugging Face: round trips, every refusal, and hundreds of damaged directories."""

import copy
import functools
import json
import math
import os
import random
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from sparsejax.core.selection import named_leaves
from sparsejax.models import (
    CheckpointError,
    Llama,
    LlamaConfig,
    RopeScaling,
    hf_config,
    hf_save,
    load_hf,
    param_specs,
    save_hf,
    to_hf_config,
)

LLAMA = LlamaConfig(
    vocab_size=40,
    d_model=32,
    n_layers=2,
    n_heads=4,
    d_ff=48,
    max_seq_len=64,
    n_kv_heads=2,
    head_dim=8,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_seq_len=16),
)
QWEN = LlamaConfig(
    vocab_size=40,
    d_model=32,
    n_layers=2,
    n_heads=4,
    d_ff=48,
    max_seq_len=64,
    n_kv_heads=2,
    head_dim=8,
    norm_eps=1e-6,
    rope_theta=1e6,
    tie_embeddings=True,
    qkv_bias=True,
)
MISTRAL = LlamaConfig(
    vocab_size=40,
    d_model=32,
    n_layers=2,
    n_heads=4,
    d_ff=48,
    max_seq_len=64,
    n_kv_heads=4,
    head_dim=16,
    sliding_window=5,
    rope_scaling=RopeScaling("linear", 2.0),
)
FAMILIES = {"llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL}
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [{"id": 2, "content": "<end>"}],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }
)


@functools.cache
def arrays(config, seed=0):
    """A model's graph and random values for all its parameters, norms and biases included."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    leaves = [
        rng.standard_normal(leaf.shape).astype(np.float32).astype(leaf.dtype) * leaf.dtype.type(0.3)
        for leaf in jax.tree.leaves(abstract)
    ]
    return graph, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def build(config, seed=0):
    graph, params = arrays(config, seed)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))


def leaves(model):
    return {path: np.asarray(leaf) for path, leaf in named_leaves(nnx.split(model)[1])}


def check_equal(model, expected):
    assert model.config == expected.config
    got, want = leaves(model), leaves(expected)
    assert set(got) == set(want)
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def split_file(data):
    """Header and data of the bytes of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def stored(folder):
    """The files of a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def store(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Directories by family; the Qwen2 one is in bfloat16 and in several files."""
    folder = tmp_path_factory.mktemp("written")
    save_hf(folder / "llama", build(LLAMA), tokenizer=TOKENIZER)
    low = build(LlamaConfig(**{**vars(QWEN), "param_dtype": "bfloat16"}))
    save_hf(folder / "qwen", low, shard_bytes=5000)
    save_hf(folder / "mistral", build(MISTRAL))
    return folder


# Round trips


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 6000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tied, shard_bytes, tmp_path):
    model = build(LlamaConfig(**{**vars(FAMILIES[family]), "tie_embeddings": tied}))
    save_hf(tmp_path / "model", model, shard_bytes=shard_bytes)
    check_equal(load_hf(tmp_path / "model"), model)
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    if shard_bytes > 6000:
        assert names == ["config.json", "model.safetensors"]
        return
    files = [name for name in names if name.endswith(".safetensors")]
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for name in files:
        header, data = split_file((tmp_path / "model" / name).read_bytes())
        assert len(data) <= 6000 or len(header) == 2
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves(model).values())


def test_dtypes(written, tmp_path):
    exact = leaves(build(QWEN))
    low = load_hf(written / "qwen", dtype="bfloat16", param_dtype="bfloat16")
    assert low.config.dtype == low.config.param_dtype == "bfloat16"
    wide = leaves(load_hf(written / "qwen"))
    for path, leaf in leaves(low).items():
        assert leaf.dtype == ml_dtypes.bfloat16
        assert wide[path].dtype == np.float32
        np.testing.assert_array_equal(leaf.astype(np.float32), wide[path])
        np.testing.assert_allclose(wide[path], exact[path], rtol=2**-7, atol=1e-3)
    # From float32, rounded as it is read.
    rounded = leaves(load_hf(written / "llama", param_dtype="bfloat16"))
    for path, leaf in leaves(build(LLAMA)).items():
        np.testing.assert_array_equal(rounded[path], leaf.astype(ml_dtypes.bfloat16))

    files = stored(written / "llama")
    header, data = split_file(files["model.safetensors"])
    for entry in header.values():
        if "dtype" in entry:
            entry["dtype"] = "F16"
            entry["data_offsets"] = [offset // 2 for offset in entry["data_offsets"]]
    half = np.frombuffer(data, np.float32).astype(np.float16)
    files["model.safetensors"] = joined(header, half.tobytes())
    halves = leaves(load_hf(store(tmp_path / "half", files)))
    for path, leaf in leaves(build(LLAMA)).items():
        np.testing.assert_array_equal(halves[path], leaf.astype(np.float16).astype(np.float32))


def test_the_library_of_the_format_reads_what_we_write(written):
    numpy_format = pytest.importorskip("safetensors.numpy")
    tensors = numpy_format.load_file(written / "llama" / "model.safetensors")
    model = leaves(build(LLAMA))
    np.testing.assert_array_equal(tensors["lm_head.weight"], model["head/kernel"].T)
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(tensors[name], model["blocks/attention/k_proj/kernel"][1].T)
    assert len(tensors) == 3 + 2 * 9


def test_onto_a_mesh(written, mesh):
    model = load_hf(written / "llama", mesh=mesh)
    check_equal(model, build(LLAMA))
    params = nnx.split(model)[1]
    for (path, leaf), (_, spec) in zip(named_leaves(params), named_leaves(param_specs(params))):
        assert leaf.sharding == NamedSharding(mesh, spec), path
    kernel = model.blocks.ffn.up_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32, 24)
    other = load_hf(written / "llama", mesh=mesh, rules={"embed": "data"})
    kernel = other.blocks.ffn.up_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 48)


def test_what_old_checkpoints_also_hold(written, tmp_path):
    """Rotary frequencies of every layer, and a tied head that is stored all the same."""
    files = stored(written / "mistral")
    header, data = split_file(files["model.safetensors"])
    config = json.loads(files["config.json"]) | {"tie_word_embeddings": True}
    files["config.json"] = json.dumps(config).encode()
    embedding, head = (
        header[n]["data_offsets"] for n in ("model.embed_tokens.weight", "lm_head.weight")
    )
    same = data[: head[0]] + data[slice(*embedding)] + data[head[1] :]
    frequencies = {"dtype": "F32", "shape": [8], "data_offsets": [len(data), len(data) + 32]}
    header["model.layers.1.self_attn.rotary_emb.inv_freq"] = frequencies
    files["model.safetensors"] = joined(header, same + b"\0" * 32)
    model = load_hf(store(tmp_path / "old", files))
    assert model.config.tie_embeddings
    np.testing.assert_array_equal(
        model.embed.embedding[...], leaves(build(MISTRAL))["embed/embedding"]
    )
    files["model.safetensors"] = joined(header, data + b"\0" * 32)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weig"
    ):
        load_hf(store(tmp_path / "other", files))


# Configurations


SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN_JSON = SMALL | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
MISTRAL_JSON = SMALL | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
BAND = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = RopeScaling("dynamic", 2.0, original_max_seq_len=2048)
BANDED = RopeScaling("llama3", 8.0, original_max_seq_len=16)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_seq_len": 2048, "norm_eps": 1e-6, "n_kv_heads": 4, "rope_theta": 10_000.0}),
        ({"rope_theta": 500}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_theta": 5e5, "rope_scaling": RopeScaling("linear", 4.0)},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_scaling": DYNAMIC, "max_seq_len": 4096},
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "original_max_position_embeddings": 16,
                    **BAND,
                }
            },
            {"rope_theta": 5e5, "rope_scaling": BANDED},
        ),
        (
            {
                "original_max_position_embeddings": 16,
                "rope_scaling": {"rope_type": "llama3", **BAND},
            },
            {"rope_scaling": BANDED},
        ),
        ({"hidden_act": "swish", "pretraining_tp": 2, "use_cache": True}, {}),
        ({"layer_types": ["full_attention"] * 2}, {"sliding_window": None}),
        (QWEN_JSON, {"qkv_bias": True, "sliding_window": None, "max_seq_len": 32768}),
        (QWEN_JSON | {"sliding_window": 8, "max_window_layers": 0}, {"sliding_window": None}),
        (
            QWEN_JSON | {"sliding_window": 8, "max_window_layers": 0, "use_sliding_window": True},
            {"sliding_window": 8},
        ),
        (QWEN_JSON | {"sliding_window": 8, "use_sliding_window": True}, {"sliding_window": None}),
        (MISTRAL_JSON, {"sliding_window": 4096, "qkv_bias": False, "max_seq_len": 131072}),
        (MISTRAL_JSON | {"sliding_window": None}, {"sliding_window": None}),
        (
            MISTRAL_JSON | {"sliding_window": 7, "head_dim": 16},
            {"sliding_window": 7, "head_dim": 16},
        ),
    ],
)
def test_configurations(given, expected):
    config = hf_config(SMALL | given)
    for name, value in expected.items():
        assert getattr(config, name) == value, name
    assert hf_config(to_hf_config(config)) == LlamaConfig(
        **{**vars(config), "head_dim": config.head_width}
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"sliding_window": 3, "qkv_bias": True},
        {"n_heads": 3, "n_kv_heads": 3, "head_dim": 6},
        {"n_kv_heads": 1, "rope_scaling": RopeScaling("dynamic", 4.0, original_max_seq_len=16)},
    ],
)
def test_configurations_back_and_forth(overrides):
    config = LlamaConfig(**{**vars(LLAMA), **overrides})
    assert hf_config(to_hf_config(config), dtype="bfloat16") == LlamaConfig(
        **{**vars(config), "dtype": "bfloat16"}
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, r"architectures is \['OPTForCausalLM'\]; allowed"),
        ({"architectures": None}, "architectures is None; allowed is one of LlamaForCausalLM, Q"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; LlamaForCausalLM has 'llama'"),
        ({"vocab_size": None}, "vocab_size is None; it must be an integer from 1 to"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be an integer from 1"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; it must divide hidden_size = 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_h"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648; it must be"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; a bias on o_proj is not supported"),
        ({"mlp_bias": True}, "mlp_bias is True; it is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; it is not sup"),
        ({"is_causal": False}, "is_causal is False; it is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it is not supported"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types is .* 2 times 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* it must be 2 times"),
        ({"rope_scaling": ["linear"]}, r"rope_scaling is \['linear'\]; it must be an object"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling: rope_type is 'yarn'; allowed are default, linear, dynamic, llama3",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_parameters: factor is None; it must be a number above 0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor is 0.5; it must be at least 1",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.0}},
            "rope_type 'linear' has no 'attention_factor'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **BAND, "high_freq_factor": 1.0}},
            "low_freq_factor is 1.0; it must be below high_freq_factor = 1.0",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 10000.0; another rope_theta contradicts it",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
            "rope_scaling is .* rope_parameters contradicts it",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 1e9}},
            "factor of rope_scaling makes 2048000000000 positions",
        ),
        (
            QWEN_JSON | {"use_sliding_window": True, "max_window_layers": 1},
            "max_window_layers is 1; layers of different kinds are not supported",
        ),
        (
            QWEN_JSON | {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1; it must be an integer that is not negative",
        ),
        (
            QWEN_JSON
            | {
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer_types is .* it must be 2 times",
        ),
        (MISTRAL_JSON | {"sliding_window": 0}, "sliding_window is 0; it must be an integer from 1"),
    ],
)
def test_refused_configurations(given, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_config(SMALL | given)
    assert len(caught.value.problems) == 1


def test_all_problems_of_a_configuration_at_once():
    with pytest.raises(CheckpointError, match="has 3 problems") as caught:
        hf_config(SMALL | {"vocab_size": "x", "mlp_bias": True, "hidden_act": "relu"})
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "vocab_size",
        "hidden_act",
        "mlp_bias",
    ]


# Damaged directories


def edited(name, change):
    """Changes the JSON of a file, whose new form `change` may also return."""

    def apply(files):
        value = json.loads(files[name])
        value = change(value) or value
        files[name] = value if isinstance(value, bytes) else json.dumps(value).encode()

    return apply


def configured(**entries):
    return edited("config.json", lambda config: config | entries)


def reheaded(change, name="model.safetensors"):
    """Changes the header of a file of weights."""

    def apply(files):
        header, data = split_file(files[name])
        header = change(header) or header
        files[name] = joined(header, data)

    return apply


def poked(value, position=-4):
    def apply(files):
        data = bytearray(files["model.safetensors"])
        data[position : position + 4 or None] = np.float32(value).tobytes()
        files["model.safetensors"] = bytes(data)

    return apply


def replaced(name, data):
    return lambda files: files.update({name: data})


def cut(count):
    return lambda files: files.update({"model.safetensors": files["model.safetensors"][:count]})


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
MORE = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


PROBLEMS = [
    ("llama", lambda files: files.pop("config.json"), "config.json is missing"),
    ("llama", replaced("config.json", b"{"), "config.json is no valid JSON"),
    ("llama", replaced("config.json", b"\xff\xfe"), "config.json is no valid JSON"),
    (
        "llama",
        replaced("config.json", b"[1]"),
        r"config.json holds \[1\]; it must be a JSON object",
    ),
    ("llama", replaced("config.json", NESTED), "config.json is nested too deeply"),
    ("llama", replaced("config.json", b" " * 2_000_000), "config.json has more than 1048576 bytes"),
    ("llama", replaced("config.json", b'{"a": 1, "a": 2}'), r"name twice in one object \('a'\)"),
    ("llama", replaced("config.json", b'{"a": NaN}'), "config.json holds NaN, which is no JSON"),
    ("llama", replaced("config.json", b"9" * 5000), "config.json is no valid JSON"),
    (
        "llama",
        configured(vocab_size=41),
        r"embed_tokens.weight has the shape \(40, 32\); .* \(41, 32",
    ),
    (
        "llama",
        configured(num_attention_heads=2),
        r"q_proj.weight has the shape .*makes it \(16, 32",
    ),
    ("llama", configured(num_hidden_layers=3), "asks for 3 layers; the files have 2"),
    ("llama", configured(num_hidden_layers=1), "asks for 1 layers; the files have 2"),
    ("llama", configured(num_hidden_layers=10**12), "asks for 1000000000000 layers; the files"),
    ("llama", configured(hidden_size=2**60), "config.json makes it .40, 1152921504606846976."),
    ("llama", configured(tie_word_embeddings=True), "lm_head.weight differs from model.embed"),
    (
        "mistral",
        configured(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        "6 tensors mis",
    ),
    ("qwen", configured(tie_word_embeddings=False), "1 tensor missing: 'lm_head.weight'"),
    ("llama", lambda files: files.pop("model.safetensors"), "model.safetensors is missing"),
    ("llama", cut(100), "model.safetensors has a header of .* bytes; 92 are possible"),
    ("llama", cut(-4), "model.safetensors has a tensor 'lm_head.weight' at bytes"),
    (
        "llama",
        reheaded(lambda h: h[NORM].update(dtype="I32")),
        "model.norm.weight is I32; allowed are",
    ),
    ("llama", reheaded(lambda h: h[NORM].update(shape=[8, 4])), r"shape \(8, 4\); .*it \(32,\)"),
    ("llama", reheaded(lambda h: h.update(more=MORE)), "1 tensor not of this model: 'more'"),
    ("llama", reheaded(lambda h: h.pop(NORM) and None), "leaves a gap before it"),
    ("llama", poked(math.nan), "lm_head.weight has values that are not finite in float32"),
    ("llama", poked(math.inf, -50_000), "not finite"),
    ("llama", replaced("tokenizer.json", b"{}"), "tokenizer.json has no vocabulary at model.vocab"),
    ("llama", replaced("tokenizer.json", b"nonsense"), "tokenizer.json is no valid JSON"),
    (
        "llama",
        edited("tokenizer.json", lambda t: t["model"]["vocab"].update(c=40)),
        "tokenizer.json has the id 40; vocab_size is 40",
    ),
    (
        "llama",
        edited("tokenizer.json", lambda t: t["model"].update(vocab=[["a", 0.0]] * 41)),
        "tokenizer.json has the id 40; vocab_size is 40",
    ),
    (
        "llama",
        edited("tokenizer.json", lambda t: t["added_tokens"].append({"id": "3"})),
        "tokenizer.json has ids that are no numbers of tokens: '3'",
    ),
    (
        "llama",
        edited("tokenizer.json", lambda t: t.update(added_tokens=[3])),
        "tokenizer.json has added_tokens that are no list of objects",
    ),
]
INDEX = "model.safetensors.index.json"


def moved(tensor, file):
    return edited(INDEX, lambda index: index["weight_map"].update({tensor: file}))


def last_file(files):
    return max(name for name in files if name.startswith("model-"))


PROBLEMS += [
    ("qwen", replaced(INDEX, b"{}"), "index.json has the weight_map None; it must map names"),
    ("qwen", replaced(INDEX, b'{"weight_map": 3}'), "has the weight_map 3; it must map"),
    ("qwen", moved(NORM, 3), "puts 'model.norm.weight' into 3, which is no file"),
    (
        "qwen",
        moved(NORM, "../model-00001.safetensors"),
        r"'\.\./model-00001.safetensors' is no plain",
    ),
    ("qwen", moved(NORM, "/etc/passwd"), "'/etc/passwd' is no plain file name"),
    ("qwen", moved(NORM, "sub/model.safetensors"), "'sub/model.safetensors' is no plain file name"),
    ("qwen", moved(NORM, ".."), "'..' is no plain file name"),
    ("qwen", moved(NORM, "nul\0.safetensors"), "is no plain file name"),
    ("qwen", moved(NORM, "other.safetensors"), "'other.safetensors' is missing"),
    ("qwen", moved("more", "model-00001-of-00005.safetensors"), "missing"),
    (
        "qwen",
        edited(INDEX, lambda i: i["weight_map"].pop(NORM) and None),
        "'model.norm.weight', agai",
    ),
    ("qwen", lambda files: files.pop(last_file(files)), "' is missing"),
    ("qwen", replaced("model.safetensors", b"{}"), "is there, and an index that does not name it"),
]


@pytest.mark.parametrize(("family", "change", "message"), PROBLEMS)
def test_damaged_directories(family, change, message, written, tmp_path):
    files = stored(written / family)
    change(files)
    with pytest.raises(CheckpointError, match=message):
        load_hf(store(tmp_path / "model", files))


def test_an_index_that_contradicts_its_files(written, tmp_path):
    files = stored(written / "qwen")
    index = json.loads(files[INDEX])
    first, last = (
        index["weight_map"][name] for name in (EMBED, "model.layers.1.mlp.up_proj.weight")
    )
    assert first != last
    moved(EMBED, last)(files)
    with pytest.raises(CheckpointError, match="against the index") as caught:
        load_hf(store(tmp_path / "model", files))
    assert any(f"{last} has no '{EMBED}'" in problem for problem in caught.value.problems)


def test_everything_wrong_is_told_at_once(written, tmp_path):
    files = stored(written / "llama")
    configured(hidden_act="relu")(files)
    cut(-4)(files)
    replaced("tokenizer.json", b"[")(files)
    folder = store(tmp_path / "model", files)
    with pytest.raises(CheckpointError) as caught:
        load_hf(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder} has ")
    assert "hidden_act is 'relu'" in message
    assert "lm_head.weight' at bytes" in message
    assert "tokenizer.json is no valid JSON" in message
    assert all(problem in message for problem in caught.value.problems)


def test_links_and_odd_files(written, tmp_path):
    folder = store(tmp_path / "model", stored(written / "llama"))
    elsewhere = shutil.copy(folder / "model.safetensors", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(
        CheckpointError, match="symbolic link that leaves the folder; copy the file"
    ):
        load_hf(folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(elsewhere, folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    check_equal(load_hf(folder), build(LLAMA))
    (tmp_path / "link").symlink_to(folder)
    check_equal(load_hf(tmp_path / "link"), build(LLAMA))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json is no regular file"):
        load_hf(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_hf(folder)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory; only local ones"):
        load_hf("meta-llama/Llama-2-7b-hf")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError, match=r"'pytorch_model.bin' may run code .* to safetensors"
    ):
        load_hf(tmp_path)


def test_too_large_for_bfloat16(written, tmp_path):
    files = stored(written / "llama")
    poked(3.4e38)(files)
    folder = store(tmp_path / "model", files)
    assert load_hf(folder).config.param_dtype == "float32"
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight has values that are not finite in bf"
    ):
        load_hf(folder, param_dtype="bfloat16")


# Mutations


ODD = [None, True, -1, 0, 3, 1.5, 2**31, 10**30, 1e300, "x", "", "F16", [], [4, 8], {}, [[]]]


def random_place(rng, value):
    """A container in `value` and one of its keys."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        child = value[key]
        if not (isinstance(child, dict | list) and child) or rng.random() < 0.3:
            return value, key
        value = child


def mutate_json(rng, text):
    try:
        value = json.loads(text)
    except ValueError:  # the second mutation of a file
        return text[: len(text) // 2]
    if not value:
        return b"{}"
    container, key = random_place(rng, value)
    action = rng.choice(["remove", "replace", "duplicate", "rename", "nest"])
    if action == "replace":
        container[key] = copy.deepcopy(rng.choice(ODD))
    elif action == "remove":
        del container[key]
    elif action == "nest":
        container[key] = [container[key]]
    elif isinstance(container, dict) and action == "rename":
        container[rng.choice([*container, f"{key}x"])] = container.pop(key)
    elif isinstance(container, dict):
        part = json.dumps({key: container[key]})[1:-1]
        return json.dumps(value).replace(part, f"{part}, {part}", 1).encode()
    else:
        container.append(container[key])
    return json.dumps(value).encode()


def mutate(rng, files):
    name = rng.choice(sorted(files))
    data = files[name] or b"{}"
    tensors = name.endswith(".safetensors")
    action = rng.choice(
        ["flip", "flip", "cut", "grow", "value", "header", "header", "json", "swap"]
    )
    if action == "cut":
        files[name] = data[: rng.randrange(len(data))]
    elif action == "grow":
        files[name] = data + bytes(rng.randrange(1, 9))
    elif action == "swap":
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], data
    elif action == "value" and tensors:
        value = np.float32(rng.choice([0.0, 1.0, math.nan, -math.inf, 3e38])).tobytes()
        start = len(data) - 4 * rng.randrange(1, 500)
        files[name] = data[:start] + value + data[start + 4 :]
    elif action in ("header", "json") and tensors:
        length = int.from_bytes(data[:8], "little")
        if rng.random() < 0.2:
            length = rng.choice([0, 1, length - 1, length + 8, 2**24, 2**63, 2**64 - 1])
            files[name] = length.to_bytes(8, "little") + data[8:]
        else:
            files[name] = joined(mutate_json(rng, data[8 : 8 + length]), data[8 + length :])
    elif action in ("header", "json", "value"):
        files[name] = mutate_json(rng, data)
    else:
        position = rng.randrange(len(data))
        flipped = data[position] ^ (1 << rng.randrange(8))
        files[name] = data[:position] + bytes([flipped]) + data[position + 1 :]


def test_mutated_directories(written, tmp_path):
    """Each of 700 directories is refused with a CheckpointError, or gives a whole finite model."""
    bases = [(stored(written / name), leaves(build(FAMILIES[name]))) for name in ("llama", "qwen")]
    del bases[0][0]["tokenizer_config.json"]  # which nobody reads
    rng = random.Random(0)
    loaded, reasons = 0, []
    for number in range(700):
        files, expected = bases[number % 2]
        files = dict(files)
        for _ in range(rng.choice([1, 1, 1, 2])):
            mutate(rng, files)
        folder = store(tmp_path / str(number), files)
        try:
            model = load_hf(folder)
        except CheckpointError as error:
            reasons += error.problems
        else:
            loaded += 1
            got = leaves(model)
            assert {k: v.shape for k, v in got.items()} == {
                k: v.shape for k, v in expected.items()
            }, number
            assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in got.values()), number
        shutil.rmtree(folder)
    assert 100 < loaded < 500
    kinds = (
        "valid JSON",
        "must be",
        "header",
        "shape",
        "missing",
        "finite",
        "gap",
        "twice",
        "index",
    )
    assert all(any(kind in reason for reason in reasons) for kind in kinds)


# Saving


def test_overwriting(tmp_path):
    target = tmp_path / "deep" / "model"
    save_hf(target, build(LLAMA))
    with pytest.raises(ValueError, match="which is not empty; overwrite=True replaces it"):
        save_hf(target, build(QWEN))
    check_equal(load_hf(target), build(LLAMA))
    (target / "leftover.txt").write_text("old")
    save_hf(target, build(QWEN), overwrite=True)
    check_equal(load_hf(target), build(QWEN))
    assert {file.name for file in target.iterdir()} == {"config.json", "model.safetensors"}
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", build(QWEN))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"no config.json; only a model's directory is replaced"):
        save_hf(tmp_path / "mine", build(QWEN), overwrite=True)
    with pytest.raises(ValueError, match="which is a file"):
        save_hf(tmp_path / "mine" / "thesis.tex", build(QWEN), overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"deep", "empty", "mine"}


@pytest.mark.parametrize("moment", ["weights", "rename"])
def test_a_failed_save_leaves_what_was_there(moment, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_hf(target, build(LLAMA))
    if moment == "rename":
        rename = hf_save.Path.rename

        def fail(self, other):
            if other == target and self.name.count("-") and (self / "config.json").exists():
                monkeypatch.setattr(hf_save.Path, "rename", rename)
                raise OSError("disk full")
            return rename(self, other)

        monkeypatch.setattr(hf_save.Path, "rename", fail)
        with pytest.raises(OSError, match="disk full"):
            save_hf(target, build(QWEN), overwrite=True)
    else:
        model = build(QWEN)
        kernel = model.blocks.ffn.down_proj.kernel
        kernel[...] = kernel[...].at[1, 2, 3].set(jnp.nan)
        with pytest.raises(
            ValueError, match=r"ffn/down_proj/kernel has values that are not finite"
        ):
            save_hf(target, model, overwrite=True)
    check_equal(load_hf(target), build(LLAMA))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_tokenizers_and_tokens(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    path = tmp_path / "tokenizer.json"
    for number, given in enumerate((TOKENIZER, path, str(path))):
        folder = tmp_path / str(number)
        save_hf(folder, build(LLAMA), tokenizer=given, start_token=0, stop_token=2)
        assert (folder / "tokenizer.json").read_text() == TOKENIZER
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (0, 2)
        assert config["torch_dtype"] == "float32"
        check_equal(load_hf(folder), build(LLAMA))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "{"}, "tokenizer is no valid JSON"),
        ({"tokenizer": "missing.json"}, "tokenizer is 'missing.json'; there is no such file"),
        ({"tokenizer": '{"model": {"vocab": {"a": 40}}}'}, "has the id 40; vocab_size is 40"),
        ({"stop_token": 40}, "stop_token is 40; it must be from 0 to 39"),
        ({"start_token": -1}, "start_token is -1; it must be from 0 to 39"),
        ({"shard_bytes": 0}, "shard_bytes is 0; it must be positive"),
    ],
)
def test_save_errors(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_hf(tmp_path / "model", build(LLAMA), **options)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_saved(tmp_path):
    graph, params = arrays(LLAMA)
    half = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), params))
    with pytest.raises(ValueError, match=r"is float16; allowed are float32 and bfloat16"):
        save_hf(tmp_path / "model", half)
    model = build(LLAMA)
    model.head.kernel.set_value(jnp.zeros((32, 41)))
    with pytest.raises(
        ValueError, match=r"head/kernel has the shape \(32, 41\); the config makes it"
    ):
        save_hf(tmp_path / "model", model)
    model = build(LLAMA)
    del model.head
    with pytest.raises(ValueError, match=r"other parameters than its config says: 'head/kernel'"):
        save_hf(tmp_path / "model", model)
