"""Which implementation of an op runs.

Every implementation says why it cannot run here: a list of reasons, empty where it can. An op asks
all of them, best first, and `choose` takes one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "tpu", "triton"]
"""Plain jnp as XLA compiles it well, a Mosaic kernel for TPUs, a Triton-style kernel for GPUs."""


class Target(NamedTuple):
    """What a computation is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device's own name, such as "NVIDIA H200" or "TPU v5 lite".
    """

    platform: str
    kind: str


def target() -> Target:
    """The device of the abstract mesh in force, where it names one, else the default device.

    Kernels can therefore be traced for a device that is not there, under
    `jax.sharding.use_abstract_mesh`.
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None and described.platform is not None:
        platform = "gpu" if described.platform in ("cuda", "rocm") else described.platform
        return Target(platform, described.device_kind)
    return Target(jax.default_backend(), jax.devices()[0].device_kind)


def vmem_budget() -> int:
    """Bytes of on-chip memory for a TPU kernel: half of a core's, or what every generation has."""
    kind = target().kind
    small = any(name in kind for name in ("v2", "v3", "v4"))
    return (32 if "TPU" in kind and not small else 12) * 2**20


def on_large_gpu() -> bool:
    """Whether the target is a data-centre GPU, with its large registers and shared memory."""
    return any(name in target().kind for name in ("A100", "H100", "H200", "B200", "GH200"))


def not_on(platform: str, *, interpret: Any = False) -> list[str]:
    """The reason of a kernel for `platform` where the target is another one.

    Args:
      interpret: an interpreted kernel runs everywhere.
    """
    found = target().platform
    return [] if interpret or found == platform else [f"it is for {platform}, this is {found}"]


def not_of_dtype(dtype: Any, allowed: Sequence[str], *, of: str = "x") -> list[str]:
    """The reason of a kernel that has no form for the dtype of the array that is called `of`."""
    name = jnp.dtype(dtype).name
    return [] if name in allowed else [f"{of} is {name}, it takes {', '.join(allowed)}"]


def choose(
    implementation: str | None, reasons: Mapping[str, Sequence[str]], *, interpret: Any = False
) -> str:
    """The implementation that runs: the one asked for, or the first without a reason against it.

    Args:
      implementation: a name, or None for the best; "xla" where nothing else can.
      reasons: why each cannot run, by name, the best first.
      interpret: whether a kernel is to be interpreted: a kernel must then be named.

    Raises:
      ValueError: an unknown name, one that cannot run (with every reason), or nothing that
        could be interpreted.

    >>> choose(None, {"tpu": ["it is for tpu, this is cpu"], "xla": []})
    'xla'
    """
    if implementation is not None and implementation not in reasons:
        allowed = ", ".join(map(repr, reasons))
        raise ValueError(f"implementation is {implementation!r}; allowed are {allowed} and None")
    if interpret and implementation in (None, "xla"):
        raise ValueError(
            f"interpret is set and implementation is {implementation!r}; it must name a kernel"
        )
    if implementation is None:
        return next((name for name, against in reasons.items() if not against), "xla")
    if reasons[implementation]:
        against = "; ".join(reasons[implementation])
        raise ValueError(f"implementation {implementation!r} cannot run here: {against}")
    return implementation


def check_blocks(blocks: Any, chosen: str, kind: type | None) -> None:
    """Refuses blocks of another implementation than the one that runs.

    Args:
      blocks: what was asked for, or None. chosen: the implementation.
      kind: the class of its blocks; None where it has none.

    Raises:
      ValueError: blocks of another class.
    """
    if blocks is not None and type(blocks) is not kind:
        raise ValueError(f"blocks is {blocks}; it is not of the implementation {chosen!r}")
