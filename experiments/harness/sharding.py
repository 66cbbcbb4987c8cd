"""Meshes, and which device holds which part of a training state."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.harness.config import ExperimentError, RunConfig
from sparsejax.core.patterns import NM
from sparsejax.core.selection import named_leaves


def initialize_hosts(config: RunConfig) -> None:
    """Connects the processes of a run over several hosts.

    Raises:
      ExperimentError: a coordinator without the numbers it needs.
    """
    if not config.multihost:
        return
    given = (config.coordinator, config.num_processes, config.process_id)
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ExperimentError("coordinator, num_processes and process_id go together")
    jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)


def make_mesh(text: str | None) -> Mesh | None:
    """A mesh from `data=4,model=2`; None for None.

    Raises:
      ExperimentError: text of another form, an unknown or repeated axis, or sizes whose product is
        not the number of devices.
    """
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "model") or name in sizes or not size.isdecimal() or size == "0":
            raise ExperimentError(f"mesh is {text!r}; it must look like data=4,model=2")
        sizes[name] = int(size)
    sizes = {"data": sizes.get("data", 1), "model": sizes.get("model", 1)}
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted != there:
        raise ExperimentError(f"mesh is {text!r}: {wanted} devices, and there are {there}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)


def host_batch(batch: int) -> int:
    """A process's part of a batch; raises ExperimentError for one that they do not divide."""
    hosts = jax.process_count()
    if batch % hosts:
        raise ExperimentError(f"batch is {batch}; {hosts} processes must divide it")
    return batch // hosts


def state_shardings(state: Any, specs: Mapping[str, PartitionSpec], mesh: Mesh) -> Any:
    """Shardings for a whole training state from those of the parameters.

    A leaf whose path ends in a parameter's path (a moment, a mask, the parameter itself) is laid
    out like it; everything else is on every device.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`s.
      specs: partition of each parameter by path.
      mesh: the devices.

    Returns:
      `NamedSharding`s in the structure of `state`.
    """

    def one(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        spec = next((specs[tail] for tail in tails if tail in specs), PartitionSpec())
        fits = len(spec) <= leaf.ndim and all(
            size % mesh.shape[axis] == 0 for size, axis in zip(leaf.shape, spec) if axis is not None
        )
        return NamedSharding(mesh, spec if fits else PartitionSpec())

    leaves = [one(path, leaf) for path, leaf in named_leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def check_groups(shardings: Any, masks: Any, pattern: NM, mesh: Mesh) -> None:
    """Refuses a layout that cuts an N:M group in two.

    Raises:
      ExperimentError: naming the leaf, its axis and the length of a shard.
    """
    for (path, mask), sharding in zip(named_leaves(masks), jax.tree.leaves(shardings)):
        if mask.ndim < 2 or pattern.axis is None:
            continue
        axis = pattern.axis % mask.ndim
        name = sharding.spec[axis] if axis < len(sharding.spec) else None
        shard = mask.shape[axis] // (mesh.shape[name] if name else 1)
        if shard % (pattern.m * pattern.stride):
            raise ExperimentError(
                f"mesh cuts groups of {path!r}: its axis {axis} has {shard} entries a device, not "
                f"a multiple of {pattern.m * pattern.stride}"
            )


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """A host's part of a batch, an array or a tree of them, laid out over the data axis."""
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    place = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(place, batch)
