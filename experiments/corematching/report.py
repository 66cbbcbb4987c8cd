"""What the CoreMatching experiment shows at its end: tables, figures and verdicts."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import sparsejax as sj
from experiments.corematching.cells import SHOWN, test_cells
from experiments.corematching.config import BLIND, LABELS, Config
from experiments.corematching.neurons import KIND_LABELS, KINDS
from experiments.corematching.overlap import overlap_maps
from experiments.corematching.times import WAY_LABELS, WAYS
from experiments.harness.arms import mean
from experiments.harness.config import Claim, Table
from experiments.harness.digits import static_settings
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run

Found = Mapping[int, Mapping[str, list[float]]]  # by layer
Neurons = Mapping[str, Mapping[str, list[float]]]  # by share, and "dense"
CLAIMED = ("elbow", "4", "8")
SHOWN_SAMPLES = 4


def names_of(config: Config, layer: int) -> list[str]:
    """What chooses tokens behind a layer; a question that is blind there gives no attention."""
    given = (*config.reference, "random")
    return [n for n in LABELS if n in given and (n != "attention" or layer >= BLIND)]


def token_tables(config: Config, found: Found) -> tuple[Table, Table]:
    """How often the asked cell stays, and the answers, by layer and rule."""
    names = [name for name in LABELS if name in (*config.reference, "random")]

    def cell(layer: int, name: str, rule: str, what: str) -> str:
        if name not in names_of(config, layer):
            return "-"
        text = percent(found[layer][f"{name}-{rule}-{what}"])
        if what == "accuracy":
            return text
        return f"{text} of {mean(found[layer][f'{name}-{rule}-kept']):.1f}"

    def percent(values: list[float]) -> str:
        return mean_and_deviation([100 * value for value in values], 1)

    recalls, accuracies = [], []
    for layer, values in found.items():
        accuracies.append([f"all tokens, layer {layer}", "", percent(values["full"])])
        accuracies[-1] += [""] * (len(names) - 1)
        for rule in config.keep:
            place = f"{rule if rule == 'elbow' else f'top {rule}'}, layer {layer}"
            recalls.append([place, *(cell(layer, name, rule, "recall") for name in names)])
            kept = f"{mean(values[f'token-{rule}-kept']):.1f}"
            answers = [cell(layer, name, rule, "accuracy") for name in names]
            accuracies.append([place, kept, *answers])
    labels = [LABELS[name] for name in names]
    samples = f"{config.samples} samples, {config.seeds} decoder(s)"
    return (
        Table(
            f"Asked cell among the kept (%) of how many of {config.vision_tokens}, {samples}",
            ("kept, behind", *labels),
            tuple(map(tuple, recalls)),
        ),
        Table(
            f"Accuracy (%) when later layers see the kept tokens alone, {samples}",
            ("kept, behind", "tokens", *labels),
            tuple(map(tuple, accuracies)),
        ),
    )


def neuron_table(config: Config, label: str, found: Neurons) -> Table:
    """Perplexity behind the prompts for each share of the neurons."""
    dense = mean_and_deviation(perplexities(found["dense"]["dense"]), 2)
    rows = [
        (share, *(mean_and_deviation(perplexities(values[kind]), 2) for kind in KINDS))
        for share, values in found.items()
        if share != "dense"
    ]
    title = (
        f"Perplexity of {config.continuation} tokens behind prompts of {config.prompt}, {label}, "
        f"layers {config.core_layers}, dense {dense}; {config.seeds} draw(s) of {config.prompts} "
        "prompts"
    )
    return Table(title, ("neurons", *KIND_LABELS.values()), tuple(rows))


def decoder_table(config: Config, times: Mapping[str, Any]) -> Table:
    """Milliseconds of a prompt and of a token in the decoder of LLaVA's form."""
    rows = []
    for way in WAYS:
        cells = []
        for part in ("prompt", "token"):
            one = times[part].get(way)
            cells.append("" if one is None else f"{one['ms']:.2f} ({faster(one)})")
        rows.append((WAY_LABELS[way], *cells))
    layers, d, _, f = config.timed
    title = (
        f"Milliseconds in a decoder with {layers} layers of width {d} and {f} neurons, 640 tokens "
        f"of which {config.capacity} stay, {config.vision_beta:.0%} of the neurons"
    )
    return Table(title, ("pruned", "a prompt", "a token behind it"), tuple(rows))


def faster(one: Mapping[str, float]) -> str:
    """How many times faster than the dense model, by the clock and by CPU time."""
    return f"{1 / one['ratio']:.2f}x, CPU {1 / one['cpu_ratio']:.2f}x"


