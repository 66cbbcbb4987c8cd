"""Training of image classifiers by N:M and other sparsity methods: backbones, step, evaluation."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.config import ExperimentError, RunConfig
from experiments.harness.data.images import ImageData
from experiments.harness.run import Run
from experiments.harness.sharding import host_batch, place_batch, state_shardings
from experiments.harness.training import train
from sparsejax.models import (
    RESNET_SIZES,
    VGG19,
    VIT_SIZES,
    ConvNetConfig,
    CrateClassifier,
    ResNet,
    ResNet9,
    ViT,
    crate_config,
    resnet_config,
    vit_config,
)

MLP = "mlp"
TRANSFORMER = re.compile(rf"(vit|crate)_({'|'.join(VIT_SIZES)})_patch([1-9]\d*)")
MILESTONES, STEP = (0.3, 0.6, 0.8), 0.2
Views = Callable[[PyTree, Array], PyTree]


@dataclasses.dataclass(frozen=True)
class ImageConfig(RunConfig):
    """Settings of an experiment that trains a classifier."""

    dataset: str = "small_digits"
    """A dataset of images of this project or of TFDS, by name."""
    model: str = MLP
    """mlp (on small_digits), or a backbone: resnet18, resnet20, resnet50, ..., resnet18_cifar, ...,
    resnet9, vgg19, vit_tiny_patch16, ..., vit_large_patch16, crate_tiny_patch16, ...."""
    image_size: int | None = None
    """Side of the crops, where the images of a dataset differ in shape; 224 by default."""
    epochs: int = 30
    """Passes over the training images."""
    batch: int = 50
    """Images in a batch, over all devices."""
    warmup_epochs: int = 0
    """The learning rate rises linearly for so long, then falls as the schedule says."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """To 0 along a cosine, or to a fifth after .3, .6 and .8 of all epochs."""
    optimizer: Literal["sgd", "adamw", "lion"] = "sgd"
    """SGD with momentum, or for a backbone AdamW or Lion."""
    clip_norm: float = 1.0
    """Largest norm of the gradients that AdamW and Lion are given; 0 for any."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's momentum of SGD."""
    weight_decay: float = 5e-5
    """Of every parameter: added to the gradient by SGD, apart from it by the others."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    augment: Literal["none", "crop", "crop_flip"] = "crop_flip"
    """Of a backbone's images: shifted by up to an eighth of their side, and mirrored."""
    color_jitter: float = 0.0
    """Largest random change of brightness, contrast and saturation, as a share."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a backbone's activations; weights and optimiser are float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("momentum", "label_smoothing", "color_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ExperimentError(
                f"warmup_epochs is {self.warmup_epochs}; it must be at least 0 and below epochs"
            )
        if self.is_mlp:
            if self.dataset != "small_digits":
                raise ExperimentError(
                    f"model is mlp and dataset {self.dataset!r}; the mlp is for small_digits, name "
                    "a backbone with --model"
                )
            if self.optimizer != "sgd":
                raise ExperimentError(f"optimizer is {self.optimizer!r}; the mlp takes sgd")
            if self.mesh is not None or self.multihost:
                raise ExperimentError("mesh and multihost are for backbones: the mlp is one scan")
        elif self.nesterov and self.optimizer != "sgd":
            raise ExperimentError(f"nesterov is for sgd; optimizer is {self.optimizer!r}")
        elif not (
            self.model in RESNET_SIZES
            or self.model in ("resnet9", "vgg19")
            or TRANSFORMER.fullmatch(self.model)
        ):
            names = ("mlp", *RESNET_SIZES, "resnet9", "vgg19")
            names += tuple(
                f"{kind}_{size}_patchN" for kind in ("vit", "crate") for size in VIT_SIZES
            )
            raise ExperimentError(f"model is {self.model!r}; known are {', '.join(names)}")

    @property
    def is_mlp(self) -> bool:
        """Whether the laptop's network on digits is trained."""
        return self.model == MLP


