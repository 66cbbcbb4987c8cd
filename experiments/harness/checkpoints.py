"""Checkpoints of a training state with Orbax, named by path and checked before they are read."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness.config import ExperimentError
from sparsejax.core.selection import named_leaves


class Checkpoints:
    """The newest checkpoints of one training state.

    A state is stored as its leaves by path, with their shapes and dtypes beside it, so that a
    checkpoint of another model is refused before anything is read.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 1):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError as error:
            raise ExperimentError(f"{folder} cannot be written: {error}") from error
        self._folder = folder

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Writes a checkpoint and waits for it."""
        meta = {"extra": extra, "leaves": _signature(state)}
        arrays = {_key(path): leaf for path, leaf in named_leaves(state)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays),  # type: ignore[call-arg]
                meta=ocp.args.JsonSave(meta),  # type: ignore[call-arg]
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Reads a checkpoint into the structure, dtypes and shardings of `like`.

        Returns:
          Step, state and extra.

        Raises:
          ExperimentError: there is none, it is damaged, or it is of another model (naming a leaf).
        """
        step = self.latest() if step is None else step
        if step is None:
            raise ExperimentError(f"{self._folder} holds no checkpoint")
        try:
            meta = self._manager.restore(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonRestore()),  # type: ignore[call-arg]
            )["meta"]
            stored, extra = dict(meta["leaves"]), dict(meta["extra"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ExperimentError(f"checkpoint {step} of {self._folder} is damaged") from error
        wanted = _signature(like)
        for path in sorted({*stored, *wanted}):
            if stored.get(path) != wanted.get(path):
                raise ExperimentError(
                    f"checkpoint {step} of {self._folder} is of another model: {path!r} is "
                    f"{stored.get(path, 'not there')}, needed is {wanted.get(path, 'nothing')}"
                )
        abstract = {_key(path): _abstract(leaf) for path, leaf in named_leaves(like)}
        try:
            arrays = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract)  # type: ignore[call-arg]
                ),
            )["state"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ExperimentError(f"checkpoint {step} of {self._folder} is damaged") from error
        leaves = [arrays[_key(path)] for path, _ in named_leaves(like)]
        return step, jax.tree.unflatten(jax.tree.structure(like), leaves), extra

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()


def _key(path: str) -> str:
    return path.replace("/", ".")


def _signature(state: Any) -> dict[str, str]:
    return {
        path: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in named_leaves(state)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
