"""BlockFFN's layer: the vectors, a token and an expert at a time, what is read, and the paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.activations.block_ffn import block_ffn, relu_rms_router, rms_pattern

N, D, E, K = 12, 10, 6, 5
PATHS = {
    "dense": {},
    "union": {"path": "union"},
    "union_of_3": {"path": "union", "chunk": 3},
    "capacity_of_4": {"path": "capacity", "capacity": E, "chunk": 4},
}
run = jax.jit(block_ffn, static_argnames=("norm", "eps", "norm_scale", "path", "chunk", "capacity"))


@functools.cache
def problem(dtype=jnp.float32, *, n=N, d=D, e=E, k=K, chosen=None):
    """Weights and tokens; only the `chosen` experts are active for any token."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    x[:, 0] = 1
    router = rng.normal(size=(e, d)) / np.sqrt(d)
    if chosen is not None:
        router[:, 0] = -100
        router[list(chosen), 0] = 0.5
    params = {
        "router": router,
        "router_norm": rng.normal(size=e),  # half of them negative
        "up": rng.normal(size=(e, k, d)) / np.sqrt(d),
        "down": rng.normal(size=(e, k, d)) / np.sqrt(k),
    }
    return {name: jnp.asarray(w, dtype) for name, w in params.items()}, jnp.asarray(x, dtype)


def defined(params, x, *, norm="rms", eps=1e-6, norm_scale=1.0):
    """The layer for one token and one expert after the other."""
    params = {name: np.asarray(w, np.float64) for name, w in params.items()}
    y, gates = [], []
    for token in np.asarray(x, np.float64):
        on = np.maximum(params["router"] @ token, 0)
        if norm == "rms":
            row = on / np.sqrt((on**2).sum() / len(on) + eps) * params["router_norm"]
        else:
            row = on / (norm_scale * on.sum() + 1e-5) if norm == "sum" else on
        out = np.zeros(len(token))
        for gate, up, down in zip(row, params["up"], params["down"]):
            hidden = up @ token
            out += gate * (hidden / (1 + np.exp(-hidden))) @ down
        gates.append(row)
        y.append(out)
    return np.stack(y), np.stack(gates)


@functools.cache
def gradients(**options):
    def loss(params, x):
        y, _ = block_ffn(params, x, **options)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def close(found, expected, tolerance):
    scale = np.abs(np.asarray(expected, np.float64)).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


# the vectors


@pytest.mark.vectors
@pytest.mark.parametrize("path", ["dense", "union", "capacity"])
def test_published_code_gives_the_same(reference, path):
    file = reference("blockffn")
    for case in file.cases("ffn"):
        experts, size = case["num_experts"], case["expert_dim"]
        x, width = case["x"], case["x"].shape[-1]
        norm = case["norm_after_router"]
        of_torch = {
            "router": lambda w: w,
            "router_norm": lambda w: w,
            "up": lambda w, shape=(experts, size, width): w.reshape(shape),
            "down": lambda w, shape=(experts, size, width): w.T.reshape(shape),
        }
        names = [name for name in of_torch if name in case]
        assert ("router_norm" in names) == (norm == "rms")
        params = {name: jnp.asarray(of_torch[name](case[name])) for name in names}

        @jax.jit
        def forward_and_back(params, x, dy, case=case, norm=norm):
            forward = functools.partial(
                block_ffn,
                norm=norm,
                eps=case["eps"],
                norm_scale=case["norm_scale"],
                path=path,
                capacity=case["num_experts"],
            )
            y, pull, aux = jax.vjp(forward, params, x, has_aux=True)
            return y, aux, *pull(dy)

        rows = (jnp.asarray(v).reshape(-1, width) for v in (x, case["cotangent"]))
        y, aux, d_params, dx = forward_and_back(params, *rows)
        assert aux["overflow"] == 0
        np.testing.assert_allclose(
            jax.nn.relu(aux["logits"]), case["relu_router_score"], rtol=1e-10, atol=1e-10
        )
        # the published mean square is that of float32
        tolerance = 2e-6 if norm == "rms" else 1e-10
        close(y.reshape(x.shape), case["y"], tolerance)
        close(dx.reshape(x.shape), case["grad_x"], tolerance)
        for name in names:
            close(d_params[name], of_torch[name](case[f"grad_{name}"]), tolerance)


# the layer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"eps": 1e-2}, {"norm": "sum", "norm_scale": 3.0}, {"norm": "none"}],
    ids=str,
)
def test_equals_one_token_and_expert_after_the_other(path, settings):
    params, x = problem()
    if settings.get("norm", "rms") != "rms":
        params = {name: w for name, w in params.items() if name != "router_norm"}
    y, aux = run(params, x, **settings, **PATHS[path])
    expected, gates = defined(params, x, **settings)
    close(y, expected, 1e-5)
    close(aux["gates"], gates, 1e-5)
    assert aux["overflow"] == 0