def learning_rate(
    config: ImageConfig, steps_per_epoch: int, peak: float | Array
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The rate at a step: a linear warm-up, then steps, or a cosine to 0 counted from its end."""
    warmup, steps = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch

    def rate(step: Int[Array, ""]) -> Float[Array, ""]:
        rising = step / max(warmup, 1)
        progress = (step - warmup) / max(steps - warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        if config.schedule == "multistep":
            passed = sum(step >= round(share * steps) for share in MILESTONES)
            falling = jnp.float32(STEP) ** passed
        return peak * jnp.where(step < warmup, rising, falling)

    return rate


def make_optimizer(config: ImageConfig, rate: Any) -> optax.GradientTransformation:
    """The optimiser that the settings name."""
    if config.optimizer == "sgd":
        return digits.sgd(rate, momentum=config.momentum, weight_decay=config.weight_decay,
                          nesterov=config.nesterov)  # fmt: skip
    kind = optax.adamw if config.optimizer == "adamw" else optax.lion
    inner = kind(rate, weight_decay=config.weight_decay)
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, inner) if config.clip_norm else inner


def build_backbone(
    config: ImageConfig, *, classes: int, side: int, channels: int, rngs: nnx.Rngs, **changes: Any
) -> nnx.Module:
    """The backbone that the settings name, for given images.

    Args:
      **changes: of the model's own configuration, for example a `base_width`.

    Raises:
      ExperimentError: a patch that does not divide the images.
    """
    sizes = {"num_classes": classes, "in_channels": channels, "dtype": config.dtype} | changes
    transformer = TRANSFORMER.fullmatch(config.model)
    try:
        if transformer:
            family, size, patch = transformer.groups()
            sizes |= {"patch_size": int(patch), "image_size": side}
            if family == "crate":
                return CrateClassifier(crate_config(size, **sizes), rngs=rngs)
            return ViT(vit_config(size, **sizes), rngs=rngs)
        if config.model in RESNET_SIZES:
            return ResNet(resnet_config(config.model, **sizes), rngs=rngs)
        kind = ResNet9 if config.model == "resnet9" else VGG19
        return kind(ConvNetConfig(**sizes), rngs=rngs)
    except ValueError as error:
        raise ExperimentError(f"model {config.model}: {error}") from error


def backbone_builder(config: ImageConfig, data: ImageData) -> Callable[..., nnx.Module]:
    """`build_backbone` for the images of a dataset: rngs, and changes of the model by keyword."""
    sizes = {"classes": data.classes, "side": data.side, "channels": data.channels}
    return lambda rngs, **changes: build_backbone(config, rngs=rngs, **sizes, **changes)


def logits(model: Any, images: Array, *, train: bool) -> Float[Array, "b classes"]:
    """The outputs of any backbone; transformers behave alike in training and after it.

    Layers put into a model, such as those of Sparse-IFT, are called without `train`: `model` is
    told, too, and should be a copy of one's own.
    """
    if isinstance(model, ViT | CrateClassifier):
        return model(images)
    if train:
        model.train()
    else:
        model.eval()
    return model(images, train=train)


class Method(NamedTuple):
    """How a backbone is trained.

    Attributes:
      build: rngs -> the model.
      view: params, step -> the params of the forward pass.
      transform: params, optimiser -> the optimiser that is used; masks are those of the params.
      masks: params -> the mask tree whose changes are counted from epoch to epoch, or None.
      start: params -> params before the first step.
      measure: gradients -> scalars by name, logged beside the loss.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    view: Views = lambda params, step: params
    transform: Callable[[PyTree, optax.GradientTransformation], optax.GradientTransformation] = (
        lambda params, inner: inner
    )
    masks: Callable[[PyTree], PyTree] | None = None
    start: Callable[[PyTree], PyTree] = lambda params: params
    measure: Callable[[PyTree], dict[str, Array]] = lambda gradients: {}


class Trainer(NamedTuple):
    """A training as functions of a state; one of them serves every seed and learning rate.

    Attributes:
      init: seed, peak learning rate -> state. step: state, batch -> state, metrics.
      evaluate: state, batch -> sums over the batch. steps_per_epoch: of the schedule.
    """

    init: Callable[[Any, Any], dict[str, Any]]
    step: Callable[[dict[str, Any], Any], tuple[dict[str, Any], dict[str, Array]]]
    evaluate: Callable[[dict[str, Any], Any], dict[str, Array]]
    steps_per_epoch: int


def make_trainer(
    config: ImageConfig, method: Method, *, steps_per_epoch: int, mean: Any, deviation: Any
) -> Trainer:
    """A training as pure functions; `compile_trainer` jits them.

    Args:
      mean, deviation: of each channel, see `ImageData`.
    """
    graph, *_ = nnx.split(nnx.eval_shape(lambda: method.build(nnx.Rngs(0))), nnx.Param, ...)
    mean, deviation = jnp.asarray(mean), jnp.asarray(deviation)

    def optimizer(params: PyTree, peak: Array) -> optax.GradientTransformation:
        rate = learning_rate(config, steps_per_epoch, peak)
        return method.transform(params, make_optimizer(config, rate))

    def init(seed: Any, peak: Any) -> dict[str, Any]:
        key = jax.random.key(seed)
        _, params, rest = nnx.split(method.build(nnx.Rngs(key)), nnx.Param, ...)
        params, peak = method.start(params), jnp.float32(peak)
        state = {
            "params": params,
            "rest": rest,
            "opt": optimizer(params, peak).init(params),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(key),
            "peak": peak,
        }
        if method.masks is not None:
            state |= {"masks": method.masks(params), "flips": jnp.zeros((), jnp.int32)}
        return state

    def images(batch: Any) -> Array:
        return (batch["image"].astype(jnp.float32) / 255 - mean) / deviation

    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        x = augmented(key, images(batch), config)
        count = state["step"]

        def loss(params: PyTree) -> tuple[Array, PyTree]:
            # copied: batch statistics may only be written where they were made
            model = nnx.merge(graph, method.view(params, count), state["rest"], copy=True)
            outputs = logits(model, x, train=True)
            rest = nnx.split(model, nnx.Param, ...)[2]
            targets = jax.nn.one_hot(batch["label"], outputs.shape[-1])
            targets = optax.smooth_labels(targets, config.label_smoothing)
            return optax.softmax_cross_entropy(outputs, targets).mean(), rest

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        tx = optimizer(state["params"], state["peak"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = state | {"params": params, "rest": rest, "opt": opt, "step": count + 1}
        metrics = {"loss": value, **method.measure(grads)}
        if method.masks is not None:
            # counted between the ends of epochs, wherever an epoch ends
            due = (count + 1) % steps_per_epoch == 0
            masks = jax.lax.cond(due, method.masks, lambda _: state["masks"], params)
            new["masks"] = masks
            new["flips"] = state["flips"] + sj.flips(state["masks"], masks)
        return new, metrics

    def evaluate(state: dict[str, Any], batch: Any) -> dict[str, Array]:
        used = method.view(state["params"], jnp.maximum(state["step"] - 1, 0))
        outputs = logits(nnx.merge(graph, used, state["rest"]), images(batch), train=False)
        real = batch["label"] >= 0
        labels = jnp.maximum(batch["label"], 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        right = (jnp.argmax(outputs, -1) == labels) & real
        return {"right": right.sum(), "nats": jnp.where(real, nats, 0).sum(), "count": real.sum()}

    return Trainer(init, step, evaluate, steps_per_epoch)


def compile_trainer(
    config: ImageConfig, data: ImageData, method: Method, mesh: Mesh | None
) -> Trainer:
    """The training of a method on a dataset, jitted; whole on one device, or data over a mesh.

    Raises:
      ExperimentError: a batch larger than the dataset.
    """
    steps = data.examples // config.batch
    if not steps:
        raise ExperimentError(f"batch is {config.batch}; there are {data.examples} images")
    plain = make_trainer(
        config, method, steps_per_epoch=steps, mean=data.mean, deviation=data.deviation
    )
    layout = None
    if mesh is not None:
        layout = state_shardings(jax.eval_shape(plain.init, 0, 0.0), {}, mesh)
    outputs = None if layout is None else (layout, None)
    return Trainer(
        jax.jit(plain.init, out_shardings=layout),
        jax.jit(plain.step, donate_argnums=0, out_shardings=outputs),
        jax.jit(plain.evaluate),
        steps,
    )


def augmented(
    key: PRNGKeyArray, x: Float[Array, "b h w c"], config: ImageConfig
) -> Float[Array, "b h w c"]:
    """Images shifted, mirrored and changed in colour at random, each for itself."""
    shift, mirror, jitter = jax.random.split(key, 3)
    b, h, w, _ = x.shape
    if config.augment != "none":
        pad = max(1, h // 8)
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = jax.random.randint(shift, (b, 2), 0, 2 * pad + 1)
        cut = lambda image, at: jax.lax.dynamic_slice(  # noqa: E731
            image, (at[0], at[1], 0), (h, w, image.shape[-1])
        )
        x = jax.vmap(cut)(padded, corners)
    if config.augment == "crop_flip":
        flip = jax.random.bernoulli(mirror, 0.5, (b, 1, 1, 1))
        x = jnp.where(flip, x[:, :, ::-1], x)
    if config.color_jitter:
        low, high = 1 - config.color_jitter, 1 + config.color_jitter
        bright, contrast, saturate = (
            jax.random.uniform(k, (b, 1, 1, 1), minval=low, maxval=high)
            for k in jax.random.split(jitter, 3)
        )
        x = x * bright
        x = jnp.mean(x, (1, 2, 3), keepdims=True) * (1 - contrast) + x * contrast
        x = jnp.mean(x, -1, keepdims=True) * (1 - saturate) + x * saturate
    return x


def train_backbone(
    run: Run, trial: str, config: ImageConfig, data: ImageData, trainer: Trainer, *, seed: int,
    peak: float, mesh: Mesh | None, slug: str,
    after: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda state: {},
) -> dict[str, Any]:  # fmt: skip
    """Trains and measures on the test images; resumes where it was stopped.

    Args:
      trial: its name. trainer: from `compile_trainer`. peak: learning rate.
      after: the trained state -> more JSON values.

    Returns:
      `test_accuracy` in percent, `test_loss` in nats, `train_loss` over the last epoch, what
      `Method.measure` logged over the second half, and with `Method.masks` `flips`, the mask bits
      changed between the ends of epochs in all; and those of `after`.
    """
    steps_per_epoch = trainer.steps_per_epoch
    shard = (jax.process_index(), jax.process_count())
    state = train(
        run,
        trial,
        state=trainer.init(seed, peak),
        step=trainer.step,
        batches=data.batches(batch=host_batch(config.batch), seed=seed, shard=shard),
        steps=config.epochs * steps_per_epoch,
        mesh=mesh,
        slug=slug,
    )
    totals: dict[str, float] = {"right": 0, "nats": 0, "count": 0}
    for batch in data.test_batches(config.batch):
        for name, value in trainer.evaluate(state, _everywhere(batch, mesh)).items():
            totals[name] += float(value)
    steps, lines = config.epochs * steps_per_epoch, run.metrics(trial)

    def logged(name: str, first: int) -> float:
        values = [line[name] for line in lines if line["step"] > first and name in line]
        return sum(values) / max(len(values), 1)

    measured = {name for line in lines for name in line} - {"trial", "step", "loss"}
    found: dict[str, Any] = {
        "test_accuracy": 100 * totals["right"] / totals["count"],
        "test_loss": totals["nats"] / totals["count"],
        "train_loss": logged("loss", steps - steps_per_epoch),
        **{name: logged(name, steps // 2) for name in sorted(measured)},
        **after(state),
    }
    return found | ({"flips": int(state["flips"])} if "flips" in state else {})


def _everywhere(batch: Any, mesh: Mesh | None) -> Any:
    """A whole batch on every process, cut over the data axis."""
    hosts = jax.process_count()
    if hosts == 1:
        return place_batch(batch, mesh)
    index = jax.process_index()
    part = jax.tree.map(lambda a: a[len(a) // hosts * index : len(a) // hosts * (index + 1)], batch)
    return place_batch(part, mesh)
