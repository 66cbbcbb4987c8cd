"""Every way of training N:M sparsity on one model: the time of a step, and the loss it ends with.

`python -m experiments.benchmarks.nm_training` trains the laptop LLaMA from scratch on real text by
each method at 2:4 and at 1:8, with the same batches and the same AdamW or its sparse counterpart,
measures the loss on held-out text with the pruned weights, and times single steps in turns.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from experiments.benchmarks.suite import Group, run_suite, small_llama
from experiments.harness.data import (
    TokenizedText,
    corpus_from_dataset,
    get_tokenizer,
    tokenize,
    validation_windows,
    window_batches,
)
from experiments.harness.language import cross_entropy, rate_shape
from experiments.harness.timing import Goal
from sparsejax import weights
from sparsejax.models import Llama, LlamaConfig, llama_config, parameter_count
from sparsejax.weights import ProgressiveConfig, progressive_view

PROJECTIONS = r"_proj/kernel$"
GOAL = Goal(1.4)
BDWP_DECAY, MASK_PERIOD = 2e-4, 10
SRSTE_DECAYS, L1_DECAYS = (2e-4, 2e-3), (2e-4, 1e-3, 5e-3)
EPOCHS = 20  # the recipes' clock: a twentieth of training
Pruned = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
      model, batch, seq_len: the LLaMA that is trained, and its batch.
      steps, rates: of a training, and the peak learning rates of which each method takes its best,
        as it does of the pulls of SR-STE and CAST.
      eval_windows: held-out windows that the loss is measured on.
      patterns: n and m. rounds: measurements of each step.
      min_seconds: what one measurement lasts at least.
    """

    model: LlamaConfig = llama_config("laptop")  # noqa: RUF009 (frozen)
    batch: int = 16
    seq_len: int = 64
    steps: int = 600
    rates: tuple[float, ...] = (1e-2, 3e-3)
    eval_windows: int = 256
    patterns: tuple[tuple[int, int], ...] = ((2, 4), (1, 8))
    rounds: int = 21
    min_seconds: float = 0.05


PRESETS = {
    "laptop": Config(),
    "test": Config(
        model=llama_config("laptop", d_model=16, n_layers=1, d_ff=32),
        batch=2,
        seq_len=8,
        steps=20,
        rates=(3e-3,),
        eval_windows=4,
        patterns=((2, 4),),
        rounds=2,
        min_seconds=1e-4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
      view: trainable parameters, step, pull -> the parameters of the forward pass.
      finish: trainable parameters -> the sparse ones.
      transform: schedule, pull -> optimiser.
      pulls: of the pruned weights towards zero, to choose from.
      start: parameters -> trainable parameters.
      graph: of a model whose layers multiply in another way; None for the plain one.
    """

    view: Callable[[Any, Any, Any], Any] = lambda trained, step, pull: trained
    finish: Pruned = lambda trained: trained
    transform: Callable[[Any, Any], optax.GradientTransformation] = lambda rate, pull: optax.adamw(
        rate
    )
    pulls: tuple[float, ...] = (0.0,)
    start: Callable[[Any], Any] = lambda params: params
    graph: Any = None


def build_methods(config: Config, n: int, m: int) -> Mapping[str, Method]:
    """The methods at n:m, by name."""
    pattern = sj.NM(n, m)

    def prune(params: Any) -> Any:
        return sj.prune(params, pattern=pattern, where=PROJECTIONS)[0]

    per_epoch = max(1, config.steps // EPOCHS)

    def progressive(recipe: Any) -> Method:
        settings = ProgressiveConfig(recipe, n, m, epochs=EPOCHS, steps_per_epoch=per_epoch)
        view = progressive_view(settings, where=PROJECTIONS)
        return Method(lambda p, step, pull: view(p, step), prune)

    def cast(rate: Any, pull: Any) -> optax.GradientTransformation:
        return weights.adams(
            rate,
            total_steps=config.steps,
            l1_decay=pull,
            mask_period=MASK_PERIOD,
            pattern=pattern,
            where=rf"^weights/.*{PROJECTIONS}",
        )

    return {
        "dense": Method(),
        "STE": Method(lambda p, step, pull: sj.ste(p, pattern, where=PROJECTIONS), prune),
        "SR-STE": Method(
            lambda p, step, pull: sj.sr_ste(p, pattern, decay=pull, where=PROJECTIONS),
            prune,
            pulls=SRSTE_DECAYS,
        ),
        "mask decay": progressive("mdgf_exp"),
        "structure decay": progressive("sdgf_stepwise"),
        "BDWP": Method(finish=prune, graph=_bdwp_graph(config.model, pattern)),
        "CAST": Method(
            lambda trained, step, pull: weights.scale_params(trained["weights"], trained["scales"]),
            lambda trained: weights.finish(
                trained["weights"], trained["scales"], pattern=pattern, where=PROJECTIONS
            )[0],
            cast,
            L1_DECAYS,
            lambda params: {
                "weights": params,
                "scales": weights.init_scales(params, where=PROJECTIONS),
            },
        ),
    }


@functools.cache
def _bdwp_graph(config: LlamaConfig, pattern: sj.NM) -> Any:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    sparse = weights.bdwp_model(model, pattern, decay=BDWP_DECAY, where=PROJECTIONS)
    return nnx.split(sparse)[0]


@dataclasses.dataclass(frozen=True)
class Training:
    """A method compiled once, for its timing and for its training at every rate.

    Attributes:
      init: parameters -> carry.
      step: carry, windows, number of the step, peak rate, pull -> carry.
      finish: carry -> sparse parameters. pulls: see `Method`.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any, Any, Any], Any]
    finish: Pruned
    pulls: tuple[float, ...]


