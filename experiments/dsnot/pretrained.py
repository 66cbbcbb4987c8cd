"""DSnoT on a pretrained language model: every start, with and without swaps, at every amount."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.dsnot.config import LABELS, SLUG, Config, parse_amount
from experiments.dsnot.report import make_card
from experiments.harness import digits
from experiments.harness.config import Claim, Result, Table
from experiments.harness.data import validation_windows
from experiments.harness.language import LanguageModel
from experiments.harness.perplexity import Perplexity, make_perplexity
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.pretrained import (
    calibration_windows,
    evaluation_batch,
    export,
    pretrained_model,
)
from experiments.harness.progress import layer_bar, make_table
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh
from sparsejax import weights
from sparsejax.models import parameter_count


@dataclasses.dataclass(frozen=True)
class Arm:
    """A column of the table: a start, and what is done to it.

    Attributes:
      start: magnitude, wanda or sparsegpt. swaps: DSnoT on top.
      update: SparseGPT's own update of the weights; its mask alone is what DSnoT starts from.
    """

    start: str
    swaps: bool = False
    update: bool = False

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.start}{'-dsnot' * self.swaps}{'-updated' * self.update}"

    @property
    def label(self) -> str:
        """For people."""
        if self.swaps:
            return "+ DSnoT"
        mask_only = self.start == "sparsegpt" and not self.update
        return LABELS["mask" if mask_only else self.start]

    def method(self, config: Config, amount: str) -> weights.PruneMethod:
        """The arm for the library."""
        return weights.PruneMethod(
            "dsnot" if self.swaps else self.start,  # type: ignore[arg-type]
            self.start,  # type: ignore[arg-type]
            **parse_amount(amount),
            update_weights=self.update,
            max_cycles=max(config.cycles),
            threshold=config.threshold,
            var_power=config.var_power,
        )


ARMS = (
    Arm("magnitude"),
    Arm("magnitude", swaps=True),
    Arm("wanda"),
    Arm("wanda", swaps=True),
    Arm("sparsegpt"),
    Arm("sparsegpt", swaps=True),
    Arm("sparsegpt", update=True),
)
Found = Mapping[str, Mapping[Arm, float]]


def run_pretrained(config: Config, run: Run) -> Result:
    """Prunes the model by every arm at every amount and measures its perplexity."""
    mesh = make_mesh(config.mesh)
    model = pretrained_model(config, mesh)
    windows = validation_windows(model.text.validation, config.seq_len)
    windows = windows[: config.eval_windows or None]
    perplexity = make_perplexity(model.logits, batch=evaluation_batch(model, config.seq_len))
    dense = perplexity(model.params, windows)
    run.show(
        f"{model.tokenizer.name}: {parameter_count(model.config):,} parameters, perplexity "
        f"{dense:.2f} on {len(windows)} windows of {windows.shape[1]} tokens"
    )
    arms = [arm for arm in ARMS if arm.start in config.initial]
    found: dict[str, dict[Arm, float]] = {}
    for amount in config.amounts:
        found[amount] = {}
        for arm in arms:
            name = f"{arm.name}-{amount.replace(':', 'of')}"
            once = functools.partial(prune_once, arm, amount, name, config, run, model, perplexity,
                                     windows)  # fmt: skip
            kept = digits.kept_arm(run, SLUG, name, once)
            found[amount][arm] = kept["perplexity"]
            run.show(
                f"{amount} {arm.start}{' + DSnoT' * arm.swaps}{' (updated)' * arm.update}: "
                f"perplexity {kept['perplexity']:.2f}, mean layer error {kept['error']:.3f}"
            )
    table = Table(
        f"Perplexity of {model.tokenizer.name}, dense {dense:.2f}, pruned at once with "
        f"{config.calibration} windows of {config.seq_len + 1} tokens, on {len(windows)} others",
        ("pruned", *(arm.label for arm in arms)),
        tuple((describe(a), *(f"{found[a][arm]:.4g}" for arm in arms)) for a in config.amounts),
    )
    run.console.print(make_table(table.title, table.header, table.rows))
    if run.is_main:
        draw(run, model.tokenizer.name, dense, found)
    card = make_card(
        seeds=1,
        budget=f"{config.calibration} windows of {config.seq_len + 1} tokens, no training",
        patterns=":" in config.amounts[0],
    )
    metrics = {
        "dense": dense,
        "perplexity": {
            a: {arm.name: value for arm, value in row.items()} for a, row in found.items()
        },
    }
    return Result(make_claims(found), card, metrics, (table,))


def prune_once(
    arm: Arm,
    amount: str,
    name: str,
    config: Config,
    run: Run,
    model: LanguageModel,
    perplexity: Perplexity,
    windows: np.ndarray,
) -> dict[str, float]:
    """One cell of the table; the blocks that are done are kept until its end, for a resumed run."""
    # new variables around the same arrays: pruning writes into the model's own
    pruned = nnx.merge(model.graph, jax.tree.map(lambda w: w, model.params))
    tokens = calibration_windows(model.text, length=config.seq_len + 1, count=config.calibration)
    folder = run.folder / "blocks" / name
    with layer_bar(run.console, name, total=7 * model.config.n_layers) as on_layer:
        _, reports = weights.prune_model(
            pruned,
            jnp.asarray(tokens),
            method=arm.method(config, amount),
            skip=config.skip if arm.swaps else None,
            chunk=config.chunk,
            folder=folder,
            mesh=model.mesh,
            on_layer=on_layer,
        )
    after = perplexity(nnx.state(pruned), windows)
    if config.save:
        export(run.folder / "models" / name, pruned, model.tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    return {"perplexity": after, "error": float(np.mean([e for r in reports for e in r.values()]))}


def describe(amount: str) -> str:
    """`2:4`, or a share in percent."""
    return amount if ":" in amount else f"{float(amount):.0%}"


def make_claims(found: Found) -> tuple[Claim, ...]:
    """Whether swaps help every start at every amount, and the order of the starts."""
    claims = []
    for start in ("wanda", "magnitude", "sparsegpt"):
        plain, swapped = Arm(start), Arm(start, swaps=True)
        rows = [row for row in found.values() if plain in row]
        if not rows:
            continue
        label = LABELS["mask" if start == "sparsegpt" else start]
        claims.append(
            Claim(
                f"DSnoT lowers the perplexity of {label} at {', '.join(map(describe, found))}",
                all(row[swapped] < row[plain] for row in rows),
                ", ".join(f"{row[swapped]:.4g}" for row in rows),
                ", ".join(f"{row[plain]:.4g}" for row in rows),
                1,
            )
        )
    order = (Arm("sparsegpt", update=True), Arm("wanda"), Arm("magnitude"))
    rows = [[row[arm] for arm in order] for row in found.values() if set(order) <= set(row)]
    if rows:
        claims.append(
            Claim(
                "SparseGPT has a lower perplexity than Wanda, and Wanda than magnitude, at every "
                "amount",
                all(a < b < c for a, b, c in rows),
                ", ".join(f"{a:.4g}" for a, _, _ in rows),
                ", ".join(f"{b:.4g} and {c:.4g}" for _, b, c in rows),
                1,
            )
        )
    return tuple(claims)


def draw(run: Run, label: str, dense: float, found: Found) -> None:
    """Perplexity of every arm, a group of bars for each amount."""
    arms = list(next(iter(found.values())))
    figure, axes = new_figure(f"{label} pruned at once", "", "perplexity")
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        places = np.arange(len(found)) + (i - (len(arms) - 1) / 2) * width
        color = COLORS[("magnitude", "wanda", "sparsegpt").index(arm.start)]
        name = f"{LABELS['mask' if arm == Arm('sparsegpt') else arm.start]}{' + DSnoT' * arm.swaps}"
        if arm.swaps and arm.start == "sparsegpt":
            name = f"{LABELS['mask']} + DSnoT"
        axes.bar(
            places,
            [row[arm] for row in found.values()],
            width * 0.9,
            color=color,
            alpha=0.55 if arm.swaps else 1.0,
            hatch="//" if arm.update else None,
            label=name,
        )
    axes.axhline(dense, color="black", linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.set_xticks(range(len(found)), labels=[describe(amount) for amount in found])
    axes.legend(frameon=False, ncols=2, fontsize="small")
    save(figure, run.folder / "pretrained.png")