def test_the_mean_square_is_over_all_experts():
    # one active expert of many: its gate is the root of their number, not 1
    R = jnp.concatenate([jnp.ones((1, 3)), -jnp.ones((15, 3))])
    gates, logits = relu_rms_router(jnp.ones((1, 3)), R)
    np.testing.assert_allclose(gates[0], [4.0, *[0.0] * 15], rtol=1e-6)
    np.testing.assert_array_equal(logits[0], [3.0, *[-3.0] * 15])


def test_negative_and_vanishing_scales_leave_the_pattern():
    params, x = problem()
    params = params | {"router_norm": -jnp.abs(params["router_norm"])}
    dense, aux = run(params, x)
    assert (aux["gates"] <= 0).all()
    np.testing.assert_allclose(run(params, x, path="union")[0], dense, atol=1e-5)
    # with a gate of 0 an expert is active still
    _, aux = run(params | {"router_norm": jnp.zeros(E)}, x, path="capacity", capacity=1)
    assert not aux["gates"].any()
    assert aux["overflow"] == np.sum((np.asarray(aux["logits"]) > 0).any(0)) - 1 > 0


@pytest.mark.parametrize(("norm", "path"), [("sum", "dense"), *(("rms", path) for path in PATHS)])
def test_a_token_without_an_expert_gives_zero_and_finite_gradients(norm, path):
    params, x = problem()
    if norm != "rms":
        params = {name: w for name, w in params.items() if name != "router_norm"}
    x = x.at[3:6].set(0.0)  # a whole chunk, logits of exactly 0
    y, _ = run(params, x, norm=norm, **PATHS[path])
    assert not y[3:6].any()
    assert np.abs(y).max(1)[[0, 1, 2, 6, 7]].all()
    for leaf in jax.tree.leaves(gradients(norm=norm, **PATHS[path])(params, x)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("path", [path for path in PATHS if path != "dense"])
def test_all_paths_have_the_gradients_of_the_dense_one(path):
    params, x = problem()
    expected = gradients()(params, x)
    found = gradients(**PATHS[path])(params, x)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected)


def test_experts_outside_the_union_are_not_read():
    params, x = problem(chosen=(1, 4))
    expected, _ = run(params, x)
    assert np.isfinite(expected).all()
    unread = jnp.asarray([0, 2, 3, 5])
    spoilt = params | {w: params[w].at[unread].set(jnp.nan) for w in ("up", "down")}
    for options in ({"path": "union"}, {"path": "union", "chunk": 4},
                    {"path": "capacity", "capacity": 2}):  # fmt: skip
        np.testing.assert_allclose(run(spoilt, x, **options)[0], expected, atol=1e-5)
    # a poisoned expert that is in the union shows
    assert np.isnan(run(spoilt, x)[0]).all()
    blind = params | {"router": params["router"].at[2].set(jnp.nan)}
    assert np.isnan(run(blind, x, path="union")[0]).all()


def test_too_small_a_capacity_computes_the_lowest_and_counts_the_rest():
    params, x = problem()
    logits = np.asarray(run(params, x)[1]["logits"])
    for chunk, capacity in ((12, 2), (12, 5), (4, 3), (3, 1), (1, 2)):
        unions = (logits > 0).reshape(-1, chunk, E).any(1)
        y, aux = run(params, x, path="capacity", chunk=chunk, capacity=capacity)
        assert aux["overflow"] == np.maximum(unions.sum(1) - capacity, 0).sum()
        kept = unions & (unions.cumsum(1) <= capacity)
        expected = []
        for rows, row_kept in zip(np.asarray(x).reshape(-1, chunk, D), kept):
            mask = jnp.asarray(row_kept, jnp.float32)[:, None, None]
            expected.append(defined(params | {"up": params["up"] * mask}, rows)[0])
        close(y, np.concatenate(expected), 1e-5)
    assert run(params, x, path="capacity", capacity=E + 3)[1]["overflow"] == 0


@pytest.mark.parametrize(("tokens", "union"), [(1, 10), (8, 14), (32, 15)])
def test_the_smallest_published_scale(tokens, union):
    chosen = tuple(range(3, 3 + 2 * union, 2))
    params, x = problem(n=tokens, d=768, e=48, k=64, chosen=chosen)
    dense, aux = run(params, x)
    touched = np.flatnonzero((np.asarray(aux["logits"]) > 0).any(0))
    assert set(touched) <= set(chosen)
    assert len(touched) >= union // 3
    found, _ = run(params, x, path="union")
    np.testing.assert_allclose(found, dense, rtol=2e-4, atol=2e-4)


# composition


