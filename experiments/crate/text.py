"""Text: CRATE and transformers of its width, or of its size, predict bytes or fill them in."""

import bisect
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from experiments.crate.config import DATASET, SLUG, TextConfig
from experiments.crate.figures import make_card
from experiments.harness.arms import (
    Found,
    arms_table,
    as_metrics,
    best_rate,
    mean,
    print_table,
    run_arms,
)
from experiments.harness.config import Claim, ExperimentError, Result
from experiments.harness.data import (
    TokenizedText,
    missing_dataset,
    validation_windows,
    window_batches,
)
from experiments.harness.decoder_arms import load_text
from experiments.harness.objective import (
    Objective,
    adamw_cosine,
    compile_training,
    traced,
)
from experiments.harness.plots import draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.rows import over_batches
from experiments.harness.run import Run
from experiments.harness.sharding import host_batch, make_mesh
from experiments.harness.training import size_of, train
from sparsejax.models import CrateLM, CrateTextConfig, Gpt, GptConfig
from sparsejax.models.encoder import Encoder, embedding
from sparsejax.models.encoder_config import EncoderConfig

BYTES = 256
MASK = BYTES  # the token that hides a byte
GAP = 0.52  # nats from causal CRATE-Base to GPT2-Base, of equal width, on OpenWebText
Build = Callable[[PRNGKeyArray], nnx.Module]


