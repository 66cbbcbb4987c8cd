"""What every experiment is told: the settings that all share, and the experiment's own."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from sparsejax.core.card import SparsityCard


class ExperimentError(ValueError):
    """Something the user can mend; the command line prints it as one line."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings that all experiments share."""

    preset: str = "laptop"
    """Set of defaults to start from: laptop, test or paper."""
    seeds: int = 3
    """How many seeds each method is run with."""
    seed: int = 0
    """The first of them."""
    out: str = "runs"
    """Folder under which the run gets its own folder."""
    resume: str | None = None
    """Folder of an earlier run to continue; its settings are used."""
    mesh: str | None = None
    """Device mesh, for example data=4,model=2; None uses one device."""
    multihost: bool = False
    """Several processes: calls jax.distributed.initialize first."""
    coordinator: str | None = None
    """With --multihost outside a cluster: address of process 0, HOST:PORT."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: the number of this one."""
    checkpoint_every: int = 300
    """Training steps between two checkpoints."""
    log_every: int = 10
    """Training steps between two lines of metrics."""

    def __post_init__(self) -> None:
        for name in ("seeds", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ExperimentError(f"seed is {self.seed}; it must not be negative")

    def seed_list(self) -> list[int]:
        """The seeds to run."""
        return list(range(self.seed, self.seed + self.seeds))


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and what the run showed.

    Attributes:
      sentence: the claim. holds: whether it does here.
      ours, baseline: the figures compared. seeds: how many runs each is a mean of.
    """

    sentence: str
    holds: bool
    ours: str
    baseline: str
    seeds: int

    @property
    def line(self) -> str:
        """The claim line of every experiment."""
        verdict = "holds" if self.holds else "does not hold"
        plural = "seed" if self.seeds == 1 else "seeds"
        return (
            f"claim: {self.sentence} - {verdict} "
            f"(ours {self.ours}, baseline {self.baseline}, {self.seeds} {plural})"
        )


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results: the first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
      claims: the first is the one of the paper that the README shows.
      card: what was sparse, how and when; printed and saved with the figures.
      metrics: figures for `summary.json`.
      tables: for `RESULTS.md`; printed by the experiment itself.
    """

    claims: tuple[Claim, ...]
    card: SparsityCard
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: tuple[Table, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment as the command line knows it.

    Attributes:
      slug: its name. paper: title and source.
      presets: settings by name. run: does the work, given settings and a run folder.
      check: what `--preset paper` does where the setting cannot be run yet: builds everything
        abstractly and returns lines to print, or none where nothing is in the way. None runs it.
      variants: what `--variant` may name, where one experiment trains different things. Presets of
        the first have plain names; of another one, `NAME` is its laptop preset and `NAME_test` its
        preset `test`.
    """

    slug: str
    paper: str
    presets: Mapping[str, Any]
    run: Callable[[Any, Any], Result]
    check: Callable[[Any], list[str]] | None = None
    variants: tuple[str, ...] = ()


def check_rates(rates: tuple[float, ...]) -> None:
    """Refuses learning rates that are not positive and different."""
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ExperimentError(f"learning_rates are {rates}; give positive ones that differ")


def is_of(preset: str, kind: str) -> bool:
    """Whether a preset is of a kind, as `paper` and the `mae_paper` of a variant are `paper`."""
    return preset == kind or preset.endswith(f"_{kind}")


def as_json(config: RunConfig) -> dict[str, Any]:
    """The settings as plain JSON values, without the folder they may have been resumed from."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    del values["resume"]
    return values


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Settings of an earlier run; the file is not trusted.

    Raises:
      ExperimentError: no such file, or it holds no settings.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ExperimentError(f"{path.parent} is no run folder: {error.strerror}") from error
    except ValueError as error:
        raise ExperimentError(f"{path} is damaged: {error}") from error
    simple = (bool, int, float, str, type(None))
    if not isinstance(values, dict) or not all(
        isinstance(v, simple) or (isinstance(v, list) and all(isinstance(x, simple) for x in v))
        for v in values.values()
    ):
        raise ExperimentError(f"{path} is damaged: it holds no settings")
    return values


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Settings as command-line arguments, so that they are checked like those."""
    arguments: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments
