"""Our models against those of Hugging Face Transformers, in both directions."""

import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import core
from sparsejax.models import generate, load_hf, load_hf_gpt, save_hf

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch", reason="needs torch (extra compat)")
with warnings.catch_warnings():
    # Whatever its imports complain of is not ours.
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra compat)")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Neither token ends a text.
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama wide heads": ("LlamaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama dynamic": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "qwen": ("Qwen2Config", {}),
    "qwen tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral window": ("MistralConfig", {"sliding_window": 5}),
    "mistral window tied llama3": (
        "MistralConfig",
        {"sliding_window": 6, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "gpt2": ("GPT2Config", {"n_inner": 40}),
    "gpt2 usual width": ("GPT2Config", {}),
}
torch.set_num_threads(1)
IDS = np.random.default_rng(0).integers(0, 48, (2, 24))


def theirs(name, seed=0):
    """A model of Transformers with random values everywhere, norms and biases included."""
    kind, options = CASES[name]
    config = getattr(transformers, kind)(**{**SIZES, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3)
            if "norm" in path or "ln_" in path:
                parameter.add_(1.0)
    return model


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def our_logits(model, ids=IDS):
    return np.asarray(jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(ids, jnp.int32)))


def reload(folder, dtype="auto"):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype
    ).eval()


def check_greedy(model, reference, prompt=IDS[:, :8], new=8):
    ours = generate(model, jnp.asarray(prompt, jnp.int32), max_new_tokens=new)
    prompt = torch.tensor(prompt)
    with torch.no_grad():
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize("name", CASES)
def test_their_checkpoints(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path / "theirs")
    load = load_hf_gpt if name.startswith("gpt2") else load_hf
    model = load(tmp_path / "theirs")
    expected = torch_logits(reference)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)
    check_greedy(model, theirs(name))

    save_hf(tmp_path / "ours", model)
    again = reload(tmp_path / "ours")
    assert type(again) is type(reference) or name == "mistral"
    np.testing.assert_allclose(torch_logits(again), expected, atol=1e-6)


def test_settings_that_matter_here():
    """The windows and scalings of the cases change the logits of these 24 tokens."""
    plain = torch_logits(theirs("mistral"))
    assert np.abs(torch_logits(theirs("mistral window")) - plain).max() > 0.1
    for name in ("llama linear", "llama dynamic", "llama3"):
        reference = theirs(name)
        logits = torch_logits(reference)
        kind, options = CASES[name]
        config = {**SIZES, **options, "rope_parameters": {"rope_type": "default"}}
        config["rope_parameters"]["rope_theta"] = options["rope_parameters"]["rope_theta"]
        without = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**config)
        ).eval()
        without.load_state_dict(reference.state_dict())
        assert np.abs(torch_logits(without) - logits).max() > 0.1, name


def test_in_several_files_and_bfloat16(tmp_path):
    theirs("qwen tied").to(torch.bfloat16).save_pretrained(
        tmp_path / "theirs", max_shard_size="10KB"
    )
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    model = load_hf(tmp_path / "theirs", param_dtype="bfloat16")
    # Read anew: the model above rounded its rotary frequencies too.
    reference = reload(tmp_path / "theirs", torch.float32)
    expected = torch_logits(reference)
    np.testing.assert_allclose(our_logits(load_hf(tmp_path / "theirs")), expected, atol=1e-4)

    save_hf(tmp_path / "ours", model, shard_bytes=8000)
    again = reload(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for (path, old), (_, new) in zip(
        reference.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(old, new.float()), path


def test_pruned_weights(tmp_path):
    """A 2:4 model of ours is the same sparse model there."""
    theirs("llama").save_pretrained(tmp_path / "theirs")
    graph, params = nnx.split(load_hf(tmp_path / "theirs"))
    masks = core.make_masks(core.magnitude(params), pattern=core.NM(2, 4), where=r"_proj/kernel$")
    pruned = nnx.merge(graph, core.apply_masks(params, masks))
    save_hf(tmp_path / "ours", pruned)
    again = reload(tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again), our_logits(pruned), atol=1e-4)
    weight = again.model.layers[1].mlp.down_proj.weight
    assert (weight.reshape(32, 10, 4) != 0).sum(-1).eq(2).all()
    assert np.abs(our_logits(pruned) - our_logits(load_hf(tmp_path / "theirs"))).max() > 0.1
    check_greedy(pruned, again)


def test_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs("llama").save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    save_hf(tmp_path / "ours", model, tokenizer=tokenizer.to_str(), stop_token=3)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert loaded("b a c b")["input_ids"] == [2, 1, 0, 2]
    again = reload(tmp_path / "ours")
    assert again.generation_config.eos_token_id == 3
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["bos_token_id"] is None
