"""Small decoders with different layers, trained alike: byte models of Python's own modules.

The recipe of several papers' laptop experiments: learned positions, pre-RMSNorm, matrices of
variance 1 / inputs, AdamW with a cosine. The same settings reach the papers' sizes by flags.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from experiments.harness.config import ExperimentError, RunConfig, check_rates
from experiments.harness.data import (
    TextCorpus,
    TokenizedText,
    check_length,
    corpus_from_dataset,
    corpus_from_files,
    get_tokenizer,
    missing_dataset,
    tokenize,
    validation_windows,
    window_batches,
)
from experiments.harness.objective import (
    Objective,
    Training,
    adamw_cosine,
    compile_training,
    traced,
)
from experiments.harness.run import Run
from experiments.harness.sharding import host_batch, make_mesh
from experiments.harness.training import size_of, train
from sparsejax.models import Llama, LlamaConfig, param_specs

OWN_TEXT, OWN_SHARE = "stdlib", 0.95
Details = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DecoderConfig(RunConfig):
    """Settings of an experiment that trains decoders on text."""

    dataset: str = OWN_TEXT
    """`stdlib` (the source of Python's top-level modules), or a text dataset of TFDS by name."""
    text: tuple[str, ...] = ()
    """Your own .txt, .md, .py or .jsonl files, or folders of them, instead of a dataset."""
    d_model: int = 64
    """Width of the residual stream."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads; None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None: d_model / heads."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned position embeddings, or rotary ones."""
    batch: int = 16
    """Sequences in a batch, over all devices."""
    seq_len: int = 64
    """Tokens that a sequence predicts."""
    steps: int = 500
    """Training steps of every arm."""
    warmup: int = 50
    """Steps until the peak learning rate; a cosine falls to 0 from there."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Peak learning rates; every arm is shown at its best one."""
    weight_decay: float = 0.1
    """Of AdamW, on all parameters."""
    eval_windows: int = 512
    """Validation windows to measure on, the first ones; 0 takes all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; weights and optimiser are float32."""
    remat: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_model", "layers", "heads", "batch", "seq_len", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.warmup >= self.steps:
            raise ExperimentError(f"warmup is {self.warmup}; it must be below steps = {self.steps}")
        check_rates(self.learning_rates)
        if self.weight_decay < 0 or self.eval_windows < 0:
            raise ExperimentError(
                f"weight_decay is {self.weight_decay} and eval_windows {self.eval_windows}; "
                "neither may be negative"
            )

    def decoder(self, vocab_size: int, *, d_ff: int, **layers: Any) -> LlamaConfig:
        """The model with these feed-forward and attention layers.

        Raises ExperimentError for sizes that do not go together.
        """
        try:
            return LlamaConfig(
                vocab_size,
                self.d_model,
                self.layers,
                self.heads,
                d_ff,
                self.seq_len,
                n_kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                positions=self.positions,
                norm_eps=1e-6,
                remat=self.remat,
                dtype=self.dtype,
                **layers,
            )
        except ValueError as error:
            raise ExperimentError(str(error)) from error


class Penalty(NamedTuple):
    """A loss beside the cross-entropy.

    Attributes:
      init: state that it keeps between steps. apply: `(details, state) -> (loss, state, metrics)`,
        where details are those of `Llama.detailed`.
    """

    init: Any
    apply: Callable[[Details, Any], tuple[jax.Array, Any, dict[str, jax.Array]]]


class Arm(NamedTuple):
    """What is compared.

    Attributes:
      model: sizes and layers. penalty: in the loss, or None.
      observe: scalars of `Llama.detailed`'s details, for the logs and of the trained model.
    """

    model: LlamaConfig
    penalty: Penalty | None = None
    observe: Callable[[Details], dict[str, jax.Array]] = lambda details: {}


class Trained(NamedTuple):
    """A trained model and what was measured of it.

    Attributes:
      params: of `Llama(arm.model)`. test_loss: validation loss in nats a token.
      test, train: means of what the arm observes, over the validation windows and over the batches
        that would have come next.
      curves: of all that was logged, by name, with the steps under `step`.
    """

    params: Any
    test_loss: float
    test: dict[str, float]
    train: dict[str, float]
    curves: dict[str, list[float]]


def load_text(config: DecoderConfig) -> TokenizedText:
    """The bytes that a configuration asks for.

    Raises:
      ExperimentError, DatasetError: files or a dataset that cannot be used, or too little text.
    """
    if config.text:
        corpus = corpus_from_files(config.text)
    elif config.dataset == OWN_TEXT:
        corpus = _own_text()
    else:
        corpus = corpus_from_dataset(config.dataset)
    text = tokenize(corpus, get_tokenizer("bytes"))
    check_length(text, seq_len=config.seq_len, batch=config.batch)
    return text


def _own_text() -> TextCorpus:
    from experiments.harness.data.builders.python_text import source_files

    source = "".join(text for path, text in source_files() if "/" not in path)
    cut = int(OWN_SHARE * len(source))
    return TextCorpus((source[:cut],), (source[cut:],), OWN_TEXT)


def decoder_runner(
    run: Run, slug: str, config: DecoderConfig, text: TokenizedText, arms: Mapping[str, Arm]
) -> Callable[[str, float, int], Trained]:
    """Builds `train(arm, rate, seed)`, which compiles once an arm and resumes what was stopped."""
    mesh, batch = make_mesh(config.mesh), host_batch(config.batch)
    windows = validation_windows(text.validation, config.seq_len)
    windows = windows[: config.eval_windows or None]
    optimizer = functools.partial(_optimizer, config)

    @functools.cache
    def compiled(name: str) -> tuple[Training, Any]:
        training = compile_training(_objective(arms[name]), optimizer, mesh, specs=_specs)
        return training, _evaluation(arms[name])

    def run_one(name: str, rate: float, seed: int) -> Trained:
        training, evaluate = compiled(name)
        trial = f"{name}-lr{rate:g}-seed{seed}"
        draw = functools.partial(window_batches, text.train, seq_len=config.seq_len, seed=seed)
        batches = draw(batch=batch, shard=(jax.process_index(), jax.process_count()))
        state = train(
            run,
            trial,
            state=training.init(seed, rate),
            step=training.step,
            batches=batches,
            steps=config.steps,
            mesh=mesh,
            slug=slug,
        )
        params = state["params"]
        whole = draw(batch=config.batch)  # those of all hosts: each measures the same
        whole.set_state(batches.get_state())
        following = np.concatenate([next(whole) for _ in range(10)])
        test_loss, test = evaluate(params, windows)
        _, seen = evaluate(params, following)
        lines = run.metrics(trial)
        names = [k for k in (lines[0] if lines else {}) if k != "trial"]
        curves = {k: [line[k] for line in lines] for k in names}
        return Trained(params, test_loss, test, seen, curves)

    return run_one


def as_arm(found: Trained) -> dict[str, Any]:
    """What `kept_arm` stores of a training: `test_loss`, and by prefix what was observed."""
    test = {f"test_{name}": value for name, value in found.test.items()}
    seen = {f"train_{name}": value for name, value in found.train.items()}
    return {"test_loss": found.test_loss, **test, **seen, "curves": found.curves}


def _objective(arm: Arm) -> Objective:
    """An arm's cross-entropy and penalty; the penalty's state is what is remembered."""
    graph = _graph_of(arm)

    def loss(params: Any, memory: Any, windows: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        losses, details = _forward(graph, params, windows)
        found = {"loss": jnp.mean(losses), **arm.observe(details)}
        if arm.penalty is None:
            return found["loss"], (memory, found)
        extra, memory, more = arm.penalty.apply(details, memory)
        return found["loss"] + extra, (memory, found | more)

    memory = () if arm.penalty is None else arm.penalty.init
    return Objective(lambda key: (nnx.state(Llama(arm.model, rngs=nnx.Rngs(key))), memory), loss)


def _optimizer(config: DecoderConfig, peak: jax.Array) -> optax.GradientTransformation:
    return adamw_cosine(
        peak, warmup=config.warmup, steps=config.steps, weight_decay=config.weight_decay
    )


def _graph_of(arm: Arm) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Llama(arm.model, rngs=nnx.Rngs(0))))[0]


