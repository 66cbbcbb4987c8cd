"""`python -m experiments.ten_lessons`."""

import math

import jax
import optax

import sparsejax as sj
from experiments.harness.abstract_training import PRUNABLE, abstract_params, trace_step
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.images import ImageConfig
from experiments.harness.run import Run
from experiments.ten_lessons.config import GRANULARITIES, PRESETS, SLUG, Config, pattern
from experiments.ten_lessons.costs import costs
from experiments.ten_lessons.granularity import granularities

IMAGES = 8  # in the traced batch


def run(config: Config, run: Run) -> Result:
    """The cell of one lesson."""
    return granularities(config, run) if config.lesson == "L3" else costs(config, run)


def check(config: Config) -> list[str]:
    """Prunes the kernels of a ResNet-50 as matrices in every granularity, abstractly."""
    images = ImageConfig(dataset="imagenet2012", model="resnet50", batch=IMAGES)
    whole = dict(sj.named_leaves(abstract_params(images)))
    chosen = sj.selected_paths(whole, PRUNABLE)
    matrices = {
        path: jax.ShapeDtypeStruct((math.prod(whole[path].shape[:-1]), whole[path].shape[-1]), "f4")
        for path in chosen
    }
    scope = sum(math.prod(leaf.shape) for leaf in matrices.values())
    setting = (
        f"paper setting: the granularities of L3 on a ResNet-50, {len(chosen)} kernels as "
        f"[in, out] matrices with {scope:,} weights, {config.sparsity:g} sparsity"
    )
    lines = [setting]
    for name in [n for n in config.arms if n != "units"]:
        transform = sj.gradual_pruning(
            optax.adam(1e-3),
            pattern=pattern(config, name),
            allocation=1 - config.sparsity,
            schedule=config.schedule,
            where=PRUNABLE,
        )
        state = jax.eval_shape(transform.init, matrices)
        after = jax.eval_shape(transform.update, matrices, state, matrices)[1]
        size = sum(math.prod(m.shape) for m in jax.tree.leaves(after.masks))
        lines.append(
            f"{GRANULARITIES[name]}: one step of gradual pruning traces, masks of {size:,} entries"
        )
    traced = trace_step(
        images,
        lambda params, inner: sj.gradual_pruning(
            inner,
            allocation=1 - config.sparsity,
            schedule=config.schedule,
            where=PRUNABLE,
        ),
    )
    lines.append(
        f"a training step of the whole network, pruned unstructured, traces for {IMAGES} images of "
        f"{traced.side} x {traced.side}, forward and backward"
    )
    lines.append(
        "checked abstractly: the article has no setting of its own; a run wants imagenet2012 "
        "prepared by TFDS, a training loop of this experiment on images, and the residual units "
        "tied for whole channels"
    )
    return lines


EXPERIMENT = Experiment(
    slug=SLUG,
    paper='Ten lessons we have learned in the new "Sparseland"',
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