class EncoderLM(Encoder):
    """A transformer that sees all tokens and says what each was; the head is tied."""

    def __init__(self, config: EncoderConfig, *, vocab_size: int, max_seq_len: int, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.embed = embedding(config, vocab_size, rngs=rngs)
        self.positions = embedding(config, max_seq_len, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits over the vocabulary, float32."""
        table = self.embed.embedding[...]
        x = table[tokens] + self.positions.embedding[...][: tokens.shape[1]]
        x = self.encode(x.astype(self.config.dtype))
        return jnp.matmul(x, table.astype(x.dtype).T, preferred_element_type=jnp.float32)


def arms_of(config: TextConfig) -> dict[str, Build]:
    """Key -> model, by name: CRATE, CRATE-alpha, and a transformer as wide and one as large."""
    arms: dict[str, Build] = {"crate": functools.partial(crate_model, config)}
    if config.alpha_width:
        arms["crate_alpha"] = functools.partial(crate_model, config, alpha=True)
    arms["wide"] = functools.partial(transformer, config, config.d_model)
    target = parameters_of(arms["crate"])
    widths = range(config.heads, config.d_model + 1, config.heads)
    of_width = lambda width: functools.partial(transformer, config, width)  # noqa: E731
    fitting = bisect.bisect_right(widths, target, key=lambda w: parameters_of(of_width(w)))
    if fitting:
        arms["small"] = of_width(widths[fitting - 1])
    return arms


def crate_model(config: TextConfig, key: PRNGKeyArray, *, alpha: bool = False) -> CrateLM:
    """CRATE, or with a wide dictionary, a residual and a matrix of its own CRATE-alpha."""
    causal = config.objective == "causal"
    wide = config.alpha_width * config.d_model if alpha else None
    try:
        sizes = CrateTextConfig(
            d_model=config.d_model,
            n_layers=config.layers,
            n_heads=config.heads,
            vocab_size=vocabulary(config),
            max_seq_len=config.seq_len,
            causal=causal,
            lam=config.lam,
            dictionary_width=wide,
            dictionary_residual=alpha,
            dictionary_separate=alpha,
            remat=config.remat,
            dtype=config.dtype,
        )
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    return CrateLM(sizes, rngs=nnx.Rngs(key))


def transformer(config: TextConfig, width: int, key: PRNGKeyArray) -> nnx.Module:
    """A GPT, or where all tokens are seen an encoder, of this width."""
    sizes = {"d_model": width, "n_layers": config.layers, "n_heads": config.heads}
    more = {"remat": config.remat, "dtype": config.dtype}
    rngs, vocab = nnx.Rngs(key), vocabulary(config)
    if config.objective == "causal":
        gpt = GptConfig(vocab_size=vocab, max_seq_len=config.seq_len, **sizes, **more)
        return Gpt(gpt, rngs=rngs)
    encoder = EncoderConfig(**sizes, **more)
    return EncoderLM(encoder, vocab_size=vocab, max_seq_len=config.seq_len, rngs=rngs)


def vocabulary(config: TextConfig) -> int:
    """The bytes, and what hides them."""
    return BYTES if config.objective == "causal" else BYTES + 1


def parameters_of(build: Build) -> int:
    """How many numbers a model is."""
    model = nnx.eval_shape(lambda: build(jax.random.key(0)))
    return size_of(nnx.state(model))


def labels_of(config: TextConfig, arms: Mapping[str, Build]) -> dict[str, str]:
    """The arms for people."""
    name = "GPT" if config.objective == "causal" else "transformer"
    labels = {"crate": "CRATE", "crate_alpha": "CRATE-alpha", "wide": f"{name}, equal width",
              "small": f"{name}, equal parameters"}  # fmt: skip
    return {arm: labels[arm] for arm in arms}


def posed(
    config: TextConfig, windows: Int[Array, "b t+1"], key: PRNGKeyArray
) -> tuple[Int[Array, "b t"], Int[Array, "b t"], Bool[Array, "b t"]]:
    """What a model reads, what it shall say, and where that counts."""
    seen = windows[:, :-1]
    if config.objective == "causal":
        return seen, windows[:, 1:], jnp.ones_like(seen, bool)
    hidden = jax.random.bernoulli(key, config.masked, seen.shape)
    return jnp.where(hidden, MASK, seen), seen, hidden


def window_losses(
    config: TextConfig, graph: Any, params: PyTree, windows: Array, key: PRNGKeyArray
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """Nats that each window costs in all, and the bytes that were predicted."""
    tokens, targets, counted = posed(config, windows, key)
    logits = nnx.merge(graph, params)(tokens)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.where(counted, nats, 0), axis=1), jnp.sum(counted, axis=1)


def objective(config: TextConfig, build: Build) -> Objective:
    """Mean nats of a predicted byte."""
    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]

    def loss(params: PyTree, memory: Any, batch: Any, key: PRNGKeyArray) -> tuple[Array, Any]:
        nats, count = window_losses(config, graph, params, batch, key)
        return jnp.sum(nats) / jnp.maximum(jnp.sum(count), 1), (memory, {})

    return Objective(lambda key: (nnx.state(build(key)), ()), loss)


def optimizer(config: TextConfig, peak: Array) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine to 0."""
    return adamw_cosine(
        peak,
        warmup=config.warmup,
        steps=config.steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def trainer(
    run: Run, config: TextConfig, text: TokenizedText, arms: Mapping[str, Build]
) -> Callable[[str, float, int], dict[str, Any]]:
    """Builds `train(arm, rate, seed)`, which compiles once an arm."""
    mesh, windows = make_mesh(config.mesh), validation_windows(text.validation, config.seq_len)
    windows = windows[: config.eval_windows or None]
    batch = host_batch(config.batch)
    shard = (jax.process_index(), jax.process_count())
    # masks of the validation windows are the same for every arm and seed
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), len(windows))))

    @functools.cache
    def compiled(arm: str) -> tuple[Any, Any]:
        goal = objective(config, arms[arm])
        graph = nnx.split(nnx.eval_shape(lambda: arms[arm](jax.random.key(0))))[0]

        def measure(params: PyTree, windows: Array, keys: Array) -> tuple[Array, Array]:
            one = lambda window, key: window_losses(  # noqa: E731
                config, graph, params, window[None], jax.random.wrap_key_data(key)
            )
            return jax.vmap(one)(windows, keys)

        return compile_training(goal, functools.partial(optimizer, config), mesh), jax.jit(measure)

    def run_arm(arm: str, rate: float, seed: int) -> dict[str, Any]:
        training, measure = compiled(arm)
        trial = f"{arm}-lr{rate:g}-seed{seed}"
        batches = window_batches(text.train, seq_len=config.seq_len, batch=batch, seed=seed,
                                 shard=shard)  # fmt: skip
        state = train(run, trial, state=training.init(seed, rate), step=training.step,
                      batches=batches, steps=config.steps, mesh=mesh, slug=SLUG)  # fmt: skip
        nats, count = over_batches(functools.partial(measure, state["params"]), windows, keys,
                                   size=64)  # fmt: skip
        lines = run.metrics(trial)
        return {
            "test_loss": float(nats.sum() / count.sum()),
            "parameters": parameters_of(arms[arm]),
            "curve": [[line["step"], line["loss"]] for line in lines],
        }

    return run_arm


def unigram_loss(text: TokenizedText) -> float:
    """Nats of a validation byte by the frequencies of the training bytes, each seen once more."""
    counts = np.bincount(text.train, minlength=BYTES) + 1.0
    return float(-np.log(counts / counts.sum())[text.validation].mean())


