"""Byte models with ReLU networks: how many neurons fire, before, in and after training."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.harness.data import validation_windows
from experiments.harness.decoder_arms import as_arm, decoder_runner, load_text
from experiments.harness.run import Run
from experiments.lazy_neuron.config import SLUG, Config
from sparsejax.activations import measure_activations
from sparsejax.models import Llama, LlamaConfig

WATCHED = "blocks/ffn/down_proj"


def trainer(run: Run, config: Config) -> Callable[[str, float, int], dict[str, Any]]:
    """Builds `train(arm, rate, seed)`.

    It returns what `as_arm` does, and of the validation windows `initial_share`, that of neurons
    which fire before training, with `initial_layers`, and `neuron_rate [layers, f]` after it.
    """
    arms, text = config.arms(), load_text(config)
    train = decoder_runner(run, SLUG, config, text, arms)
    windows = validation_windows(text.validation, config.seq_len)[: config.eval_windows or None]
    measures = {name: _neuron_rates(arm.model) for name, arm in arms.items()}

    def train_arm(arm: str, rate: float, seed: int) -> dict[str, Any]:
        model = arms[arm].model
        # the same draw as the training's
        start = nnx.state(Llama(model, rngs=nnx.Rngs(jax.random.key(seed))))
        before = measures[arm](start, windows)
        found = train(arm, rate, seed)
        after = measures[arm](found.params, windows)
        return {
            **as_arm(found),
            "initial_share": float(before.mean()),
            "initial_layers": before.mean(1).tolist(),
            "neuron_rate": np.round(after.astype(float), 5).tolist(),
        }

    return train_arm


def _neuron_rates(model: LlamaConfig) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Share of the tokens that each neuron fires for, `[layers, f]`, of parameters and windows."""
    graph = nnx.split(nnx.eval_shape(lambda: Llama(model, rngs=nnx.Rngs(0))))[0]

    @jax.jit
    def fired(params: Any, tokens: jax.Array) -> jax.Array:
        found = measure_activations(nnx.merge(graph, params), tokens, where=WATCHED)
        return found[WATCHED]["fired"]

    def rates(params: Any, windows: np.ndarray) -> np.ndarray:
        size = min(64, len(windows))
        parts = [windows[i : i + size, :-1] for i in range(0, len(windows) - size + 1, size)]
        counts = np.stack([fired(params, part) for part in parts]).sum(0, dtype=np.int64)
        return counts / (len(parts) * parts[0].size)

    return rates
