"""The networks that are compared, what they cost, and the masks and optimiser of each."""

import bisect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.nm_training import backbone_scope
from experiments.sparse_ift.config import LOCAL, Arm, Config
from sparsejax import weights
from sparsejax.models import RESNET_SIZES, ConvNetConfig, ResNet

LAYERS = 4  # of the network on digits
Builder = Callable[..., nnx.Module]  # rngs -> the dense model; `base_width` widens it


class Perceptron(nnx.Module):
    """A ReLU network of `LAYERS` linear layers with hidden layers of one width."""

    def __init__(self, rngs: nnx.Rngs, *, base_width: int):
        sizes = (digits.INPUTS, *[base_width] * (LAYERS - 1), digits.CLASSES)
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in pairs])

    def __call__(self, x: Float[Array, "n in"]) -> Float[Array, "n classes"]:
        """Logits."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Cost(NamedTuple):
    """What an arm's network costs, in multiply-accumulates of the forward pass of one example.

    Attributes:
      dense: of the dense network that it is compared with. whole: of its own, zeros included.
      used: of its non-zeros. nonzeros: entries of its kernels that are not zero.
      sparsity: share of zeros of every sparse kernel, by path.
    """

    dense: int
    whole: int
    used: float
    nonzeros: int
    sparsity: Mapping[str, float]

    def training(self, arm: Arm, config: Config) -> float:
        """Floating-point operations of training on one example, mean over all steps."""
        forward, dense = 2 * self.used, 2 * self.whole
        still = sj.training_flops("static", sparse=forward, dense=dense)
        if arm.family == "dense" or arm.mask != "rigl":
            return still
        every = config.update_every
        moving = sj.training_flops("rigl", sparse=forward, dense=dense, interval=every)
        return config.end_fraction * moving + (1 - config.end_fraction) * still


def build_arm(arm: Arm, config: Config, build: Builder, rngs: nnx.Rngs) -> nnx.Module:
    """The network of an arm, still without zeros.

    Raises:
      ValueError: a sparsity that has no whole number of branches, or no rank.
    """
    if arm.family == "wide":
        named = RESNET_SIZES.get(config.model, ConvNetConfig())
        base = arm.width or named.base_width
        return build(rngs, base_width=weights.widened(base, arm.sparsity))
    model = build(rngs)
    if arm.family not in LOCAL:
        return model
    if arm.family == "parallel" and isinstance(model, ResNet) and _has_basic_blocks(model):
        return _parallel_blocks(model, arm.sparsity, rngs)
    return weights.sparse_ift_model(
        model,
        arm.family,  # type: ignore[arg-type]
        arm.sparsity,
        where=_is_replaced if not arm.width else rf"^layers/[0-{LAYERS - 2}]/",
        norm=not arm.width,
        factor="linear" if arm.width else "nonlinear_relu",
        rngs=rngs,
    )


def _is_replaced(path: str, leaf: Any) -> bool:
    return backbone_scope(path, leaf) and tuple(leaf.shape[:-2]) == (3, 3)


def _has_basic_blocks(model: ResNet) -> bool:
    return model.config.block == "basic" and model.config.shortcut == "projection"


def _parallel_blocks(model: ResNet, sparsity: float, rngs: nnx.Rngs) -> nnx.Module:
    """Parallel residual blocks, whose only batch norms are those of the branches."""
    for stage in model.stages:
        for i, block in enumerate(stage):
            conv = block.conv1
            sizes = conv.in_features, conv.out_features
            k = int(weights.sift_size("parallel", *sizes, sparsity, kernel=(3, 3)))
            kinds = {"dtype": conv.dtype, "param_dtype": conv.param_dtype}
            stage[i] = weights.ParallelResidualBlock(
                *sizes, k, strides=block.stride, rngs=rngs, **kinds
            )
    return model


def scope(arm: Arm) -> sj.Where:
    """Which kernels of an arm's network are sparse."""
    if arm.family in LOCAL:
        return weights.sparse_parts(arm.family)  # type: ignore[arg-type]
    return weights.sparse_parts("wide") if arm.width else backbone_scope


