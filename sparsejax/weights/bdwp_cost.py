"""What BDWP saves: multiply-accumulates, cycles of a systolic array, and bytes of weights.

Plain Python integers; nothing here runs on a device. Masked products on a CPU or GPU are dense
products: these counts, not seconds, are what hardware for N:M sparsity would save.

Source: Efficient N:M sparse DNN training using algorithm, architecture, and dataflow co-design
(2023, arXiv 2309.13015); the cycle model is ours, in the spirit of its accelerator.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

from sparsejax.core.patterns import NM
from sparsejax.weights.bdwp import BACKWARD_PRUNED, FORWARD_PRUNED, Method, check_method
from sparsejax.weights.compact import index_bits

Layer = tuple[int, int, int]
Stage = Literal["ff", "bp", "wu"]
Dataflow = Literal["ws", "os"]


class TrainingMacs(TypedDict):
    """Multiply-accumulates of one training step.

    ff, bp, wu: of every layer, forward, input gradient, weight gradient. total: of all.
    ratio: total over that of dense training.
    """

    ff: list[int]
    bp: list[int]
    wu: list[int]
    total: int
    ratio: float


class ScheduledStage(NamedTuple):
    """One product of a training step on a systolic array.

    Attributes:
      layer: index. stage: "ff", "bp" or "wu". dataflow: "ws" or "os". cycles: that it takes.
    """

    layer: int
    stage: Stage
    dataflow: Dataflow
    cycles: int


def training_macs(
    layers: Sequence[Sequence[int]], n: int, m: int, *, method: Method
) -> TrainingMacs:
    """Multiply-accumulates of a training step, all three products of every layer.

    A product is pruned only where m divides its reduction: K forward, Q in the input gradient.

    Args:
      layers: (P, K, Q) each: positions (batch included), reduction, outputs.
      n, m: kept of a group. method: see `bdwp_dot`.

    Raises:
      ValueError: an unknown method, n > m, no layers, or a size below 1.

    >>> training_macs([(1, 512, 64)], 2, 8, method="bdwp")["ratio"]
    0.5
    """
    if not layers:
        raise ValueError("layers is empty")
    counts: dict[Stage, list[int]] = {"ff": [], "bp": [], "wu": []}
    dense = 0
    for layer in layers:
        P, K, Q = _sizes(layer)
        dense += 3 * P * K * Q
        for stage, pruned in _pruned(layer, n, m, method).items():
            counts[stage].append(P * K * Q * n // m if pruned else P * K * Q)
    total = sum(map(sum, counts.values()))
    return TrainingMacs(**counts, total=total, ratio=total / dense)


def training_products(
    layer: Sequence[int], n: int, m: int, *, method: Method
) -> dict[Stage, Layer]:
    """The products `(p x k) (k x q)` of one layer, k as the array sees it.

    Args:
      layer, n, m, method: see `training_macs`.

    Returns:
      (p, k, q) of "ff", "bp" and "wu"; where pruned, k is the n/m of the reduction, rounded up.

    Raises:
      ValueError: as `training_macs`.
    """
    P, K, Q = _sizes(layer)
    pruned = _pruned(layer, n, m, method)

    def kept(size: int, stage: Stage) -> int:
        return -(-size * n // m) if pruned[stage] else size

    return {"ff": (P, kept(K, "ff"), Q), "bp": (P, kept(Q, "bp"), K), "wu": (K, P, Q)}


def systolic_cycles(
    p: int,
    k: int,
    q: int,
    *,
    rows: int,
    cols: int,
    dataflow: Dataflow,
    adder_latency: int = 1,
    interleave: bool = True,
) -> int:
    """Cycles of the product `(p x k) (k x q)` on a systolic array.

    Args:
      rows, cols: of the array.
      dataflow: "ws", weight-stationary: `ceil(k/rows) ceil(q/cols) (p + 2 rows + cols - 2)`;
        "os", output-stationary: `ceil(p/rows) ceil(q/cols) (k + rows + cols - 2)`.
      adder_latency: of the pipelined adder of an output-stationary element, in cycles. Every sum
        waits for the one before it, so k counts that many times.
      interleave: an element works on the outputs of its several tiles in turn, and waits only for
        what they leave: k counts `ceil(latency / min(latency, tiles))` times.

    Raises:
      ValueError: an unknown dataflow, or a size or latency below 1.
    """
    sizes = {"p": p, "k": k, "q": q, "rows": rows, "cols": cols, "adder_latency": adder_latency}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if dataflow == "ws":
        return _ceil(k, rows) * _ceil(q, cols) * (p + 2 * rows + cols - 2)
    if dataflow != "os":
        raise ValueError(f"dataflow is {dataflow!r}; allowed are 'ws' and 'os'")
    tiles = _ceil(p, rows) * _ceil(q, cols)
    waits = _ceil(adder_latency, min(adder_latency, tiles)) if interleave else adder_latency
    return tiles * (k * waits + rows + cols - 2)


def schedule_offline(
    layers: Sequence[Sequence[int]],
    n: int,
    m: int,
    *,
    method: Method,
    rows: int,
    cols: int,
    adder_latency: int = 1,
    interleave: bool = True,
) -> list[ScheduledStage]:
    """The cheaper dataflow for every product of a training step; "ws" where both cost the same.

    Args:
      layers, n, m, method: see `training_macs`.
      rows, cols, adder_latency, interleave: see `systolic_cycles`.

    Raises:
      ValueError: as those two.

    >>> [stage] = [s for s in schedule_offline([(256, 576, 128)], 2, 8, method="bdwp",
    ...                                        rows=32, cols=32) if s.stage == "ff"]
    >>> stage.dataflow, stage.cycles
    ('os', 6592)
    """
    schedule = []
    for number, layer in enumerate(layers):
        for stage, product in training_products(layer, n, m, method=method).items():

            def cycles(dataflow: Dataflow, product: Layer = product) -> int:
                return systolic_cycles(
                    *product,
                    rows=rows,
                    cols=cols,
                    dataflow=dataflow,
                    adder_latency=adder_latency,
                    interleave=interleave,
                )

            flows: tuple[Dataflow, ...] = ("ws", "os")
            best = min(flows, key=cycles)  # the first of equals
            schedule.append(ScheduledStage(number, stage, best, cycles(best)))
    return schedule


def weight_traffic(
    n: int,
    m: int,
    *,
    value_bytes: int = 2,
    pregenerated: bool,
    shape: tuple[int, int] | None = None,
) -> float:
    """Bytes of weights moved for every entry of a kernel in one training step.

    On the fly the dense kernel is read twice. Pre-generated, both compact forms are written once
    and read once: `4 (n/m) (value_bytes + ceil(log2 m) / 8)`, which for 2:4 is more.

    Args:
      n, m: kept of a group. value_bytes: of a stored value.
      pregenerated: whether the compact forms are made once a step.
      shape: of a kernel `[i, o]`, to count the padding of its packed positions too.

    Raises:
      ValueError: n > m, value_bytes below 1, or a shape that m does not divide.

    >>> weight_traffic(2, 8, pregenerated=True), weight_traffic(2, 4, pregenerated=True)
    (2.375, 4.5)
    """
    NM(n, m)  # its checks
    if value_bytes < 1:
        raise ValueError(f"value_bytes is {value_bytes}; it must be at least 1")
    if not pregenerated:
        return 2.0 * value_bytes
    if shape is None:
        return 4 * (n / m) * (value_bytes + index_bits(m) / 8)
    if len(shape) != 2 or any(size < 1 or size % m for size in shape):
        raise ValueError(f"shape is {shape}; it must be two positive multiples of m = {m}")
    moved = 0
    for along, others in (shape, shape[::-1]):
        kept = along // m * n
        moved += 2 * others * (kept * value_bytes + _ceil(kept * index_bits(m), 8))
    return moved / (shape[0] * shape[1])


def _pruned(layer: Sequence[int], n: int, m: int, method: Method) -> dict[Stage, bool]:
    check_method(method)
    NM(n, m)  # its checks
    _, K, Q = layer
    return {
        "ff": method in FORWARD_PRUNED and K % m == 0,
        "bp": method in BACKWARD_PRUNED and Q % m == 0,
        "wu": False,
    }


def _sizes(layer: Sequence[int]) -> Layer:
    sizes = tuple(int(size) for size in layer)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"a layer is {sizes}; it must be (P, K, Q), each at least 1")
    return sizes


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
