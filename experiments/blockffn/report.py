"""What the BlockFFN experiment shows at its end: tables, figures and verdicts."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

import sparsejax as sj
from experiments.blockffn.config import DRAFT, SHOWN_CHUNK, Config
from experiments.harness.arms import Found, Metrics, arms_table, best_rate, mean
from experiments.harness.config import Claim, Table
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run

CLS = f"test_cls_{SHOWN_CHUNK}"
MORE_CLS, SMALL_GAP, LARGE_GAP, COST, HALF = 0.12, 0.1, 0.2, 0.1, 0.5
SHARING = {"reuse": 3, "sets": 0, "used": 1}  # digits
MARKERS = "osD^vPX*"
Decoding = Mapping[str, list[float]]  # by metric, one value a seed


def compared(config: Config, found: Found) -> Found:
    """The figures of the arms with what is compared: loss above no extra loss, and the gap.

    Every arm is compared at its own rate with the best one of no extra loss, seed by seed.
    """
    plain = best_rate(found["none"])[1]["test_loss"]

    def more(metrics: Metrics) -> Metrics:
        if CLS not in metrics:
            return metrics
        added = np.subtract(metrics["test_loss"], plain).tolist()
        gap = np.subtract(metrics["test_tls"], metrics[CLS]).tolist()
        return {**metrics, "added": added, "gap": gap}

    return {
        name: {rate: more(metrics) for rate, metrics in by_rate.items()}
        for name, by_rate in found.items()
    }


def make_tables(config: Config, found: Found, decoding: Decoding) -> tuple[Table, ...]:
    """The arms, the seeds of the claims' arms, the unions of chunks, and speculative decoding."""

    def alone(value: float) -> str:
        return f"{value:.3f}"

    arms = arms_table(
        f"Byte models with experts, {config.steps} steps, {config.seeds} seed(s)",
        found,
        config.labels(),
        {
            "test_loss": ("nats", alone),
            "added": ("more nats", 3),
            "test_tls": ("TLS", alone),
            CLS: (f"CLS_{SHOWN_CHUNK}", alone),
            "gap": ("gap", alone),
        },
    )
    return (
        arms,
        _sharing(config, found),
        _each_seed(config, found),
        _unions(config, found, decoding),
        _drafts(config, decoding),
    )


def _sharing(config: Config, found: Found) -> Table:
    rows = []
    for name, losses in config.losses().items():
        metrics = best_rate(found[name])[1]
        cells = (mean_and_deviation(metrics[key], n) for key, n in SHARING.items())
        rows.append((losses.label, *cells))
    title = f"How the {config.experts} experts of a layer are shared by tokens"
    return Table(title, ("method", "reuse ratio", "sets of experts", "experts used"), tuple(rows))


def _each_seed(config: Config, found: Found) -> Table:
    best = {name: best_rate(found[name])[1] for name in config.shown}
    rows = [
        (
            f"{config.labels()[name]} ({seed})",
            *(f"{best[name][key][i]:.3f}" for key in ("test_loss", "test_tls", CLS, "gap")),
            f"{best[name]['sets'][i]:.0f}",
        )
        for name in config.shown
        for i, seed in enumerate(config.seed_list())
    ]
    header = ("run", "nats", "TLS", f"CLS_{SHOWN_CHUNK}", "gap", "sets")
    return Table("Seed by seed (gap: TLS - CLS)", header, tuple(rows))


def _unions(config: Config, found: Found, decoding: Decoding) -> Table:
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    columns = [np.mean(best[name]["cls"], axis=0) for name in config.shown]
    columns.insert(2, l1_of_equal_loss(config, found).mean(axis=0))
    rows = [
        (
            str(chunk),
            *(f"{1 - column[i]:.3f}" for column in columns),
            f"{max(decoding[f'difference-{chunk}']):.0e}",
        )
        for i, chunk in enumerate(config.eval_chunks)
    ]
    none, l1, ours = (config.labels()[name] for name in config.shown)
    title = "Experts that a chunk of tokens reads; error: of our logits from them alone"
    return Table(title, ("tokens", none, l1, "L1, equal loss", ours, "error"), tuple(rows))


def l1_of_equal_loss(config: Config, found: Found) -> Float[np.ndarray, "seeds lengths"]:
    """CLS at every length of a chunk of an L1 that costs as much as our losses do in that seed.

    Between factors that were trained, no loss among them, it is interpolated; beyond, the nearest.
    """
    names = ("none", *(losses.name for losses in config.losses().values() if losses.l1))
    best = [best_rate(found[name])[1] for name in names]
    rows = []
    for seed, ours in enumerate(best_rate(found[config.ours])[1]["added"]):
        points = sorted((metrics["added"][seed], metrics["cls"][seed]) for metrics in best)
        cost, cls = zip(*points)
        rows.append([np.interp(ours, cost, each) for each in zip(*cls)])
    return np.asarray(rows)


def _drafts(config: Config, decoding: Decoding) -> Table:
    rows = []
    for name in config.shown:
        for k in config.draft_tokens:
            values = {key: decoding[f"{name}-{k}-{key}"] for key in ("accepted", "tokens", "union")}
            cells = [mean_and_deviation(v) for v in values.values()]
            same = f"{mean(decoding[f'{name}-{k}-greedy']):.1%}"
            rows.append((f"{config.labels()[name]}, {k}", *cells, same))
    header = ("model", "accepted", "a call", "experts", "greedy")
    title = f"Speculative decoding of {config.prompts} prompts, by the length of a draft"
    return Table(title, header, tuple(rows))


