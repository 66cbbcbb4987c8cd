"""A run: its folder, its metrics, its summary, and what ends it."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from rich.console import Console

from experiments.harness.config import (
    Experiment,
    ExperimentError,
    Result,
    RunConfig,
    as_json,
    is_of,
)
from experiments.harness.sharding import initialize_hosts

ELAPSED = "elapsed.json"


class InterruptedRunError(Exception):
    """The user asked to stop; everything is saved."""


class Run:
    """The folder of a run and everything written to it.

    Only process 0 writes metrics, figures and summaries; checkpoints are written by all.

    Attributes:
      folder: `<out>/<slug>/<time>`. console: prints on process 0 only.
      stopping: set by Ctrl-C; training loops look at it between two steps.
    """

    def __init__(self, slug: str, config: RunConfig):
        self.config = config
        self.is_main = jax.process_index() == 0
        self.console = Console(quiet=not self.is_main, highlight=False)
        self.stopping = threading.Event()
        self._started, self._earlier = time.time(), 0.0
        if config.resume:
            self.folder = pathlib.Path(config.resume)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._earlier = float(json.loads((self.folder / ELAPSED).read_text())["seconds"])
        else:
            self.folder = _new_folder(pathlib.Path(config.out) / slug)
            if self.is_main:
                write_json(self.folder / "config.json", as_json(config))

    @property
    def seconds(self) -> float:
        """How long the run has taken, with the parts before it was resumed."""
        return self._earlier + time.time() - self._started

    def keep_time(self) -> None:
        """Writes down how long it has taken, for when it is resumed."""
        if self.is_main:
            write_json(self.folder / ELAPSED, {"seconds": round(self.seconds, 1)})

    def show(self, text: str) -> None:
        """Prints a line as it is."""
        self.console.print(text, soft_wrap=True, markup=False)

    def log(self, **values: Any) -> None:
        """Appends a line to `metrics.jsonl`."""
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    def metrics(self, trial: str) -> list[dict[str, Any]]:
        """The lines that a trial has logged, oldest first."""
        return [line for line in self._lines() if line.get("trial") == trial]

    def forget_after(self, trial: str, step: int) -> None:
        """Drops the lines of a trial beyond `step`, which a resumed trial writes anew."""
        if not self.is_main:
            return
        kept = [x for x in self._lines() if x.get("trial") != trial or x.get("step", 0) <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomic(self.folder / "metrics.jsonl", text)

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = []
        for line in path.read_text().splitlines():
            # a killed run may leave half a line behind
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines


def execute(experiment: Experiment, config: Any) -> Result | None:
    """Runs an experiment from its settings to `summary.json`; prints the claim lines last.

    Returns:
      None where a preset was only checked abstractly.

    Raises:
      InterruptedRunError: after Ctrl-C, with how to resume.
    """
    initialize_hosts(config)
    if is_of(config.preset, "paper") and experiment.check is not None:
        lines = experiment.check(config)
        for line in lines:
            Console(highlight=False).print(line, soft_wrap=True, markup=False)
        if lines:
            return None
    run = Run(experiment.slug, config)
    run.console.print(f"[bold]{experiment.slug}[/] ({config.preset}) in {run.folder}")
    try:
        with _ctrl_c(run):
            result = experiment.run(config, run)
    finally:
        run.keep_time()
    run.show("card: " + ", ".join(f"{k} {v}" for k, v in result.card.to_dict().items()))
    for claim in result.claims:
        run.console.print(claim.line, soft_wrap=True, style="bold")
    if run.is_main:
        write_json(run.folder / "summary.json", _summary(experiment, config, run, result))
    run.console.print(f"everything is in {run.folder}", soft_wrap=True)
    return result


def resume_hint(experiment_slug: str, folder: pathlib.Path) -> str:
    """The command that continues a run."""
    return f"python -m experiments.{experiment_slug} --resume {folder}"


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes JSON atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sparsejax")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _summary(experiment: Experiment, config: Any, run: Run, result: Result) -> dict[str, Any]:
    first = result.claims[0]
    return {
        "slug": experiment.slug,
        "paper": experiment.paper,
        "preset": config.preset,
        "claim": first.sentence,
        "holds": first.holds,
        "ours": first.ours,
        "baseline": first.baseline,
        "seeds": first.seeds,
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        "card": result.card.to_dict(),
        "metrics": dict(result.metrics),
        "tables": [dataclasses.asdict(table) for table in result.tables],
        "seconds": round(run.seconds, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "versions": versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _new_folder(parent: pathlib.Path) -> pathlib.Path:
    """A folder named after the time; all processes agree on process 0's."""
    now = int(time.time())
    if jax.process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        now = int(multihost_utils.broadcast_one_to_all(np.int32(now)))
    name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
    for suffix in ["", *(f"_{i}" for i in range(2, 100))]:
        folder = parent / f"{name}{suffix}"
        if jax.process_index() != 0:
            return folder
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise ExperimentError(f"out is {parent}; it cannot hold a run folder") from None
        except OSError as error:
            raise ExperimentError(
                f"the run folder {folder} cannot be written: {error.strerror}"
            ) from error
    raise ExperimentError(f"{parent} holds a hundred runs of {name}")


@contextlib.contextmanager
def _ctrl_c(run: Run) -> Iterator[None]:
    """The first Ctrl-C asks the loops to save and stop, the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        del signum, frame
        if run.stopping.is_set():
            raise KeyboardInterrupt
        run.stopping.set()
        run.console.print("stopping after this step; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
