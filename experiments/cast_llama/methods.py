"""The methods that CAST is compared with, as answers to the same few questions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from experiments.cast_llama.config import HELD, PROJECTIONS, Config
from experiments.harness.language import cross_entropy, rate_shape
from sparsejax import weights


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train sparse: all answers that differ between the methods.

    Attributes:
      start: parameters, masks, PRNG key -> trainable tree.
      transform: learning-rate schedule, starting masks -> optax transform.
      view: training state, dense parameters -> parameters of the forward pass.
      finish: training state, dense parameters -> sparse parameters and their masks.
      eta, temperature: of the distillation; eta 0 needs no teacher.
      begin: one-shot method whose parameters and masks it starts from; None starts dense.
    """

    start: Callable[[Any, Any, jax.Array], Any]
    transform: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    view: Callable[[Any, Any], Any]
    finish: Callable[[Any, Any], tuple[Any, Any]]
    eta: float = 0.0
    temperature: float = 1.0
    begin: str | None = None


def build_methods(config: Config) -> Mapping[str, Method]:
    """The trained methods under these settings."""
    where = rf"^weights/.*{PROJECTIONS}"

    def only_weights(params: Any, masks: Any, key: jax.Array) -> Any:
        return {"weights": params}

    def weights_of(state: Any, dense: Any) -> Any:
        return state["trainable"]["weights"]

    def with_scales(params: Any, masks: Any, key: jax.Array) -> Any:
        scales = weights.init_scales(params, groups=config.scale_groups, where=PROJECTIONS)
        return {"weights": params, "scales": scales}

    def prune_to_pattern(state: Any, dense: Any) -> tuple[Any, Any]:
        trainable = state["trainable"]
        scales = trainable.get("scales")
        return weights.finish(trainable["weights"], scales, pattern=config.nm, where=PROJECTIONS)

    def keep_masks(state: Any, dense: Any) -> tuple[Any, Any]:
        masks = sj.get_masks(state["opt"])["weights"]
        return sj.apply_masks(state["trainable"]["weights"], masks), masks

    def adam(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        return optax.adam(rate)

    def held_masks(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        return sj.static_sparsity(optax.adam(rate), {"weights": masks})

    def adams(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        return weights.adams(
            rate,
            total_steps=config.steps,
            l1_decay=config.l1_decay,
            mask_period=config.mask_period,
            pattern=config.nm,
            where=where,
        )

    def ast(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        ramp = optax.linear_schedule(0.0, config.ast_decay, max(1, config.steps // 4))
        return weights.ast_adamw(
            rate, decay=ramp, pattern=config.nm, mask_period=config.mask_period, where=where
        )

    def held(begin: str) -> Method:
        return Method(only_weights, held_masks, weights_of, keep_masks, eta=config.eta, begin=begin)

    return {
        "dense": Method(
            only_weights,
            adam,
            weights_of,
            lambda state, dense: (weights_of(state, dense), sj.dense_masks(dense)),
        ),
        **{name: held(begin) for name, begin in HELD.items()},
        "srste": Method(
            only_weights,
            adam,
            lambda state, dense: sj.sr_ste(
                weights_of(state, dense), config.nm, decay=config.srste_decay, where=PROJECTIONS
            ),
            prune_to_pattern,
        ),
        "ast": Method(
            only_weights,
            ast,
            lambda state, dense: sj.ste(
                weights_of(state, dense),
                config.nm,
                masks=sj.get_masks(state["opt"])["weights"],
                where=PROJECTIONS,
            ),
            prune_to_pattern,
            eta=2 / 3,
            temperature=2.0,
        ),
        "maskllm": maskllm(config),
        "cast": Method(
            with_scales,
            adams,
            lambda state, dense: weights.scale_params(
                state["trainable"]["weights"], state["trainable"]["scales"]
            ),
            prune_to_pattern,
            eta=config.eta,
        ),
    }


def maskllm(config: Config) -> Method:
    """MaskLLM: the weights stay as they are, and logits over the six patterns are trained."""

    def start(params: Any, masks: Any, key: jax.Array) -> Any:
        return {"logits": weights.maskllm_logits(key, masks)}

    def view(state: Any, dense: Any) -> Any:
        done = state["step"] / config.steps
        (kappa, last_kappa), (tau, last_tau) = config.maskllm_kappa, config.maskllm_tau
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        return weights.maskllm_params(
            key,
            dense,
            state["trainable"]["logits"],
            kappa=kappa + (last_kappa - kappa) * done,
            tau=tau + (last_tau - tau) * done,
        )

    def finish(state: Any, dense: Any) -> tuple[Any, Any]:
        masks = weights.maskllm_masks(dense, state["trainable"]["logits"])
        return sj.apply_masks(dense, masks), masks

    return Method(start, lambda rate, masks: optax.adam(rate), view, finish)


def magnitude_masks(params: Any, config: Config) -> Any:
    """Masks of the projections by magnitude."""
    return sj.make_masks(sj.magnitude(params), pattern=config.nm, where=PROJECTIONS)


def make_trainer(
    config: Config, method: Method, logits: Callable[[Any, jax.Array], jax.Array]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How a method starts and what one of its steps is.

    Args:
      logits: `(params, tokens) -> logits`.

    Returns:
      `init(params, masks, seed) -> state` and `step(state, windows, dense, peak) -> (state,
      metrics)`; the peak of the learning rate is an argument, so that all rates and seeds share
      one compilation.
    """
    shape = rate_shape(config.steps, config.schedule)

    def transform(peak: Any, masks: Any = None) -> optax.GradientTransformation:
        inner = method.transform(lambda count: peak * shape(count), masks)
        return optax.chain(optax.clip_by_global_norm(1.0), inner)

    def init(params: Any, masks: Any, seed: int) -> Any:
        key = jax.random.key(seed)
        trainable = method.start(params, masks, key)
        opt = transform(0.0, masks).init(trainable)
        # step and key: for what a view draws
        noise = {"step": jnp.int32(0), "key": jax.random.key_data(key)}
        return {"trainable": trainable, "opt": opt, **noise}

    def step(state: Any, windows: jax.Array, dense: Any, peak: jax.Array) -> Any:
        inputs, labels = windows[:, :-1], windows[:, 1:]

        def loss(trainable: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            out = logits(method.view({**state, "trainable": trainable}, dense), inputs)
            if not method.eta:
                value = cross_entropy(out, labels)
                return value, {"cross_entropy": value}
            return weights.cast_loss(
                out,
                logits(dense, inputs),
                labels,
                eta=method.eta,
                temperature=method.temperature,
            )

        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state["trainable"])
        updates, opt = transform(peak).update(grads, state["opt"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        new = {**state, "trainable": trainable, "opt": opt, "step": state["step"] + 1}
        return new, {"loss": value, **parts}

    return init, step