def make_claims(config: Config, found: Found, decoding: Decoding) -> tuple[Claim, ...]:
    """The losses against L1, at the first factor and at equal loss, and what drafts read."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    none, l1, ours = (config.labels()[name] for name in config.shown)

    def figures(name: str) -> list[float]:
        return [mean(best[name][key]) for key in (CLS, "gap", "added")]

    def say(cls: float, gap: float, added: float) -> str:
        return f"CLS_{SHOWN_CHUNK} {cls:.3f}, gap {gap:.3f}, {added:+.3f} nats"

    our_cls, our_gap, our_cost = figures(config.ours)
    l1_cls, l1_gap, l1_cost = figures(config.baseline)
    lengths = [config.eval_chunks.index(n) for n in sorted({SHOWN_CHUNK, config.chunk})]
    mine = np.asarray(best[config.ours]["cls"])[:, lengths]
    theirs = l1_of_equal_loss(config, found)[:, lengths]
    names = " and ".join(f"CLS_{config.eval_chunks[i]}" for i in lengths)
    most = max(config.draft_tokens)
    reads = [mean(decoding[f"{name}-{most}-union"]) for name in (config.ours, "none")]
    same = [mean(v) for name, v in decoding.items() if name.endswith("-greedy")]
    return (
        Claim(
            f"{ours} has a CLS_{SHOWN_CHUNK} at least {MORE_CLS} above that of {l1} and TLS - "
            f"CLS_{SHOWN_CHUNK} below {SMALL_GAP}, where L1 leaves more than {LARGE_GAP}, for less "
            f"than {COST} nats above {none}",
            our_cls >= l1_cls + MORE_CLS
            and our_gap < SMALL_GAP
            and l1_gap > LARGE_GAP
            and our_cost < COST,
            say(our_cls, our_gap, our_cost),
            say(l1_cls, l1_gap, l1_cost),
            config.seeds,
        ),
        Claim(
            f"{ours} has a higher {names} than an L1 that costs as many nats (interpolated between "
            "its factors), in every seed",
            bool((mine > theirs).all()),
            ", ".join(mean_and_deviation(values) for values in mine.T.tolist()),
            ", ".join(mean_and_deviation(values) for values in theirs.T.tolist()),
            config.seeds,
        ),
        Claim(
            f"drafts of {most} tokens are checked from at most {HALF} of the experts that {none} "
            f"reads for them, and every text is the model's own greedy one",
            reads[0] <= HALF * reads[1] and min(same) == 1,
            f"{reads[0]:.3f} of the experts",
            f"{reads[1]:.3f}; {np.mean(same):.1%} of the texts equal",
            config.seeds,
        ),
    )


def make_card(config: Config) -> sj.SparsityCard:
    """What was sparse, how and when."""
    rates = f"{len(config.learning_rates)} learning rate(s)"
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.BLOCK,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.LEARNED,
        criterion=sj.Criterion.SCORE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.steps} steps and {rates} for every arm",
        simulated=True,
    )


def draw(run: Run, config: Config, found: Found) -> None:
    """What sparsity costs, CLS along the length of a chunk, and sparsity along training."""
    labels = config.labels()
    best = {labels[name]: best_rate(found[name])[1] for name in labels if name != DRAFT}
    _draw_trade_off(run, config, best)
    by_chunk = {
        label: [(config.eval_chunks, each) for each in metrics["cls"]]
        for label, metrics in best.items()
    }
    figures = [("cls_by_chunk", by_chunk, "tokens of a chunk", "CLS: experts it leaves off")]
    for key, y in (("tls", "TLS"), (f"cls_{SHOWN_CHUNK}", f"CLS_{SHOWN_CHUNK}")):
        curves = {
            label: [(each["step"], each[key]) for each in metrics["curves"]]
            for label, metrics in best.items()
        }
        figures.append((key, curves, "training step", f"{y} of the batch"))
    for name, curves, x, y in figures:
        figure, axes = new_figure(f"{config.seeds} seed(s), band: range", x, y, size=(8.6, 4.2))
        draw_curves(axes, curves)
        if name == "cls_by_chunk":
            axes.set_xscale("log", base=2)
            axes.set_xticks(config.eval_chunks, labels=map(str, config.eval_chunks))
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        save(figure, run.folder / f"{name}.png")


def _draw_trade_off(run: Run, config: Config, best: Mapping[str, Metrics]) -> None:
    figure, axes = new_figure(
        f"hollow: TLS, filled: CLS_{SHOWN_CHUNK}, small: seeds; {config.seeds} seed(s)",
        "validation loss above no extra loss (nats per byte)",
        "share of experts that are not read",
        size=(8.6, 4.2),
    )
    for i, (label, metrics) in enumerate(best.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        cost, tls, cls = (mean(metrics[key]) for key in ("added", "test_tls", CLS))
        axes.vlines(cost, cls, tls, color=color, linewidth=0.8, alpha=0.6)
        axes.scatter(metrics["added"], metrics[CLS], color=color, marker=marker, s=10, alpha=0.5)
        style = {"color": color, "marker": marker, "linestyle": ""}
        axes.plot(cost, tls, **style, markerfacecolor="white")
        axes.plot(cost, cls, **style, label=label)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    save(figure, run.folder / "trade_off.png")
