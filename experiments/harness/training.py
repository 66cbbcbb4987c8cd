"""The training loop of every experiment: progress, metrics, checkpoints, and clean endings."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import ExperimentError
from experiments.harness.progress import training_bar
from experiments.harness.run import InterruptedRunError, Run, resume_hint
from experiments.harness.sharding import place_batch


class TrainingFailedError(ExperimentError):
    """The loss is no number any more."""


def size_of(tree: PyTree) -> int:
    """How many numbers the arrays of a tree are, or the shapes of one that is not built."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def train(
    run: Run,
    trial: str,
    *,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    batches: Any,
    steps: int,
    inspect: Callable[[Any], Mapping[str, Any]] | None = None,
    mesh: Mesh | None = None,
    slug: str,
) -> Any:
    """Trains for a number of steps, continuing where an earlier run of the trial was stopped.

    Args:
      run: folder and settings.
      trial: name of the trial, its folder below `trials/`.
      state: PyTree of arrays; everything that a step changes, PRNG keys as key data included.
      step: jitted; returns the new state and scalar metrics with a `loss`.
      batches: iterator with `get_state` and `set_state`; a host's part of each batch.
      steps: how many.
      inspect: jitted; more scalar metrics of a state, taken when metrics are logged.
      mesh: where batches go.
      slug: the experiment, for the command that resumes.

    Returns:
      The final state.

    Raises:
      InterruptedRunError: after Ctrl-C, once the state is saved.
      TrainingFailedError: a loss that is NaN or infinite, with its step and the last checkpoint.
    """
    folder = run.folder / "trials" / trial
    checkpoints = Checkpoints(folder)
    first = 0
    try:
        if checkpoints.latest() is not None:
            first, state, extra = checkpoints.restore(state)
            batches.set_state(extra["data"])
        if run.config.resume:
            run.forget_after(trial, first)
        pending: list[jax.Array] = []
        started, begun = time.time(), first
        with training_bar(run.console, trial, total=steps, completed=first) as bar:
            for done in range(first + 1, steps + 1):
                state, metrics = step(state, place_batch(next(batches), mesh))
                pending.append(metrics["loss"])
                last = done == steps
                stopping = run.stopping.is_set()
                if done % run.config.log_every == 0 or last or stopping:
                    _check_losses(run, trial, pending, done, checkpoints.latest(), slug)
                    pending.clear()
                    values = dict(metrics) | dict(inspect(state) if inspect else {})
                    numbers = {name: float(value) for name, value in values.items()}
                    run.log(trial=trial, step=done, **numbers)
                    rate = (done - begun) / max(time.time() - started, 1e-9)
                    bar(done, rate, numbers)
                if done % run.config.checkpoint_every == 0 or last or stopping:
                    checkpoints.save(done, state, {"data": batches.get_state()})
                    run.keep_time()
                if stopping and not last:
                    raise InterruptedRunError(
                        f"stopped at step {done} of {trial}, saved; continue with: "
                        + resume_hint(slug, run.folder)
                    )
    finally:
        checkpoints.close()
    return state


def is_finished(run: Run, trial: str, steps: int) -> bool:
    """Whether a trial was trained to its end before."""
    return (run.folder / "trials" / trial / str(steps)).is_dir()


def _check_losses(
    run: Run, trial: str, losses: list[jax.Array], done: int, saved: int | None, slug: str
) -> None:
    for i, loss in enumerate(losses):
        if not math.isfinite(float(loss)):
            step = done - len(losses) + 1 + i
            where = "no checkpoint was written yet"
            if saved is not None:
                where = f"the last good checkpoint is step {saved} in {run.folder}/trials/{trial}"
            raise TrainingFailedError(
                f"the loss of {trial} is {float(loss)} at step {step}; {where}"
            )