def speed_table(label: str, times: Mapping[str, Mapping[str, float]]) -> Table:
    """Tokens a second of the language model."""
    rows = [(name, f"{1e3 / one['ms']:.1f}", faster(one)) for name, one in times.items()]
    header = ("neurons", "tokens a second", "faster")
    return Table(f"Greedy decoding of {label}, neurons gathered once", header, tuple(rows))


def perplexities(losses: list[float]) -> list[float]:
    """From nats, one a draw."""
    return [math.exp(value) for value in losses]


def token_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """Recall behind the last layer of the choice, and answers behind the first."""
    first, last = min(found), max(found)
    claims = []
    if "elbow" in config.keep:
        recall = [100 * value for value in found[last]["token-elbow-recall"]]
        kept = found[last]["token-elbow-kept"]
        chance = 100 * mean(kept) / config.vision_tokens
        claims.append(
            Claim(
                f"behind layer {last} the tokens above the elbow of the overlap with the question "
                "hold the asked one at least twice as often as chance",
                mean(recall) >= 2 * chance,
                f"{mean_and_deviation(recall, 1)} %",
                f"chance {chance:.1f} % with {mean(kept):.1f} of {config.vision_tokens} kept",
                config.seeds,
            )
        )
    rules = [rule for rule in CLAIMED if rule in config.keep] or list(config.keep)
    ours, theirs = (
        [[100 * v for v in found[first][f"{name}-{rule}-accuracy"]] for rule in rules]
        for name in ("token", "random")
    )
    better = sum(all(a > b for a, b in pairs) for pairs in map(zip, zip(*ours), zip(*theirs)))
    claims.append(
        Claim(
            f"behind layer {first} tokens chosen by overlap answer more than as many random ones, "
            f"{', '.join(rule if rule == 'elbow' else f'top {rule}' for rule in rules)}",
            all(mean(a) > mean(b) for a, b in zip(ours, theirs)),
            f"{', '.join(mean_and_deviation(values, 1) for values in ours)} %, more at each with "
            f"{better} of {config.seeds} decoders",
            f"{', '.join(mean_and_deviation(values, 1) for values in theirs)} %",
            config.seeds,
        )
    )
    return tuple(claims)


