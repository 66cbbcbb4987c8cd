"""Coordinate descent, matching pursuits and dictionary learning, against plain forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import coding
from tests.coding.test_solvers import problem

descend = jax.jit(coding.coordinate_descent, static_argnames=("prox", "num_sweeps", "tol"))
pursue = jax.jit(coding.matching_pursuit, static_argnames=("num_steps", "tol"))
omp = jax.jit(coding.orthogonal_matching_pursuit, static_argnames=("num_atoms", "tol"))


def test_coordinate_descent_solves_the_lasso():
    x, dictionary = problem()
    expected = jax.jit(lambda: coding.fista(x, dictionary, lam=0.1, num_steps=2000))()
    np.testing.assert_allclose(descend(x, dictionary, lam=0.1, num_sweeps=200), expected, atol=1e-3)
    stopped = descend(x, dictionary, lam=0.1, num_sweeps=500, tol=1e-4)
    np.testing.assert_allclose(stopped, expected, atol=5e-3)
    alone = descend(x[1:2], dictionary, lam=0.1, num_sweeps=500, tol=1e-4)
    np.testing.assert_allclose(alone, stopped[1:2], atol=1e-5)


@pytest.mark.parametrize("prox", sj.PENALTIES)
def test_no_sweep_raises_the_objective(prox):
    x, dictionary = problem()
    dictionary = dictionary * jnp.linspace(0.5, 1.5, 20)  # atoms of any length
    codes, seen = None, []
    for _ in range(4):
        codes = descend(x, dictionary, prox=prox, lam=0.1, num_sweeps=1, init=codes)
        seen.append(coding.objective(x, dictionary, codes, lam=0.1, penalty=prox))
    assert bool((jnp.diff(jnp.stack(seen), axis=0) <= 1e-5).all())


def by_lists(x, dictionary, steps, *, orthogonal):
    """One row after the other in NumPy."""
    codes = np.zeros((len(x), dictionary.shape[1]))
    norms = np.linalg.norm(dictionary, axis=0)
    for row, signal in zip(codes, np.asarray(x, np.float64), strict=True):
        residual, chosen = signal.copy(), []
        for _ in range(steps):
            sizes = np.abs(residual @ dictionary / norms)
            if orthogonal:
                sizes[chosen] = -1
            best = int(np.argmax(sizes))
            chosen.append(best)
            if orthogonal:
                part = dictionary[:, chosen]
                row[chosen] = np.linalg.lstsq(part, signal, rcond=None)[0]
                residual = signal - part @ row[chosen]
            else:
                gain = residual @ dictionary[:, best] / norms[best] ** 2
                row[best] += gain
                residual = residual - gain * dictionary[:, best]
    return codes


def test_pursuits_equal_their_plain_form(x64):
    x, dictionary = problem(dtype=jnp.float64)
    dictionary = dictionary * jnp.linspace(0.5, 1.5, 20)
    plain = np.asarray(dictionary)
    got = pursue(x, dictionary, num_steps=5)
    np.testing.assert_allclose(got, by_lists(x, plain, 5, orthogonal=False), atol=1e-9)
    got = omp(x, dictionary, num_atoms=5)
    np.testing.assert_allclose(got, by_lists(x, plain, 5, orthogonal=True), atol=1e-9)


def test_omp_finds_the_codes_of_an_easy_problem():
    dictionary = jnp.eye(8)
    codes = jnp.zeros((2, 8)).at[0, 3].set(2.0).at[1, jnp.asarray([1, 6])].set(-1.5)
    np.testing.assert_allclose(omp(codes, dictionary, num_atoms=4), codes, atol=1e-6)


def test_pursuits_stop_at_the_tolerance():
    x, dictionary = problem()
    for codes in (
        pursue(x, dictionary, num_steps=200, tol=0.2),
        omp(x, dictionary, num_atoms=12, tol=0.2),
    ):
        left = jnp.linalg.norm(x - codes @ dictionary.T, axis=1)
        assert bool((left <= 0.2 * jnp.linalg.norm(x, axis=1) * 1.0001).all())
    few, many = ((omp(x, dictionary, num_atoms=12, tol=t) != 0).sum() for t in (0.5, 0.1))
    assert int(few) < int(many)


def test_a_row_of_zeros_has_no_codes():
    x, dictionary = problem()
    x = x.at[0].set(0)
    for codes in (pursue(x, dictionary, num_steps=3), omp(x, dictionary, num_atoms=3)):
        assert not bool(codes[0].any())
        assert bool(jnp.isfinite(codes).all())


def test_omp_ends_where_the_span_is_full():
    """Copies of an atom add nothing, and no least squares with them is solved."""
    dictionary = jnp.concatenate([jnp.eye(4)[:, :2]] * 2, axis=1)
    codes = omp(jnp.asarray([[1.0, 2.0, 0.0, 0.0]]), dictionary, num_atoms=4)
    np.testing.assert_allclose(codes @ dictionary.T, [[1, 2, 0, 0]], atol=1e-6)
    assert int((codes != 0).sum()) == 2


def test_learning_lowers_the_error_and_keeps_unit_atoms():
    x, _ = problem(b=64)
    coder = functools.partial(coding.ista, lam=0.1, num_steps=20)
    state = coding.init_dictionary(jax.random.key(5), 12, 20)
    step = jax.jit(functools.partial(coding.learn_batch, coder=coder, learning_rate=2.0))
    errors = []
    for _ in range(30):
        before = state.dictionary
        state, codes = step(state, x)
        errors.append(float(jnp.mean(jnp.square(x - codes @ before.T))))
    assert errors[-1] < 0.7 * errors[0]
    np.testing.assert_allclose(jnp.linalg.norm(state.dictionary, axis=0), 1, rtol=1e-5)
    assert int(state.step) == 30


def test_dead_atoms_are_set_anew_and_others_left():
    x, dictionary = problem(b=4)
    lost = jnp.zeros((12, 2)).at[11].set(1.0)  # x has nothing there
    x = x.at[:, 11].set(0)
    state = coding.DictionaryState(
        jnp.concatenate([dictionary[:, :18], lost], axis=1), jnp.zeros(20, jnp.int32), jnp.int32(0)
    )

    def coder(x, dictionary):
        return coding.ista(x, dictionary, lam=0.1, num_steps=10).at[:, 18:].set(0)

    step = jax.jit(
        functools.partial(coding.learn_batch, coder=coder, learning_rate=0.0, patience=2)
    )
    once, _ = step(state, x)
    assert once.unused[18:].tolist() == [1, 1]
    np.testing.assert_allclose(once.dictionary[:, 18:], lost, atol=1e-6)
    twice, codes = step(once, x)
    worst = jnp.argsort(-jnp.sum(jnp.square(x - codes @ once.dictionary.T), axis=1))[:2]
    np.testing.assert_allclose(
        twice.dictionary[:, 18:], coding.normalise(x[worst]).T, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(twice.dictionary[:, :18], once.dictionary[:, :18], atol=1e-6)
    assert twice.unused[18:].tolist() == [0, 0]


def test_sharded_rows(mesh):
    """Rows over the data axis: the same codes."""
    x, dictionary = problem(b=8)
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_allclose(
        omp(placed, dictionary, num_atoms=3), omp(x, dictionary, num_atoms=3), atol=1e-5
    )
    got = descend(placed, dictionary, lam=0.1, num_sweeps=3)
    np.testing.assert_allclose(got, descend(x, dictionary, lam=0.1, num_sweeps=3), atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x, dictionary = problem()
    with pytest.raises(ValueError, match="num_sweeps is 0; it must be at least 1"):
        coding.coordinate_descent(x, dictionary, lam=0.1, num_sweeps=0)
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        coding.matching_pursuit(x, dictionary, num_steps=0)
    with pytest.raises(ValueError, match=r"tol is 1; it must be in \[0, 1\)"):
        coding.matching_pursuit(x, dictionary, num_steps=1, tol=1)
    with pytest.raises(ValueError, match="num_atoms is 13; it must be at most 12, of 12 x 20"):
        coding.orthogonal_matching_pursuit(x, dictionary, num_atoms=13)
    for solve in (
        functools.partial(coding.orthogonal_matching_pursuit, num_atoms=2),
        functools.partial(coding.matching_pursuit, num_steps=2),
        functools.partial(coding.coordinate_descent, lam=0.1, num_sweeps=2),
    ):
        with pytest.raises(ValueError, match="dictionary has an atom of zeros, column 0"):
            solve(x, dictionary.at[:, 0].set(0))
        with pytest.raises(ValueError, match="x holds values that are not finite"):
            solve(x.at[0].set(jnp.nan), dictionary)
        with pytest.raises(ValueError, match="x and dictionary have shapes"):
            solve(x[:, :-1], dictionary)
    with pytest.raises(ValueError, match="n is 0 and k is 3; both must be at least 1"):
        coding.init_dictionary(jax.random.key(0), 0, 3)
    with pytest.raises(ValueError, match="dictionary, x and codes have shapes"):
        coding.dictionary_step(dictionary, x, jnp.zeros((6, 3)), learning_rate=1.0)
    state = coding.init_dictionary(jax.random.key(0), 12, 20)
    with pytest.raises(ValueError, match="patience is 0; it must be at least 1, or None"):
        coding.learn_batch(state, x, coder=lambda x, d: x, learning_rate=1.0, patience=0)
