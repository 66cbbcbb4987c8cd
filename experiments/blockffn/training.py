"""The arms as the trainer takes them: what is added to the cross-entropy, and what is watched."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from experiments.blockffn.config import DRAFT, SHOWN_CHUNK, Config, Losses
from experiments.harness.decoder_arms import Arm, Details, Penalty
from sparsejax.activations import (
    AdaptiveFactorState,
    activation_locality_loss,
    adaptive_factor_init,
    adaptive_factor_step,
    chunk_level_sparsity,
    chunk_sparsification_loss,
    token_level_sparsity,
)


def make_arms(config: Config, vocab_size: int) -> dict[str, Arm]:
    """Every arm by its name, the draft model last."""
    arms = {
        name: Arm(config.model(vocab_size, losses.router), make_penalty(config, losses), watch)
        for name, losses in config.losses().items()
    }
    return arms | {DRAFT: Arm(config.draft(vocab_size))}


def make_penalty(config: Config, losses: Losses) -> Penalty | None:
    """The losses of an arm, averaged over layers and sequences; None where it has none."""
    if losses == Losses():
        return None
    previous = jnp.arange(config.seq_len) - 1  # -1 at the start of each sequence
    options = {"stable_steps": config.adaptive_start, "adjust_every": config.adaptive_every}

    def locality(logits: Array) -> Array:
        return activation_locality_loss(logits, previous, alpha=config.alpha)

    def sparsification(logits: Array) -> Array:
        return chunk_sparsification_loss(logits, chunk=config.chunk)

    def apply(
        details: Details, state: AdaptiveFactorState | tuple[()]
    ) -> tuple[Array, AdaptiveFactorState | tuple[()], dict[str, Array]]:
        logits, total, found = details["logits"], jnp.float32(0), {}
        if losses.al:
            found["al"] = over_sequences(locality, logits)
            total += losses.al * found["al"]
        if losses.cs:
            found["cs"] = over_sequences(sparsification, logits)
            factor = jnp.float32(losses.cs)
            if isinstance(state, AdaptiveFactorState):
                state, factor = adaptive_factor_step(state, found["cs"], **options)
                found["lambda_cs"] = factor
            total += factor * found["cs"]
        if losses.l1:
            found["l1"] = jnp.mean(jnp.abs(details["gates"]))
            total += losses.l1 * found["l1"]
        return total, state, found

    return Penalty(adaptive_factor_init(losses.cs) if losses.adaptive else (), apply)


def watch(details: Details) -> dict[str, Array]:
    """Sparsity by token and by chunk of eight, the means over layers and sequences."""
    active = details["logits"] > 0
    return {
        "tls": over_sequences(token_level_sparsity, active),
        f"cls_{SHOWN_CHUNK}": chunk_sparsity(active, SHOWN_CHUNK),
    }


def chunk_sparsity(active: Bool[Array, "layers b t e"], chunk: int) -> Float[Array, ""]:
    """CLS at a chunk length, the mean over layers and sequences."""
    return over_sequences(lambda a: chunk_level_sparsity(a, chunk=chunk), active)


def over_sequences(measure, values: Array) -> Float[Array, ""]:
    """The mean over layers and sequences `[layers, b, ...]` of a measure of one sequence.

    Those where it is nan, because nothing in them counts, are left out.
    """
    return jnp.nanmean(jax.vmap(jax.vmap(measure))(values))
