"""The methods that CAST is compared with, as answers to the same few questions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import sparsejax as sj
from experiments.cast_llama.config import PROJECTIONS, Config
from experiments.harness.language import cross_entropy, warmup_cosine
from sparsejax import weights


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train sparse: all answers that differ between the methods.

    Attributes:
      start: dense params -> trainable tree.
      transform: learning-rate schedule, starting masks -> optax transform.
      view: trainable, optimiser state -> parameters of the forward pass.
      eta, temperature: of the distillation; eta 0 needs no teacher.
    """

    start: Callable[[Any], Any]
    transform: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    view: Callable[[Any, Any], Any]
    eta: float = 0.0
    temperature: float = 1.0


def build_methods(config: Config) -> Mapping[str, Method]:
    """The trained methods under these settings."""
    where = rf"^weights/.*{PROJECTIONS}"

    def only_weights(params: Any) -> Any:
        return {"weights": params}

    def weights_of(trainable: Any, opt: Any) -> Any:
        del opt
        return trainable["weights"]

    def masked_start(params: Any) -> Any:
        return {"weights": sj.prune(params, pattern=config.nm, where=PROJECTIONS)[0]}

    def with_scales(params: Any) -> Any:
        scales = weights.init_scales(params, groups=config.scale_groups, where=PROJECTIONS)
        return {"weights": params, "scales": scales}

    def adam(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        del masks
        return optax.adam(rate)

    def adams(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        del masks
        return weights.adams(
            rate,
            total_steps=config.steps,
            l1_decay=config.l1_decay,
            mask_period=config.mask_period,
            pattern=config.nm,
            where=where,
        )

    def ast(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        del masks
        ramp = optax.linear_schedule(0.0, config.ast_decay, max(1, config.steps // 4))
        return weights.ast_adamw(
            rate, decay=ramp, pattern=config.nm, mask_period=config.mask_period, where=where
        )

    return {
        "dense": Method(only_weights, adam, weights_of),
        "naive": Method(
            masked_start,
            lambda rate, masks: sj.static_sparsity(optax.adam(rate), {"weights": masks}),
            weights_of,
            eta=config.eta,
        ),
        "srste": Method(
            only_weights,
            adam,
            lambda t, opt: sj.sr_ste(
                t["weights"], config.nm, decay=config.srste_decay, where=PROJECTIONS
            ),
        ),
        "ast": Method(
            only_weights,
            ast,
            lambda t, opt: sj.ste(
                t["weights"], config.nm, masks=sj.get_masks(opt)["weights"], where=PROJECTIONS
            ),
            eta=2 / 3,
            temperature=2.0,
        ),
        "cast": Method(
            with_scales,
            adams,
            lambda t, opt: weights.scale_params(t["weights"], t["scales"]),
            eta=config.eta,
        ),
    }


def magnitude_masks(params: Any, config: Config) -> Any:
    """Masks of the projections by magnitude."""
    return sj.make_masks(sj.magnitude(params), pattern=config.nm, where=PROJECTIONS)


def make_trainer(
    config: Config, method: Method, logits: Callable[[Any, jax.Array], jax.Array]
) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    """How a method starts and what one of its steps is.

    Args:
      logits: `(params, tokens) -> logits`.

    Returns:
      `init(params) -> state` and `step(state, windows, teacher, peak) -> (state, metrics)`; the
      peak of the learning rate is an argument, so that all rates and seeds share one compilation.
    """
    shape = warmup_cosine(config.steps)

    def transform(peak: Any, masks: Any = None) -> optax.GradientTransformation:
        inner = method.transform(lambda count: peak * shape(count), masks)
        return optax.chain(optax.clip_by_global_norm(1.0), inner)

    def init(params: Any) -> Any:
        trainable = method.start(params)
        tx = transform(0.0, magnitude_masks(params, config))
        return {"trainable": trainable, "opt": tx.init(trainable)}

    def step(state: Any, windows: jax.Array, teacher: Any, peak: jax.Array) -> Any:
        inputs, labels = windows[:, :-1], windows[:, 1:]

        def loss(trainable: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            out = logits(method.view(trainable, state["opt"]), inputs)
            if not method.eta:
                value = cross_entropy(out, labels)
                return value, {"cross_entropy": value}
            return weights.cast_loss(
                out,
                logits(teacher, inputs),
                labels,
                eta=method.eta,
                temperature=method.temperature,
            )

        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state["trainable"])
        updates, opt = transform(peak).update(grads, state["opt"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        return {"trainable": trainable, "opt": opt}, {"loss": value, **parts}

    return init, step
