"""Proximal gradient: the vectors, convergence, stopping, gradients and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import coding

RULES = {"soft": "l1", "hard": "l0", "half": "l1/2", "two_thirds": "l2/3", "cel0": "cel0"}
STATIC = ("prox", "num_steps", "tol")
ista = jax.jit(coding.ista, static_argnames=STATIC)
fista = jax.jit(coding.fista, static_argnames=STATIC)
trace = jax.jit(coding.ista_trace, static_argnames=("prox", "num_steps", "momentum"))


def problem(b=6, n=12, k=20, dtype=jnp.float32):
    dictionary = coding.normalise(jax.random.normal(jax.random.key(0), (n, k), dtype), axis=0)
    codes = jax.random.normal(jax.random.key(1), (b, k), dtype)
    codes = jnp.where(jax.random.bernoulli(jax.random.key(2), 0.15, (b, k)), codes, 0)
    return codes @ dictionary.T, dictionary


@pytest.mark.vectors
def test_vectors(reference):
    case = reference("beyond_l1").whole()
    x, dictionary = jnp.asarray(case["x"]), jnp.asarray(case["dictionary"])
    lam, steps = case["ista_lam"], case["ista_iterations"]
    np.testing.assert_allclose(1 / coding.spectral_norm_sq(dictionary), case["ista_step"], 1e-9)
    for name, prox in RULES.items():
        codes = ista(x, dictionary, prox=prox, lam=lam, num_steps=steps)
        np.testing.assert_allclose(codes, case[f"ista_{name}_codes"], rtol=1e-9, atol=1e-12)
        if name == "soft":
            of = coding.objective(x, dictionary, codes, lam=lam)
            np.testing.assert_allclose(of, case["objective_soft"], rtol=1e-9)
            after = coding.dictionary_step(
                dictionary, x, codes, learning_rate=case["dict_update_lr"]
            )
            np.testing.assert_allclose(after, case["dict_update_dictionary"], rtol=1e-9, atol=1e-12)
    codes = fista(x, dictionary, lam=lam, num_steps=steps)
    np.testing.assert_allclose(codes, case["fista_soft_codes"], rtol=1e-9, atol=1e-12)
    z = jnp.asarray(case["prox_z"])
    for i in (0, 1):
        for name, prox in RULES.items():
            if name != "cel0":
                got = sj.penalty(prox).prox(z, lam=case[f"prox{i}_t"], step=1.0)
                np.testing.assert_allclose(got, case[f"prox{i}_{name}"], rtol=1e-9, atol=1e-12)
        norms = jnp.full(z.shape, case[f"cel0_{i}_norm"])
        lam, step = case[f"cel0_{i}_lam"], case[f"cel0_{i}_step"]
        got = sj.penalty("cel0").prox(z, lam=lam, step=step, norms=norms)
        np.testing.assert_allclose(got, case[f"cel0_{i}_y"], rtol=1e-9, atol=1e-12)
    for name in ("image", "f0", "out"):
        case.ignore(f"whiten_{name}", reason="tests/coding/test_receptive_fields.py")


def _layer(x, dictionary, **options):
    return coding.ista_step(x, x, dictionary, **options)


@pytest.mark.vectors
def test_crate_vectors(reference):
    file = reference("crate")
    for case in file.cases("ista"):
        x, d = jnp.asarray(case["x"]), jnp.asarray(case["dictionary"])
        options = {name: case[name] for name in ("step_size", "lam")}
        layer = functools.partial(_layer, **options)
        y, back = jax.vjp(layer, x, d)
        np.testing.assert_allclose(y, case["y"], rtol=1e-9, atol=1e-12)
        grad_x, grad_d = back(jnp.asarray(case["cotangent"]))
        np.testing.assert_allclose(grad_x, case["grad_x"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(grad_d, case["grad_dictionary"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose((y == 0).mean(), case["zero_fraction"], rtol=1e-6)
    for case in file.cases("odl"):
        settings = {name: case[name] for name in ("step_size", "lam", "num_steps")}
        codes, y = coding.odl_block(
            jnp.asarray(case["x"]), jnp.asarray(case["dictionary"]), **settings
        )
        np.testing.assert_allclose(codes, case["codes"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(y, case["y"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prox", sj.PENALTIES)
def test_every_step_lowers_the_objective(prox):
    x, dictionary = problem()
    codes, seen = trace(x, dictionary, prox=prox, lam=0.1, num_steps=40)
    expected = ista(x, dictionary, prox=prox, lam=0.1, num_steps=40)
    np.testing.assert_allclose(codes, expected, atol=1e-5)
    assert seen.shape == (41, 6)
    assert bool((jnp.diff(seen, axis=0) <= 1e-5).all())
    assert float(seen[-1].mean()) < 0.7 * float(seen[0].mean())


def test_the_solution_meets_the_conditions_of_the_lasso(x64):
    """Correlations with the residual are lam on the support, and no larger elsewhere."""
    x, dictionary = problem(dtype=jnp.float64)
    codes = fista(x, dictionary, lam=0.1, num_steps=3000)
    slope = (x - codes @ dictionary.T) @ dictionary
    on = codes != 0
    np.testing.assert_allclose(slope[on], 0.1 * jnp.sign(codes)[on], rtol=1e-6)
    assert float(jnp.abs(slope).max()) <= 0.1 + 1e-9
    assert 0 < float(on.mean()) < 0.5


def test_momentum_is_faster():
    x, dictionary = problem()
    slow = trace(x, dictionary, lam=0.05, num_steps=60).objective[-1]
    fast = trace(x, dictionary, lam=0.05, num_steps=60, momentum=True).objective[-1]
    assert float(fast.sum()) < float(slow.sum())


@pytest.mark.parametrize("run", [ista, fista])
def test_rows_stop_by_themselves(run):
    """With a tolerance the codes are close to those of all steps, and no row sees another."""
    x, dictionary = problem()
    full = run(x, dictionary, lam=0.1, num_steps=500)
    stopped = run(x, dictionary, lam=0.1, num_steps=500, tol=1e-4)
    np.testing.assert_allclose(stopped, full, atol=2e-2)
    alone = run(x[2:3], dictionary, lam=0.1, num_steps=500, tol=1e-4)
    np.testing.assert_allclose(alone, stopped[2:3], atol=1e-6)


def test_a_start_is_used():
    x, dictionary = problem()
    first = ista(x, dictionary, lam=0.1, num_steps=20)
    both = ista(x, dictionary, lam=0.1, num_steps=20, init=first)
    np.testing.assert_allclose(both, ista(x, dictionary, lam=0.1, num_steps=40), atol=1e-6)


def test_operators_are_a_matrix():
    x, dictionary = problem()
    maps = coding.Operators(lambda a: a @ dictionary.T, lambda r: r @ dictionary)
    step = float(1 / coding.spectral_norm_sq(dictionary))
    for solve in (coding.ista, coding.fista):
        got = solve(x, maps, lam=0.1, num_steps=10, step=step)
        np.testing.assert_allclose(got, solve(x, dictionary, lam=0.1, num_steps=10), atol=1e-6)


@pytest.mark.parametrize("prox", ["l1", "nonnegative_l1", "l1/2"])
def test_implicit_gradients_equal_those_through_the_steps(x64, prox):
    x, dictionary = problem(b=3, dtype=jnp.float64)
    lam = jnp.asarray(0.3)  # few atoms, so that both converge
    weights = jax.random.normal(jax.random.key(3), (3, 20), jnp.float64)

    def unrolled(x, dictionary, lam):
        step = jax.lax.stop_gradient(1 / coding.spectral_norm_sq(dictionary))
        codes = coding.ista(x, dictionary, prox=prox, lam=lam, num_steps=1500, step=step)
        return jnp.sum(weights * codes)

    def implicit(x, dictionary, lam):
        codes = coding.ista(x, dictionary, prox=prox, lam=lam, num_steps=1500)
        found = coding.implicit_codes(x, dictionary, codes, prox=prox, lam=lam, num_steps=1500)
        return jnp.sum(weights * found)

    expected = jax.jit(jax.grad(unrolled, argnums=(0, 1, 2)))(x, dictionary, lam)
    got = jax.jit(jax.grad(implicit, argnums=(0, 1, 2)))(x, dictionary, lam)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_transformations_and_dtypes():
    x, dictionary = problem()
    half = ista(x.astype(jnp.bfloat16), dictionary.astype(jnp.bfloat16), lam=0.1, num_steps=20)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(jnp.float32), ista(x, dictionary, lam=0.1, num_steps=20), atol=0.05
    )
    stacked = jnp.stack([x, 2 * x])
    mapped = jax.vmap(lambda x: coding.ista(x, dictionary, lam=0.1, num_steps=20))(stacked)
    np.testing.assert_allclose(mapped[0], ista(x, dictionary, lam=0.1, num_steps=20), atol=1e-6)
    slopes = jax.grad(lambda d: coding.ista(x, d, lam=0.1, num_steps=5).sum())(dictionary)
    assert bool(jnp.isfinite(slopes).all())


def test_the_penalty_of_cel0_is_that_of_its_proximal_map():
    """Brute force over a grid."""
    grid = jnp.linspace(-3, 3, 60001)
    norms = jnp.full(grid.shape, 0.7)
    cel0 = sj.penalty("cel0")
    for z in (-1.7, -0.9, 0.3, 0.8, 2.0):
        total = 0.5 * (grid - z) ** 2 + 0.8 * cel0.value(grid, lam=0.3, norms=norms)
        got = cel0.prox(jnp.asarray([z]), lam=0.3, step=0.8, norms=norms[:1])
        np.testing.assert_allclose(got, grid[jnp.argmin(total)], atol=2e-4)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x, dictionary = problem()
    good = {"lam": 0.1, "num_steps": 5}
    solve = functools.partial(coding.ista, x, dictionary)
    with pytest.raises(ValueError, match="lam is -1; it must not be negative"):
        solve(lam=-1, num_steps=5)
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        solve(lam=0.1, num_steps=0)
    with pytest.raises(ValueError, match="step is 0; it must be positive"):
        solve(**good, step=0)
    with pytest.raises(ValueError, match=r"tol is -0.1; it must not be negative"):
        solve(**good, tol=-0.1)
    with pytest.raises(ValueError, match="penalty is 'l3'; allowed are l1, l0, l1/2, l2/3, cel0"):
        solve(**good, prox="l3")
    with pytest.raises(ValueError, match="prox is 'l0', which is not convex; ista takes it"):
        coding.fista(x, dictionary, **good, prox="l0")
    with pytest.raises(ValueError, match=r"x and dictionary have shapes \(6, 12\) and \(11, 20\)"):
        coding.ista(x, dictionary[:-1], **good)
    with pytest.raises(ValueError, match=r"init has shape \(6, 3\); it must be \(6, 20\)"):
        solve(**good, init=jnp.zeros((6, 3)))
    with pytest.raises(ValueError, match="dictionary has an atom of zeros, column 4"):
        coding.ista(x, dictionary.at[:, 4].set(0), **good)
    with pytest.raises(ValueError, match="x holds values that are not finite"):
        coding.ista(x.at[0, 0].set(jnp.nan), dictionary, **good)
    with pytest.raises(ValueError, match="dictionary holds values that are not finite"):
        coding.ista(x, dictionary.at[0, 0].set(jnp.inf), **good)
    with pytest.raises(ValueError, match="prox is 'l1/2', which is not convex; ista takes it"):
        coding.ista_trace(x, dictionary, **good, prox="l1/2", momentum=True)
    maps = coding.Operators(lambda a: a, lambda r: r)
    with pytest.raises(ValueError, match="step is None; operators need one"):
        coding.ista(x, maps, **good)
    with pytest.raises(ValueError, match="prox is 'cel0', which needs the columns of a matrix"):
        coding.ista(x, maps, **good, step=1.0, prox="cel0")
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        coding.odl_block(x, dictionary, step_size=0.1, lam=0.1, num_steps=0)
    with pytest.raises(ValueError, match="codes, target and dictionary have shapes"):
        coding.ista_step(x, x, dictionary, step_size=0.1, lam=0.1)