def cost(arm: Arm, config: Config, build: Builder, images: jax.ShapeDtypeStruct) -> Cost:
    """What the arm costs, and the sparsity of its layers.

    Args:
      build: of the dense network. images: one example.

    Raises:
      ValueError: FLOPs that no sparsity meets, or as `build_arm`.
    """
    dense = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    model = nnx.eval_shape(lambda: build_arm(arm, config, build, nnx.Rngs(0)))
    options = {} if arm.width else {"train": True}
    products = weights.layer_products(dense, images, **options)
    budget = sum(layer.macs for layer in products)
    positions = {layer.path.removesuffix("/kernel"): layer.positions for layer in products}
    params = nnx.split(model, nnx.Param, ...)[1]
    kernels = {path: x for path, x in sj.named_leaves(params) if path.endswith("/kernel")}
    macs = {path: x.size * positions[_place(path, positions)] for path, x in kernels.items()}
    sparsity: dict[str, float] = {}
    if arm.family != "dense":
        chosen = {path: kernels[path] for path in sj.selected_paths(params, scope(arm))}
        exact = config.match_flops and arm.family != "narrow"
        sparsity = _sparsity(chosen, macs, arm.sparsity, budget if exact else None, config)
    zeros = {path: int(x.size * sparsity.get(path, 0.0)) for path, x in kernels.items()}
    return Cost(
        dense=budget,
        whole=sum(macs.values()),
        used=sum(macs[path] * (1 - zeros[path] / x.size) for path, x in kernels.items()),
        nonzeros=sum(x.size - zeros[path] for path, x in kernels.items()),
        sparsity=sparsity,
    )


def _place(path: str, layers: Mapping[str, Any]) -> str:
    """The layer of the dense network that a kernel stands in, or under."""
    while path not in layers:
        path = path.rpartition("/")[0]
    return path


def _sparsity(
    chosen: dict[str, Any], macs: Mapping[str, int], given: float, budget: int | None,
    config: Config,
) -> dict[str, float]:  # fmt: skip
    """Zeros of every layer; with a budget those at which all layers together meet it."""
    if config.distribution == "uniform":
        if budget is not None:
            layers = [(count, path in chosen) for path, count in macs.items()]
            given = weights.match_flops_sparsity(layers, budget)
        return dict.fromkeys(chosen, given)

    def layers_at(sparsity: float) -> dict[str, float]:
        return {path: 1 - density for path, density in sj.erk(chosen, 1 - sparsity).items()}

    def saved(sparsity: float) -> float:
        return sum(share * macs[path] for path, share in layers_at(sparsity).items())

    if budget is not None:
        # the saving grows with the sparsity
        grid = range(100_000)
        wanted = sum(macs.values()) - budget
        step = bisect.bisect_left(grid, wanted, key=lambda i: saved(i / len(grid)))
        if step == len(grid):
            raise ValueError(f"budget is {budget} multiply-accumulates; no sparsity saves so many")
        given = step / len(grid)
    return layers_at(given)


def start_masks(key: PRNGKeyArray, params: PyTree, sparsity: Mapping[str, float]) -> PyTree:
    """Random masks with exactly `n - int(n * sparsity)` entries; other leaves are dense."""
    shares: dict[str, float] = {}
    for path, leaf in sj.named_leaves(params):
        zeros = int(leaf.size * sparsity.get(path, 0.0))
        shares[path] = 1 - zeros / leaf.size if zeros else 1
    return sj.random_masks(key, params, shares)


def seeded_key(params: PyTree, sparsity: Mapping[str, float]) -> PRNGKeyArray:
    """A key from the bits of the dense leaves: a `Method` is not told the seed.

    Masks do not touch those leaves, so the key is the same before and after they are applied.
    """
    total = jnp.zeros((), jnp.uint32)
    for path, leaf in sj.named_leaves(params):
        if path not in sparsity:
            bits = lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
            total = total + jnp.sum(bits, dtype=jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), total)


def optimizer(
    inner: optax.GradientTransformation, arm: Arm, config: Config, sparsity: Mapping[str, float],
    steps: int, start: Callable[[PyTree], tuple[PyTree, PRNGKeyArray]],
) -> optax.GradientTransformation:  # fmt: skip
    """Trains with the arm's masks.

    Args:
      start: parameters -> starting masks and the key of SET. Only `init` calls it: later they are
        those of the state.
    """
    end = max(int(config.end_fraction * steps), 1)

    def masked(params: PyTree, masks: PyTree, key: PRNGKeyArray) -> Any:
        shares = {path: sparsity.get(path, 0.0) for path, _ in sj.named_leaves(params)}
        return weights.masked_optimizer(
            inner,
            masks=masks,
            sparsity=shares,
            drop=weights.drop_schedule(config.drop_fraction, end=end),
            update=arm.mask,  # type: ignore[arg-type]
            every=config.update_every,
            end=end,
            key=key,
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return masked(params, None, jax.random.key(0)).update(updates, state, params)

    return optax.GradientTransformation(
        lambda params: masked(params, *start(params)).init(params), update
    )