def run_text(config: TextConfig, run: Run) -> Result:
    """Trains every arm at every learning rate and compares nats per byte."""
    text, arms = load_text(config), arms_of(config)
    labels, unigram = labels_of(config, arms), unigram_loss(text)
    train = trainer(run, config, text, arms)
    found = run_arms(run, SLUG, config, train, list(arms), config.learning_rates)
    task = "next byte" if config.objective == "causal" else f"{config.masked:.0%} masked bytes"
    table = arms_table(
        f"{task} of {text.name}, {config.steps} steps, {config.seeds} seed(s); byte frequencies "
        f"alone: {unigram:.3f} nats",
        found,
        labels,
        {
            "parameters": ("parameters", lambda n: f"{n:,.0f}"),
            "test_loss": ("nats per byte", 3),
        },
    )
    print_table(run, table)
    if run.is_main:
        draw(config, run, found, labels, task)
    budget = (
        f"{config.steps} steps for every arm, each at its best of {len(config.learning_rates)} "
        "learning rates"
    )
    metrics = {"arms": as_metrics(found, curves=("curve",)), "unigram": unigram}
    claims = make_claims(config, found, unigram)
    return Result(claims, make_card(config, budget), metrics, (table,))


def check_text(config: TextConfig) -> list[str]:
    """Traces a training step of every arm; nothing if the text is there.

    Raises DatasetError for a dataset that is not the paper's and not there.
    """
    missing = missing_dataset(config.dataset, [DATASET])
    if missing is None:
        return []
    arms = arms_of(config)
    windows = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    built = []
    for arm, label in labels_of(config, arms).items():
        goal = objective(config, arms[arm])
        state, _ = traced(goal, functools.partial(optimizer, config), windows)
        built.append(f"{label}: {size_of(state['params']):,} parameters, one training step traced")
    setting = (
        f"paper setting: {config.preset}, {config.layers} blocks of width {config.d_model}, "
        f"{config.steps:,} steps of {config.batch} x {config.seq_len} bytes of {config.dataset}"
    )
    return [setting, *built, f"checked abstractly: {missing}"]


def make_claims(config: TextConfig, found: Found, unigram: float) -> tuple[Claim, ...]:
    """CRATE against the transformer of its width, byte frequencies, and what else was trained."""
    best = {arm: best_rate(by_rate)[1] for arm, by_rate in found.items()}
    losses = {arm: metrics["test_loss"] for arm, metrics in best.items()}
    shown = {arm: f"{mean_and_deviation(values)} nats" for arm, values in losses.items()}
    crate = mean(losses["crate"])
    share = mean(best["crate"]["parameters"]) / mean(best["wide"]["parameters"])
    name = "GPT" if config.objective == "causal" else "transformer encoder"
    claims = [
        Claim(
            f"with {share:.2f} of the parameters of a {name} of equal width CRATE is at most "
            f"{GAP} nats per byte behind it, the paper's distance per token of its causal models",
            crate <= mean(losses["wide"]) + GAP,
            shown["crate"],
            shown["wide"],
            config.seeds,
        ),
        Claim(
            "CRATE predicts bytes better than their frequencies, by more than half a nat",
            crate < unigram - 0.5,
            shown["crate"],
            f"{unigram:.3f} nats",
            config.seeds,
        ),
    ]
    if "small" in losses:
        claims.append(
            Claim(
                f"at equal parameters the {name} is ahead of CRATE (as 3.04 of GPT2-Small of 3.37 "
                "in the paper)",
                mean(losses["small"]) < crate,
                shown["crate"],
                shown["small"],
                config.seeds,
            )
        )
    if "crate_alpha" in losses:
        claims.append(
            Claim(
                "a wide dictionary with a residual (CRATE-alpha) predicts better than CRATE (3.14 "
                "against 3.37 in the paper)",
                mean(losses["crate_alpha"]) < crate,
                shown["crate_alpha"],
                shown["crate"],
                config.seeds,
            )
        )
    return tuple(claims)


def draw(config: TextConfig, run: Run, found: Found, labels: Mapping[str, str], task: str) -> None:
    """Training losses of every arm at its best rate."""
    figure, axes = new_figure(
        f"{task}, {config.seeds} seed(s)", "training step", "nats per byte, of a batch"
    )
    curves = {}
    for arm, by_rate in found.items():
        pairs = [np.asarray(curve).T for curve in best_rate(by_rate)[1]["curve"]]
        curves[labels[arm]] = [(steps, losses) for steps, losses in pairs]
    draw_curves(axes, curves)
    axes.legend(frameon=False)
    save(figure, run.folder / "losses.png")