def _forward(graph: Any, params: Any, windows: jax.Array) -> tuple[jax.Array, Details]:
    """Losses of every prediction, and the details."""
    model = nnx.merge(graph, params)
    hidden, details = model.detailed(windows[:, :-1])
    logits = model.logits(hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]), details


def _specs(params: Any) -> dict[str, Any]:
    return dict(sj.named_leaves(param_specs(params)))


def _evaluation(arm: Arm) -> Callable[[Any, np.ndarray], tuple[float, dict[str, float]]]:
    """Mean loss and observed numbers; of windows beyond a whole batch the last are left out."""
    graph = _graph_of(arm)

    @jax.jit
    def measured(params: Any, windows: jax.Array) -> tuple[jax.Array, Any]:
        losses, details = _forward(graph, params, windows)
        return jnp.mean(losses), arm.observe(details)

    def evaluate(params: Any, windows: np.ndarray) -> tuple[float, dict[str, float]]:
        size = min(64, len(windows))
        parts = [windows[i : i + size] for i in range(0, len(windows) - size + 1, size)]
        found = [jax.device_get(measured(params, part)) for part in parts]
        names = found[0][1]
        loss = float(np.mean([loss for loss, _ in found]))
        return loss, {name: float(np.mean([seen[name] for _, seen in found])) for name in names}

    return evaluate


def check_decoder(config: DecoderConfig, arm: Arm) -> list[str]:
    """Builds an arm abstractly: its shapes, and one training step traced.

    Returns lines that say what was built.
    """
    windows = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    state, found = traced(_objective(arm), functools.partial(_optimizer, config), windows)
    size = size_of(state["params"])
    tokens = f"{config.batch} x {config.seq_len} tokens"
    return [f"{size:,} parameters; a step of {tokens} gives {', '.join(sorted(found))}"]


def check_arms(
    config: DecoderConfig, setting: str, arms: Mapping[str, Arm], *, dataset: str
) -> list[str]:
    """What `--preset paper` says: every arm is built abstractly, or nothing if the text is there.

    Args:
      setting: what is built, in words. arms: by what people call them.
      dataset: of the paper, which need not be there; another one must be.

    Raises:
      DatasetError: another dataset that is not there.
    """
    missing = missing_dataset(config.dataset, [dataset])
    if missing is None:
        return []
    built = [f"{name}: {line}" for name, arm in arms.items() for line in check_decoder(config, arm)]
    return [f"paper setting: {setting}", *built, f"checked abstractly: {missing}"]
