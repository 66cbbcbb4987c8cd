"""Figures that several of the trainings draw: rows of images, and maps of attention."""

import pathlib
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

import sparsejax as sj
from experiments.crate.config import AnyConfig
from experiments.harness.plots import save

HEADS = 6  # in a figure


def draw_rows(
    rows: Mapping[str, Float[np.ndarray, "n h w *c"]], title: str, path: pathlib.Path
) -> None:
    """One row of images below another; those without channels are maps, each over its largest."""
    count = max(map(len, rows.values()))
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(0.85 * count + 1.4, 0.85 * len(rows) + 0.4), dpi=130, squeeze=False
    )
    for axes, (name, images) in zip(grid[:, 0], rows.items(), strict=True):
        if images.ndim == 3:
            images = images / np.maximum(images.max(axis=(1, 2), keepdims=True), 1e-12)
        shown = _side_by_side(images)
        grey = images.ndim == 4 and images.shape[-1] == 1
        axes.imshow(shown[..., 0] if grey else shown, cmap="gray" if grey else "viridis", vmin=0,
                    vmax=1)  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.subplots_adjust(left=0.16, right=0.99, bottom=0.02, top=1 - 0.4 / (len(rows) + 0.4))
    save(figure, path)


def _side_by_side(images: Float[np.ndarray, "n h w *c"]) -> Float[np.ndarray, "h all *c"]:
    """A row of images with gaps of an eighth of their width, which stay empty."""
    gap = max(1, images.shape[2] // 8)
    padding = [(0, 0), (0, 0), (0, gap), *[(0, 0)] * (images.ndim - 3)]
    padded = np.pad(np.asarray(images, np.float32), padding, constant_values=np.nan)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def draw_attention(
    images: Float[np.ndarray, "n h w c"],
    attention: Float[np.ndarray, "n k patches"],
    title: str,
    path: pathlib.Path,
) -> None:
    """What the class token attends to, head by head."""
    rows = {"image": images, "mean of heads": _as_image(attention.mean(1), images)}
    for head in range(min(attention.shape[1], HEADS)):
        rows[f"head {head + 1}"] = _as_image(attention[:, head], images)
    draw_rows(rows, title, path)


def _as_image(
    weights: Float[np.ndarray, "n patches"], images: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n h w"]:
    """A weight a patch, drawn over the pixels of that patch."""
    across = round(weights.shape[1] ** 0.5)
    patch = images.shape[1] // across
    grid = weights.reshape(-1, across, across)
    return grid.repeat(patch, axis=1).repeat(patch, axis=2)


def make_card(config: AnyConfig, budget: str) -> sj.SparsityCard:
    """The card of codes that a soft threshold makes sparse."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.LEARNED,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=budget,
        simulated=True,
    )