@functools.cache
def trainings(config: Config) -> dict[str, Training]:
    """Every method at every pattern, by its row."""
    shape, plain = rate_shape(config.steps), small_llama(config.model)[0]

    def training(method: Method) -> Training:
        graph = method.graph or plain

        def optimizer(rate: Any, pull: Any) -> optax.GradientTransformation:
            return method.transform(lambda count: rate * shape(count), pull)

        def init(params: Any) -> Any:
            trained = method.start(jax.tree.map(jnp.copy, params))  # the step takes its carry over
            return trained, optimizer(0.0, 0.0).init(trained)

        def step(carry: Any, windows: jax.Array, count: Any, rate: Any, pull: Any) -> Any:
            trained, state = carry

            def loss(trained: Any) -> jax.Array:
                logits = nnx.merge(graph, method.view(trained, count, pull))(windows[:, :-1])
                return cross_entropy(logits, windows[:, 1:])

            tx = optimizer(rate, pull)
            updates, state = tx.update(jax.grad(loss)(trained), state, trained)
            return optax.apply_updates(trained, updates), state

        compiled = jax.jit(step, donate_argnums=0)
        finish = jax.jit(lambda carry: method.finish(carry[0]))
        return Training(jax.jit(init), compiled, finish, method.pulls)

    return {
        label(name, n, m): training(method)
        for n, m in config.patterns
        for name, method in build_methods(config, n, m).items()
    }


def step_groups(config: Config) -> Iterator[Group]:
    """Single steps of every method, in the sparsest stage of the recipes."""
    params, windows = small_llama(config.model)[1], jnp.asarray(training_windows(config)[0])
    last, rate = jnp.int32(config.steps - 1), jnp.float32(1e-3)

    def stepping(training: Training) -> Callable[[], Any]:
        carry, pull = training.init(params), jnp.float32(training.pulls[0])

        def call() -> Any:
            nonlocal carry
            carry = training.step(carry, windows, last, rate, pull)
            return carry

        return call

    for n, m in config.patterns:
        functions = {
            row: stepping(training)
            for row, training in trainings(config).items()
            if row.startswith(label("", n, m))
        }
        baseline = label("dense", n, m)
        goals = {name: GOAL for name in functions if name != baseline}
        yield Group(functions, baseline, config.rounds, goals)


def label(method: str, n: int, m: int) -> str:
    """The row of a method."""
    return f"{n}:{m}, {method}"


@functools.cache
def load_text() -> TokenizedText:
    """The project's text, by characters."""
    return tokenize(corpus_from_dataset("python_text"), get_tokenizer("ascii"))


def training_windows(config: Config) -> list[np.ndarray]:
    """The batches that every method sees, in order."""
    batches = window_batches(load_text().train, seq_len=config.seq_len, batch=config.batch, seed=0)
    return [next(batches) for _ in range(config.steps)]


def final_losses(config: Config) -> dict[str, dict[str, str]]:
    """Loss on held-out text after training, of the pruned weights, at each method's best rate."""
    held = validation_windows(load_text().validation, config.seq_len)[: config.eval_windows]
    held, seen = jnp.asarray(held), training_windows(config)
    graph, params = small_llama(config.model)

    @jax.jit
    def evaluate(sparse: Any) -> jax.Array:
        return cross_entropy(nnx.merge(graph, sparse)(held[:, :-1]), held[:, 1:])

    def train(training: Training, rate: float, pull: float) -> float:
        carry, tuned = training.init(params), (jnp.float32(rate), jnp.float32(pull))
        for count, windows in enumerate(seen):
            carry = training.step(carry, windows, jnp.int32(count), *tuned)
        return float(evaluate(training.finish(carry)))

    found = {}
    for row, training in trainings(config).items():
        choices = itertools.product(config.rates, training.pulls)
        losses = {choice: train(training, *choice) for choice in choices}
        rate, pull = min(losses, key=lambda choice: losses[choice])
        best = f"{rate:g}" + (f", {pull:g}" if len(training.pulls) > 1 else "")
        found[row] = {"held-out loss": f"{losses[rate, pull]:.3f}", "best rate, pull": best}
    return found


def sizes(config: Config) -> str:
    """What is measured."""
    return (
        f"a LLaMA with {parameter_count(config.model):,} parameters, {config.steps} steps of "
        f"{config.batch} x {config.seq_len} tokens from scratch; nats a character after pruning"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/nm_training.json`."""
    run_suite("nm_training", __doc__, PRESETS, (step_groups,), sizes, arguments,
              columns=final_losses)  # fmt: skip


if __name__ == "__main__":
    main()