def neuron_claims(config: Config, found: Neurons, times: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Whether core neurons beat random ones and another prompt's at every share, and the speed."""
    shares = [share for share in found if share != "dense"]

    def lower(other: str, sentence: str) -> Claim:
        ours, theirs = (
            [mean(perplexities(found[share][kind])) for share in shares] for kind in ("own", other)
        )
        return Claim(
            f"{sentence}, at {', '.join(shares)} of them in layers {config.core_layers}",
            all(a < b for a, b in zip(ours, theirs)),
            ", ".join(f"{value:.4g}" for value in ours),
            ", ".join(f"{value:.4g}" for value in theirs),
            config.seeds,
        )

    claims = [
        lower("random", "the core neurons of a prompt have a lower perplexity behind it than as "
              "many random ones"),
        lower("other", "they have a lower perplexity than the core neurons of another prompt"),
    ]  # fmt: skip
    if times:
        rates = {name: 1e3 / one["ms"] for name, one in times.items()}
        claims.append(
            Claim(
                "decoding with core neurons gathered once is faster, at every share",
                all(times[share]["ratio"] < 1 for share in shares),
                ", ".join(f"{rates[share]:.1f}" for share in shares) + " tokens/s",
                f"dense {rates['dense']:.1f} tokens/s",
                1,
            )
        )
    return tuple(claims)


def make_card(config: Config, budget: str) -> sj.SparsityCard:
    """The card of sparse inference."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.CHANNEL,
        timing=sj.Timing.AFTER,
        path=sj.TrainingPath.DENSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.SCORE,
        gradient=sj.GradientRule.DENSE,
        seeds=config.seeds,
        budget=budget,
        simulated=True,
    )


def draw_kept(config: Config, run: Run, found: Found) -> None:
    """Accuracy, and recall of the asked cell, against the tokens kept; diamonds are elbows."""
    counts = sorted(int(rule) for rule in config.keep if rule != "elbow")
    for layer, values in found.items():
        names = names_of(config, layer)
        whole = {"accuracy": values["full"], "recall": [1.0] * config.seeds}
        for what, label in (("accuracy", "accuracy (%)"), ("recall", "asked cell kept (%)")):
            figure, axes = new_figure(
                f"Later layers than {layer} see the kept tokens alone ({config.seeds} decoders; "
                "diamonds: elbow)",
                f"image tokens kept of {config.vision_tokens}",
                label,
            )
            curves = {}
            for name in names:
                kinds = [values[f"{name}-{count}-{what}"] for count in counts]
                each = 100 * np.asarray([*kinds, whole[what]]).T
                curves[LABELS[name]] = [([*counts, config.vision_tokens], one) for one in each]
            draw_curves(axes, curves, order=list(LABELS.values()))
            for name in names if "elbow" in config.keep else ():
                color = COLORS[list(LABELS).index(name)]
                x, y = (mean(values[f"{name}-elbow-{m}"]) for m in ("kept", what))
                axes.scatter([x], [100 * y], color=color, marker="D", s=42, zorder=3)
            axes.legend(frameon=False)
            save(figure, run.folder / f"{what}-layer{layer}.png")


def draw_overlap(config: Config, run: Run, graph: Any, params: Any) -> None:
    """Some samples: their digits, and the overlap of every cell with the question, by layer."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    cells = test_cells(config, config.seed, SHOWN_SAMPLES, SHOWN)
    maps = np.asarray(overlap_maps(graph, params, cells, config=static_settings(config)))
    layers = config.select_layer
    wide = math.ceil(config.vision_tokens**0.5)
    high = -(-config.vision_tokens // wide)
    size = round(cells.patches.shape[-1] ** 0.5)
    figure, rows = plt.subplots(
        1 + len(layers), SHOWN_SAMPLES, dpi=130, layout="constrained", squeeze=False,
        figsize=(2.1 * SHOWN_SAMPLES, 2.2 * (1 + len(layers))),
    )  # fmt: skip
    missing = wide * high - config.vision_tokens
    for sample in range(SHOWN_SAMPLES):
        digits = np.pad(np.asarray(cells.patches[sample]), ((0, missing), (0, 0)))
        picture = digits.reshape(high, wide, size, size).swapaxes(1, 2).reshape(high * size, -1)
        asked = int(cells.asked[sample])
        rows[0, sample].imshow(picture, cmap="gray_r")
        for line in range(1, max(wide, high)):
            rows[0, sample].axhline(line * size - 0.5, color=COLORS[5], linewidth=0.6)
            rows[0, sample].axvline(line * size - 0.5, color=COLORS[5], linewidth=0.6)
        corner = (asked % wide, asked // wide)
        frame = {"fill": False, "edgecolor": COLORS[1], "linewidth": 2}
        place = (corner[0] * size - 0.5, corner[1] * size - 0.5)
        rows[0, sample].add_patch(Rectangle(place, size, size, **frame))
        for row, layer in zip(rows[1:, sample], layers):
            heat = np.pad(maps[layer, sample].astype(float), (0, missing), constant_values=np.nan)
            shown = row.imshow(heat.reshape(high, wide), cmap="viridis")
            row.add_patch(Rectangle((corner[0] - 0.5, corner[1] - 0.5), 1, 1, **frame))
            figure.colorbar(shown, ax=row, shrink=0.75)
            if sample == 0:
                row.set_ylabel(f"overlap, layer {layer}")
        rows[0, sample].set_title(f"asked: {int(cells.labels[sample])}", fontsize=9)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle("Neurons active for both a cell and the question (frame: the asked cell)",
                    fontsize=10)  # fmt: skip
    save(figure, run.folder / "overlap.png")


def draw_neurons(config: Config, run: Run, label: str, found: Neurons) -> None:
    """Perplexity against the share of the neurons."""
    from matplotlib.ticker import LogLocator

    figure, axes = new_figure(
        f"{label}\nread with some neurons alone, {config.seeds} draws of {config.prompts} prompts",
        "share of the neurons",
        "perplexity",
    )
    shares = [share for share in found if share != "dense"]
    curves = {}
    for kind, name in KIND_LABELS.items():
        each = np.exp(np.asarray([found[share][kind] for share in shares])).T
        curves[name] = [([float(share) for share in shares], one) for one in each]
    draw_curves(axes, curves)
    dense = mean(perplexities(found["dense"]["dense"]))
    axes.axhline(dense, color=COLORS[-1], linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, run.folder / "neurons.png")


def draw_speed(run: Run, label: str, times: Mapping[str, Mapping[str, float]]) -> None:
    """Tokens a second against the share of the neurons."""
    figure, axes = new_figure(f"Greedy decoding of {label}", "neurons", "tokens a second")
    rates = [1e3 / one["ms"] for one in times.values()]
    colors = [COLORS[-1] if name == "dense" else COLORS[0] for name in times]
    axes.bar(list(times), rates, color=colors, width=0.6)
    for x, (rate, one) in enumerate(zip(rates, times.values())):
        axes.text(x, rate, f"{1 / one['ratio']:.2f}x", ha="center", va="bottom", fontsize=9)
    save(figure, run.folder / "speed.png")
