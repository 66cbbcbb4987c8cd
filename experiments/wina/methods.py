"""A pretrained language model, plain and rotated, sparsified by every method."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from experiments.harness.data import TokenizedText
from experiments.harness.pretrained import calibration_windows
from experiments.wina.config import Arm, Config
from experiments.wina.products import (
    projections,
    stacked_factors,
    with_counts,
)
from sparsejax import activations as act
from sparsejax.models import Llama, LlamaConfig, rope_tables
from sparsejax.models.blocks import unroll
from sparsejax.models.transformed import transform_llama

Numbers = Mapping[str, Any]  # by the path of a stacked kernel, one for each layer


@dataclasses.dataclass(frozen=True)
class Setting:
    """How strongly an arm sparsifies; made of JSON values, so that it can be kept.

    Attributes:
      sparsity: share of inputs that each projection drops, by path (CATS: of neurons, under `ffn`).
      thresholds: of the scores, by the same paths. alpha: of R-Sparse.
    """

    sparsity: Numbers
    thresholds: Numbers
    alpha: float = 1.0


class Workshop:
    """A model and what methods need of it, computed when it is first asked for."""

    def __init__(self, config: Config, model: Llama, text: TokenizedText):
        self.config, self.model, self.text = config, model, text
        self._separate: dict[bool, Any] = {}
        self._histograms: dict[tuple[bool, str], Any] = {}

    @functools.cached_property
    def rotated(self) -> Any:
        """The same model in the bases of WINA."""
        return transform_llama(self.model)

    @functools.cached_property
    def factors(self) -> dict[str, tuple[Array, Array]]:
        """R-Sparse's factors of every projection, of full rank."""
        return {p: stacked_factors(w.kernel[...]) for p, w in projections(self.model).items()}

    def base(self, rotated: bool, *, decoding: bool = False) -> Any:
        """The dense model, plain or rotated; for decoding with separate blocks."""
        model = self.rotated if rotated else self.model
        if not decoding:
            return model
        if rotated not in self._separate:
            self._separate[rotated] = unroll(model)
        return self._separate[rotated]

    def windows(self, count: int) -> Int[np.ndarray, "count t+1"]:
        """Training windows spread evenly, as long as those of the evaluation."""
        return calibration_windows(self.text, length=self.config.seq_len + 1, count=count)

    def scores(self, arm: Arm) -> dict[str, Array]:
        """Histograms of an arm's scores over the calibration windows."""
        scored = self._counted(arm.rotated, arm.criterion)
        if arm.where_norms is None:
            return scored
        plain, narrow = self._counted(arm.rotated, "teal"), ("k_proj", "gate_proj")
        return {p: (scored if p.split("/")[-2] in narrow else plain)[p] for p in scored}

    def _counted(self, rotated: bool, criterion: str) -> dict[str, Array]:
        if (rotated, criterion) not in self._histograms:
            windows = self.windows(self.config.calibration)
            found = count_scores(self.base(rotated), windows, criterion)
            self._histograms[rotated, criterion] = found
        return self._histograms[rotated, criterion]

    def build(
        self, arm: Arm, setting: Setting, *, decoding: bool = False, counted: bool = False
    ) -> Any:
        """The model sparsified by an arm.

        Args:
          decoding: with separate blocks, of whose weights a single token reads what it needs.
          counted: for `kept_weights`.
        """
        model = self.base(arm.rotated, decoding=decoding)
        model = with_counts(model) if counted else model
        spread = per_block if decoding else dict
        if arm.method == "cats":
            limits = spread({"blocks/ffn": setting.thresholds["ffn"]})
            return act.cats_model(model, limits, decoding=decoding)
        if arm.method == "r-sparse":
            factors = self._low_rank(setting)
            return act.r_sparse_model(model, spread(setting.thresholds), spread(factors))
        if self.config.mask_by == "topk":
            numbers: Any = {"sparsity": spread(setting.sparsity)}
        else:
            numbers = {"thresholds": spread(setting.thresholds)}
        options = {"criterion": arm.criterion, "norms": arm.where_norms, "gather": decoding}
        return act.sparse_inputs(model, **numbers, **options)

    def _low_rank(self, setting: Setting) -> dict[str, tuple[Array, Array]]:
        found = {}
        for path, (down, up) in self.factors.items():
            share = float(setting.sparsity[path][0])
            size = (down.shape[-2], up.shape[-1])
            _, rank = act.r_sparse_budget(*size, share, setting.alpha)
            found[path] = down[..., :rank], up[..., :rank, :]
        return found