@pytest.mark.parametrize("path", PATHS)
def test_narrow_tensors_have_wide_gates(path):
    params, x = problem(jnp.bfloat16)
    y, aux = run(params, x, **PATHS[path])
    assert (y.dtype, aux["gates"].dtype, aux["logits"].dtype) == (jnp.bfloat16, *[jnp.float32] * 2)
    expected, gates = defined(params, x)
    close(np.float32(y), expected, 2e-2)
    close(aux["gates"], gates, 1e-5)  # not rounded on the way
    dy = gradients(**PATHS[path])(params, x)
    wide = gradients(**PATHS[path])(*jax.tree.map(lambda w: w.astype(jnp.float32), (params, x)))
    for found, wanted in zip(jax.tree.leaves(dy), jax.tree.leaves(wide)):
        assert found.dtype == jnp.bfloat16
        close(np.float32(found), wanted, 4e-2)


def test_tokens_and_weights_of_two_dtypes():
    params, x = problem()
    expected, _ = run(params, x)
    narrow = {name: w.astype(jnp.bfloat16) for name, w in params.items()}
    exact, _ = run({name: w.astype(jnp.float32) for name, w in narrow.items()}, x)
    for options in (PATHS["dense"], PATHS["union"]):
        y, _ = run(narrow, x, **options)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, exact, atol=1e-5)
        y, _ = run(params, x.astype(jnp.bfloat16), **options)
        assert y.dtype == jnp.bfloat16
        close(np.float32(y), expected, 3e-2)


@pytest.mark.parametrize("path", PATHS)
def test_batches_of_sequences_and_one_trace(path):
    params, x = problem()
    traces = 0

    def counted(params, x):
        nonlocal traces
        traces += 1
        return block_ffn(params, x, **PATHS[path])

    batched = jax.jit(jax.vmap(counted, in_axes=(None, 0)))
    xs = jnp.stack([x, x[::-1], 0 * x])
    y, aux = batched(params, xs)
    batched(params, xs + 1)
    assert traces == 1
    assert aux["overflow"].shape == (3,)
    for found, row in zip(y, xs):
        np.testing.assert_allclose(found, run(params, row)[0], atol=1e-5)


def test_sharded_experts_and_tokens_give_the_same(mesh):
    params, x = problem()
    expected, d_expected = run(params, x)[0], gradients()(params, x)
    experts = NamedSharding(mesh, PartitionSpec("model"))
    spread = jax.device_put(params, experts)
    tokens = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    for options in (PATHS["dense"], PATHS["union_of_3"]):
        np.testing.assert_allclose(run(spread, tokens, **options)[0], expected, atol=1e-5)
    found = gradients()(spread, tokens)
    assert found[0]["up"].sharding.is_equivalent_to(experts, 3)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, d_expected)


# errors


def test_bad_settings_of_the_router_are_named(unchecked):
    params, x = problem()
    R, w = params["router"], params["router_norm"]
    for args, options, message in (
        ((x, R, w), {"norm": "l2"}, "norm is 'l2'; allowed are 'rms', 'sum' and 'none'"),
        ((x, R, w), {"norm": "sum"}, "w goes with norm 'rms' alone; norm is 'sum'"),
        ((x, R[:, 1:]), {}, r"x has shape \(12, 10\) and R \(6, 9\); they must be"),
        ((x[0], R), {}, r"x has shape \(10,\) and R \(6, 10\); they must be"),
        ((x, R, w[1:]), {}, r"w has shape \(5,\); it must be \(6,\), a number an expert"),
        ((x, R), {"eps": 0.0}, "eps is 0.0; it must be positive"),
        ((x, R), {"norm": "sum", "norm_scale": 0.0}, "norm_scale is 0.0; it must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            relu_rms_router(*args, **options)


def test_bad_settings_of_the_layer_are_named(unchecked):
    params, x = problem()
    without = {name: w for name, w in params.items() if name != "router_norm"}
    for given, options, message in (
        (without, {}, r"params has \['down', 'router', 'up'\]; norm 'rms' needs exactly .*_norm"),
        (params, {"norm": "none"}, r"norm 'none' needs exactly \['down', 'router', 'up'\]"),
        (params | {"gate": x}, {}, r"params has \['down', 'gate', .*needs exactly"),
        (params | {"down": params["down"][1:]}, {}, r"up has shape \(6, 5, 10\) and down \(5, 5,"),
        (params | {"down": params["down"][:, 1:]}, {}, r"down \(6, 4, 10\); both must be one"),
        (params | {"router": x[:5]}, {}, r"router has shape \(5, 10\); it must be \(6, 10\), by"),
        (params, {"path": "loop"}, "path is 'loop'; allowed are 'dense', 'union' and 'capacity'"),
        (params, {"chunk": 5}, "chunk is 5; it must be at least 1 and divide the 12 tokens"),
        (params, {"path": "union", "chunk": 0}, "chunk is 0; it must be at least 1"),
        (params, {"path": "capacity"}, "capacity is None; path 'capacity' needs the number"),
        (params, {"path": "capacity", "capacity": 0}, "capacity is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            block_ffn(given, x, **options)
    with pytest.raises(ValueError, match=r"x has shape \(12, 9\) and R \(6, 10\)"):
        block_ffn(params, x[:, 1:])
    with pytest.raises(ValueError, match=r"eps is -1.0; it must be positive"):
        rms_pattern(x, eps=-1.0)
