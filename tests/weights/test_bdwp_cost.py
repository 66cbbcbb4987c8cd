"""What BDWP saves: counts, cycles and bytes, against the page's vectors and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import weights

pregenerate = jax.jit(weights.pregenerate, static_argnames=("n", "m", "dtype"))
STAGES = ("ff", "bp", "wu")
ROW = "macs_ff_bp_wu_cycles_ffws_ffos_bpws_bpos_wuws_wuos"
METHODS = ("dense", "srste", "sdgp", "sdwp", "bdwp")


@pytest.mark.vectors
def test_cost_vectors(reference):
    for case in reference("bdwp").cases("cost"):
        layers = case["layers_p_k_q"].tolist()
        n, m = case["n"], case["m"]
        array = {"rows": case["array_rows"], "cols": case["array_cols"]}
        for method in METHODS:
            wanted = case[f"{method}_{ROW}"].astype(int).tolist()
            assert len(wanted) == len(layers)
            macs = weights.training_macs(layers, n, m, method=method)
            cycles = []
            for layer in layers:
                products = weights.training_products(layer, n, m, method=method)
                cycles.append(
                    [
                        weights.systolic_cycles(*products[stage], **array, dataflow=flow)
                        for stage in STAGES
                        for flow in ("ws", "os")
                    ]
                )
            got = [
                [macs["ff"][i], macs["bp"][i], macs["wu"][i], *cycles[i]]
                for i in range(len(layers))
            ]
            assert got == wanted
            dense = 3 * sum(p * k * q for p, k, q in layers)
            assert macs["total"] == sum(sum(row[:3]) for row in wanted)
            assert macs["ratio"] == macs["total"] / dense
            best = []
            for i, row in enumerate(wanted):
                for stage, ws, os in zip(STAGES, row[3::2], row[4::2]):
                    best.append((i, stage, "ws" if ws <= os else "os", min(ws, os)))
            assert weights.schedule_offline(layers, n, m, method=method, **array) == best


def test_the_laptop_check_of_the_page():
    sparse = [(1, 64, 128), (1, 128, 128), (1, 128, 128)]
    dense = 3 * (40960 + 1280)
    ratios = {
        method: (weights.training_macs(sparse, 2, 8, method=method)["total"] + 3 * 1280) / dense
        for method in METHODS
    }
    assert ratios["dense"] == 1
    assert ratios["bdwp"] == pytest.approx(0.5152, abs=1e-4)
    for method in ("srste", "sdgp", "sdwp"):
        assert ratios[method] == pytest.approx(0.758, abs=1e-3)


def test_counts_are_exact_beyond_a_float():
    macs = weights.training_macs([(2**40 + 1, 8, 8)], 1, 8, method="bdwp")
    assert macs["ff"] == macs["bp"] == [8 * (2**40 + 1)]
    assert macs["total"] == 80 * (2**40 + 1)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def cycles(p, k, q, latency, *, interleave):
    return weights.systolic_cycles(
        p, k, q, rows=4, cols=4, dataflow="os", adder_latency=latency, interleave=interleave
    )


def test_an_adder_stalls_unless_tiles_are_interleaved():
    # one tile of 4 x 4: nothing to interleave with
    assert cycles(4, 10, 4, 5, interleave=False) == 10 * 5 + 6
    assert cycles(4, 10, 4, 5, interleave=True) == 10 * 5 + 6
    # two tiles leave ceil(5 / 2) = 3 cycles a sum, six tiles leave none
    assert cycles(8, 10, 4, 5, interleave=False) == 2 * (10 * 5 + 6)
    assert cycles(8, 10, 4, 5, interleave=True) == 2 * (10 * 3 + 6)
    assert cycles(8, 10, 12, 5, interleave=True) == 6 * (10 + 6)
    # weights that stay do not wait
    still = {"rows": 4, "cols": 4, "dataflow": "ws"}
    assert weights.systolic_cycles(4, 10, 4, **still, adder_latency=5) == 3 * (4 + 8 + 4 - 2)
    schedule = {"method": "dense", "rows": 4, "cols": 4}
    quick, slow, stalled = (
        weights.schedule_offline([(8, 40, 4)], 1, 4, **schedule, **latency)
        for latency in ({}, {"adder_latency": 3}, {"adder_latency": 3, "interleave": False})
    )
    assert quick[0] == (0, "ff", "os", 2 * (40 + 6))
    assert slow[0] == (0, "ff", "os", 2 * (40 * 2 + 6))
    assert stalled[0] == (0, "ff", "ws", 10 * (8 + 8 + 4 - 2))


def test_the_traffic_of_the_page_is_that_of_the_packed_arrays():
    wanted = {(2, 8): 2.375, (1, 8): 1.1875, (2, 4): 4.5}
    for (n, m), figure in wanted.items():
        assert weights.weight_traffic(n, m, pregenerated=True) == figure
        assert weights.weight_traffic(n, m, pregenerated=False) == 4
        w = normal(64, 64)
        pair = pregenerate(w, n, m, dtype=jnp.bfloat16)
        assert 2 * (pair.ff.nbytes + pair.bp.nbytes) / w.size == figure  # written, then read
    assert weights.weight_traffic(2, 8, value_bytes=4, pregenerated=False) == 8


@pytest.mark.parametrize(("n", "m", "shape"), [(1, 8, (8, 24)), (3, 5, (10, 5)), (2, 2, (2, 4))])
def test_padding_is_counted(n, m, shape):
    pair = pregenerate(normal(*shape), n, m)
    moved = 2 * (pair.ff.nbytes + pair.bp.nbytes) / (shape[0] * shape[1])
    counted = weights.weight_traffic(n, m, value_bytes=4, pregenerated=True, shape=shape)
    assert counted == moved
    assert moved > weights.weight_traffic(n, m, value_bytes=4, pregenerated=True)


def test_errors_name_argument_and_range(unchecked):
    layers = [(4, 8, 8)]
    sizes = {"rows": 4, "cols": 4, "dataflow": "ws"}
    for call, message in (
        (lambda: weights.training_macs(layers, 2, 8, method="x"), "method is 'x'; allowed are"),
        (lambda: weights.training_macs(layers, 3, 2, method="bdwp"), "n is 3 and m is 2"),
        (lambda: weights.training_macs([], 2, 8, method="bdwp"), "layers is empty"),
        (lambda: weights.training_macs([(1, 0, 4)], 2, 8, method="bdwp"), r"a layer is \(1, 0, 4"),
        (lambda: weights.training_products((1, 2), 2, 8, method="bdwp"), r"must be \(P, K, Q\)"),
        (lambda: weights.systolic_cycles(1, 0, 1, **sizes), "k is 0; it must be at least 1"),
        (lambda: weights.systolic_cycles(1, 1, 1, **sizes | {"rows": 0}), "rows is 0; it must be"),
        (lambda: weights.systolic_cycles(1, 1, 1, **sizes | {"cols": -1}), "cols is -1"),
        (lambda: weights.systolic_cycles(1, 1, 1, **sizes, adder_latency=0), "adder_latency is 0"),
        (
            lambda: weights.systolic_cycles(1, 1, 1, **sizes | {"dataflow": "is"}),
            "dataflow is 'is'; allowed are 'ws' and 'os'",
        ),
        (
            lambda: weights.schedule_offline(layers, 2, 8, method="bdwp", rows=0, cols=4),
            "rows is 0; it must be at least 1",
        ),
        (lambda: weights.weight_traffic(3, 2, pregenerated=True), "n is 3 and m is 2"),
        (
            lambda: weights.weight_traffic(2, 8, value_bytes=0, pregenerated=True),
            "value_bytes is 0; it must be at least 1",
        ),
        (
            lambda: weights.weight_traffic(2, 8, pregenerated=True, shape=(8, 12)),
            r"shape is \(8, 12\); it must be two positive multiples of m = 8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