def count_scores(
    model: nnx.Module, windows: Int[np.ndarray, "n t"], criterion: str
) -> dict[str, Array]:
    """Histograms of all projections' scores, window by window."""
    graph, state = nnx.split(model)

    @jax.jit
    def count(state: Any, tokens: Array) -> dict[str, Array]:
        whole = nnx.merge(graph, state)
        return act.input_histograms(whole, tokens, criterion=criterion)  # type: ignore[arg-type]

    total: Any = None
    for window in windows:
        found = count(state, jnp.asarray(window)[None])
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def count_gates(
    model: Llama, windows: Int[np.ndarray, "n t"], shares: Sequence[float]
) -> dict[float, list[float]]:
    """CATS' thresholds of every layer for each of the shares, from the dense model's gates."""
    rope = rope_tables(model.config, jnp.arange(windows.shape[1])[None])
    blocks = [model.block(i) for i in range(model.config.n_layers)]
    graph = nnx.split(blocks[0])[0]

    @jax.jit
    def step(state: Any, x: Array) -> tuple[Array, Array]:
        block = nnx.merge(graph, state)
        x = x + block.attention(block.attention_norm(x), rope)
        inputs = block.ffn_norm(x)
        return x + block.ffn(inputs), jax.nn.silu(block.ffn.gate_proj(inputs))

    streams = [model.embedded(jnp.asarray(window)[None]) for window in windows]
    found: dict[float, list[float]] = {share: [] for share in shares}
    for block in blocks:
        pairs = [step(nnx.state(block), x) for x in streams]
        streams = [x for x, _ in pairs]
        gates = np.stack([np.asarray(gate) for _, gate in pairs])
        for share in shares:
            found[share].append(act.cats_threshold(gates, share))
    return found


def per_block(values: Numbers) -> dict[str, Any]:
    """What stacked layers have at `blocks/<path>`, for separate ones at `blocks/<i>/<path>`.

    >>> per_block({"blocks/ffn/up_proj/kernel": [0.25, 0.5]})
    {'blocks/0/ffn/up_proj/kernel': 0.25, 'blocks/1/ffn/up_proj/kernel': 0.5}
    """
    found = {}
    for path, value in values.items():
        rest = path.removeprefix("blocks/")
        each = zip(*value) if isinstance(value, tuple) else value
        found |= {f"blocks/{i}/{rest}": own for i, own in enumerate(each)}
    return found


def projection_sizes(config: LlamaConfig) -> dict[str, int]:
    """Weights of each projection of a layer, by the path of its kernel in stacked blocks."""
    d, ff = config.d_model, config.d_ff
    wide, narrow = (heads * config.head_width for heads in (config.n_heads, config.kv_heads))
    attention = {"q": wide, "k": narrow, "v": narrow, "o": wide}
    sizes = {f"blocks/attention/{name}_proj/kernel": d * n for name, n in attention.items()}
    return sizes | {f"blocks/ffn/{name}_proj/kernel": d * ff for name in ("gate", "up", "down")}


def gate_sparsity(arm: Arm, sparsity: float, config: LlamaConfig) -> float | None:
    """What share of the neurons CATS switches off; None where it cannot drop that much."""
    if not arm.matched:
        return sparsity
    sizes = projection_sizes(config)
    spared = sum(size for path, size in sizes.items() if "up_proj" in path or "down_proj" in path)
    share = sparsity * sum(sizes.values()) / spared
    return share if share < 1 else None


def multiply_adds(arm: Arm | None, setting: Setting | None, config: LlamaConfig) -> float:
    """Of one token's products with weights: projections, head, and what the method adds.

    Attention to the cache and scores are left out. None: the dense model.
    """
    sizes = projection_sizes(config)
    total = float(config.vocab_size * config.d_model + config.n_layers * sum(sizes.values()))
    if arm is None or setting is None:
        return total
    for path, size in sizes.items():
        if arm.method != "cats":
            total -= size * float(np.sum(setting.sparsity[path]))
        elif "up_proj" in path or "down_proj" in path:
            total -= size * float(np.sum(setting.sparsity["ffn"]))
    shortcuts = 2 * config.n_layers * config.d_model**2
    return total + (shortcuts if arm.rotated else 0)
