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
from jax.sharding import Mesh

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
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh, state_shardings
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
    mesh = make_mesh(config.mesh)
    if config.batch % jax.process_count():
        raise ExperimentError(
            f"batch is {config.batch}; {jax.process_count()} processes must divide it"
        )
    windows = validation_windows(text.validation, config.seq_len)
    windows = windows[: config.eval_windows or None]
    trainers = {name: _Trainer(config, arm, mesh) for name, arm in arms.items()}
    hosts = (jax.process_index(), jax.process_count())

    def run_one(name: str, rate: float, seed: int) -> Trained:
        trainer, trial = trainers[name], f"{name}-lr{rate:g}-seed{seed}"
        draw = functools.partial(window_batches, text.train, seq_len=config.seq_len, seed=seed)
        batches = draw(batch=config.batch // hosts[1], shard=hosts)
        state = train(
            run,
            trial,
            state=trainer.init(seed, rate),
            step=trainer.step,
            batches=batches,
            steps=config.steps,
            mesh=mesh,
            slug=slug,
        )
        params = state["params"]
        whole = draw(batch=config.batch)  # those of all hosts: each measures the same
        whole.set_state(batches.get_state())
        following = np.concatenate([next(whole) for _ in range(10)])
        test_loss, test = trainer.evaluate(params, windows)
        _, seen = trainer.evaluate(params, following)
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


class _Trainer:
    """Compiled functions of an arm, shared by its seeds and learning rates."""

    def __init__(self, config: DecoderConfig, arm: Arm, mesh: Mesh | None):
        self._arm, self._config = arm, config
        self._graph = nnx.split(nnx.eval_shape(lambda: Llama(arm.model, rngs=nnx.Rngs(0))))[0]
        layout = None
        if mesh is not None:
            state = jax.eval_shape(self._initial, jax.random.key(0), 0.0)
            specs = dict(sj.named_leaves(param_specs(state["params"])))
            layout = state_shardings(state, specs, mesh)
        self._init = jax.jit(self._initial, out_shardings=layout)
        outputs = None if layout is None else (layout, None)
        self.step = jax.jit(self._step, out_shardings=outputs, donate_argnums=0)
        self._evaluate = jax.jit(self._measured)

    def init(self, seed: int, rate: float) -> Any:
        """The state before training."""
        return self._init(jax.random.key(seed), jnp.float32(rate))

    def _initial(self, key: jax.Array, rate: Any) -> Any:
        params = nnx.state(Llama(self._arm.model, rngs=nnx.Rngs(key)))
        state = {"params": params, "opt": self._optimizer(rate).init(params)}
        state["rate"] = jnp.asarray(rate, jnp.float32)
        state["penalty"] = () if self._arm.penalty is None else self._arm.penalty.init
        return state

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        config = self._config
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.warmup, config.steps)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                lambda count: rate * shape(count), b1=0.9, b2=0.95, weight_decay=config.weight_decay
            ),
        )

    def _forward(self, params: Any, windows: jax.Array) -> tuple[jax.Array, Details]:
        """Losses of every prediction, and the details."""
        model = nnx.merge(self._graph, params)
        hidden, details = model.detailed(windows[:, :-1])
        logits = model.logits(hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses, details

    def _step(self, state: Any, windows: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        arm = self._arm

        def loss(params: Any) -> tuple[jax.Array, Any]:
            losses, details = self._forward(params, windows)
            found, kept = {"loss": jnp.mean(losses), **arm.observe(details)}, state["penalty"]
            total = found["loss"]
            if arm.penalty is not None:
                extra, kept, more = arm.penalty.apply(details, kept)
                total, found = total + extra, {**found, **more}
            return total, (kept, found)

        (_, (kept, found)), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        optimizer = self._optimizer(state["rate"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {**state, "params": params, "opt": opt, "penalty": kept}, found

    def _measured(self, params: Any, windows: jax.Array) -> tuple[jax.Array, Any]:
        losses, details = self._forward(params, windows)
        return jnp.mean(losses), self._arm.observe(details)

    def evaluate(self, params: Any, windows: np.ndarray) -> tuple[float, dict[str, float]]:
        """Mean loss and observed numbers; of windows beyond a whole batch the last are left out."""
        size = min(64, len(windows))
        parts = [windows[i : i + size] for i in range(0, len(windows) - size + 1, size)]
        found = [jax.device_get(self._evaluate(params, part)) for part in parts]
        names = found[0][1]
        loss = float(np.mean([loss for loss, _ in found]))
        return loss, {name: float(np.mean([seen[name] for _, seen in found])) for name in names}


def check_decoder(config: DecoderConfig, arm: Arm) -> list[str]:
    """Builds an arm abstractly: its shapes, and one training step traced.

    Returns lines that say what was built.
    """
    trainer = _Trainer(config, arm, None)
    state = jax.eval_shape(trainer.init, 0, 0.1)
    windows = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    after, found = jax.eval_shape(trainer.step, state, windows)
    assert jax.tree.structure(after) == jax.tree.structure(state)
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
