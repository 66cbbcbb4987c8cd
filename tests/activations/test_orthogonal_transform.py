"""Folding and rotating: the vectors, invariance of the model, and what becomes orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.activations import orthogonal_transform as transform
from sparsejax.activations import wina

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
ROTATED_INSIDE = ("o", "down")
ENDS = ("embed", "head", "final_norm")


def logits(params, tokens, shortcuts=None):
    """The toy decoder of the vectors: two heads, no positions."""

    def normed(h, weight):
        return h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * weight

    x = params["embed"][tokens]
    for i, layer in enumerate(params["layers"]):
        h = normed(x, layer["norm1"])
        q, k, v = ((h @ layer[n]).reshape(*h.shape[:2], 2, -1) for n in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        out = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*h.shape[:2], -1) @ layer["o"]
        x = (x if shortcuts is None else x @ shortcuts[i]["attn"]) + out + layer.get("o_bias", 0.0)
        h = normed(x, layer["norm2"])
        out = (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
        out = out + layer.get("down_bias", 0.0)
        x = (x if shortcuts is None else x @ shortcuts[i]["mlp"]) + out
    return normed(x, params["final_norm"]) @ params["head"]


def random_params(dtype=np.float64, *, width=8, hidden=12, narrow=8, layers=2):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, dtype)

    shapes = {"q": (width, width), "k": (width, narrow), "v": (width, narrow)}
    shapes |= {"o": (width, width), "gate": (width, hidden), "up": (width, hidden)}
    shapes |= {"down": (hidden, width)}
    made = [
        {name: normal(*shape) for name, shape in shapes.items()}
        | {norm: jnp.asarray(rng.uniform(0.5, 2, width), dtype) for norm in ("norm1", "norm2")}
        for _ in range(layers)
    ]
    ends = {"embed": normal(11, width), "head": normal(width, 11)}
    return ends | {"final_norm": jnp.asarray(rng.uniform(0.5, 2, width), dtype), "layers": made}


def params_of(case, stage):
    """Their weights are `[out, in]`; the table of embeddings is a table."""
    numbers = {name.split("_")[1] for name in case.names() if name.startswith(f"{stage}_l")}
    layers = []
    for number in sorted(numbers, key=lambda name: int(name[1:])):
        names = (*KERNELS, "norm1", "norm2")
        layers.append({name: jnp.asarray(case[f"{stage}_{number}_{name}"].T) for name in names})
    ends = {name: jnp.asarray(case[f"{stage}_{name}"]) for name in ENDS}
    return ends | {"head": ends["head"].T, "layers": layers}


@pytest.mark.vectors
def test_vectors(reference):
    case = reference("wina").whole()
    mine = ("before", "after", "tokens", "logits")
    for name in case.names():
        if name.split("_")[0] not in mine:
            case.ignore(name, reason="compared in test_wina.py")
    before, after = (params_of(case, stage) for stage in ("before", "after"))
    tokens = jnp.asarray(case["tokens"])
    exact = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(logits(before, tokens), case["logits_before"], **exact)
    np.testing.assert_allclose(
        logits(transform.fold_norms(before), tokens), case["logits_before"], **exact
    )
    ours, shortcuts = transform.column_orthogonal_transform(before)
    for given in ("logits_before", "logits_after"):
        np.testing.assert_allclose(logits(ours, tokens, shortcuts), case[given], **exact)

    def unique(name, kernel):  # what no choice of singular vectors changes
        return kernel @ kernel.T if name in ROTATED_INSIDE else kernel.T @ kernel

    def norms(stage, params):
        for layer in params["layers"]:
            for name in ("k", "gate"):
                gram = layer[name] @ layer[name].T
                np.testing.assert_allclose(gram, jnp.diag(jnp.diag(gram)), atol=1e-9)
        return [wina.column_norms(layer, where=r"^(k|gate)$") for layer in params["layers"]]

    for mine, theirs in zip(norms("ours", ours), norms("after", after)):
        np.testing.assert_allclose(mine["k"], theirs["k"], **exact)
        np.testing.assert_allclose(mine["gate"], theirs["gate"], **exact)
    for i, (mine, theirs) in enumerate(zip(ours["layers"], after["layers"], strict=True)):
        for name in KERNELS:
            np.testing.assert_allclose(
                unique(name, mine[name]), unique(name, theirs[name]), **exact
            )
        for name in ("norm1", "norm2"):
            np.testing.assert_array_equal(mine[name], theirs[name])
        given = {kind: case[f"after_l{i}_{kind}_shortcut"] for kind in ("attn", "mlp")}
        for kind, matrix in given.items():
            # of both, the product of two rotations
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), **exact)
            found = shortcuts[i][kind]
            np.testing.assert_allclose(found @ found.T, np.eye(len(matrix)), **exact)
    embed = ours["embed"]
    np.testing.assert_allclose(embed @ embed.T, after["embed"] @ after["embed"].T, **exact)
    np.testing.assert_allclose(
        ours["head"].T @ ours["head"], after["head"].T @ after["head"], **exact
    )
    np.testing.assert_array_equal(ours["final_norm"], after["final_norm"])
    # our shortcuts fit their weights as soon as the singular vectors are theirs
    theirs = [
        {kind: jnp.asarray(case[f"after_l{i}_{kind}_shortcut"]) for kind in ("attn", "mlp")}
        for i in range(len(after["layers"]))
    ]
    np.testing.assert_allclose(logits(after, tokens, theirs), case["logits_after"], **exact)


def test_the_model_stays_the_same_and_narrow_keys_lose_nothing(x64):
    params = random_params(narrow=4)
    biased = [
        layer | {"o_bias": jnp.arange(8.0), "down_bias": jnp.arange(8.0) - 3, "q_bias": jnp.ones(8)}
        for layer in params["layers"]
    ]
    params |= {"layers": biased}
    for layer in params["layers"]:  # grouped: two heads share the keys and values
        for name in "kv":
            layer[name] = jnp.repeat(layer[name].reshape(8, 1, 4), 2, axis=1).reshape(8, 8)
    tokens = jnp.asarray([[1, 5, 2, 7, 3]])
    ours, shortcuts = transform.column_orthogonal_transform(params)
    np.testing.assert_allclose(
        logits(ours, tokens, shortcuts), logits(params, tokens), rtol=1e-10, atol=1e-10
    )
    # rows beyond the rank have no weight: half of the inputs are enough for the keys
    for layer in ours["layers"]:
        c = wina.column_norms(layer["k"], where=lambda path, leaf: True)
        np.testing.assert_allclose(c[4:], 0, atol=1e-12)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)))
        sparse = wina.sparse_linear(x, layer["k"], c, 0.5)
        np.testing.assert_allclose(sparse, x @ layer["k"], rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(layer["q_bias"], np.ones(8))


def test_wina_is_exact_on_rotated_kernels_alone(x64):
    params = random_params()
    ours, _ = transform.column_orthogonal_transform(params)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(40, 8)))
    for layer in ours["layers"]:
        for name, orthogonal in (("k", True), ("gate", True), ("q", False)):
            c = wina.column_norms(layer[name], where=lambda path, leaf: True)
            dropped = jnp.where(wina.wina_mask(x, c, 0.5), 0.0, x)
            lost = jnp.sum((dropped @ layer[name]) ** 2, axis=1)
            sums = jnp.sum((dropped * c) ** 2, axis=1)
            assert np.allclose(lost, sums, rtol=1e-9) == orthogonal


def test_the_dtypes_stay_and_the_tree_is_not_written_to(x64):
    params = random_params(np.float32)
    given = jax.tree.map(lambda a: a, params)
    ours, shortcuts = transform.column_orthogonal_transform(params)
    jax.tree.map(np.testing.assert_array_equal, params, given)
    for leaf in jax.tree.leaves((ours, shortcuts)):
        assert leaf.dtype == jnp.float32
    narrow, pairs = transform.column_orthogonal_transform(random_params(jnp.bfloat16))
    assert narrow["layers"][0]["k"].dtype == pairs[0]["attn"].dtype == jnp.bfloat16
    # rounded once, from double precision
    k = np.float64(narrow["layers"][0]["k"])
    gram = k @ k.T
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 0.02 * gram.max()


def test_errors(unchecked):
    params = random_params(np.float32)
    layer = params["layers"][0]

    def with_layer(**change):
        return params | {"layers": [layer, {**layer, **change}]}

    lacking = {name: a for name, a in layer.items() if name != "gate"}
    for tree, message in (
        (
            {"embed": params["embed"]},
            "params lacks final_norm, head, layers and has unknown nothing",
        ),
        (params | {"bias": 1}, "params lacks nothing and has unknown bias; it needs embed, final"),
        (params | {"layers": [lacking]}, r"params\['layers'\]\[0\] lacks gate"),
        (params | {"head": params["embed"]}, r"head has shape \(11, 8\); it must be \[8, any\]"),
        (params | {"final_norm": jnp.ones(7)}, r"final_norm has shape \(7,\); it must be \[8\]"),
        (
            with_layer(q=jnp.ones((7, 8))),
            r"layers\[1\] q has shape \(7, 8\); it must be \[8, any\]",
        ),
        (with_layer(down=jnp.ones((12, 7))), r"layers\[1\] down has shape .* \[any, 8\]"),
        (with_layer(norm2=jnp.ones((1, 8))), r"layers\[1\] norm2 has shape \(1, 8\)"),
    ):
        for function in (transform.fold_norms, transform.column_orthogonal_transform):
            with pytest.raises(ValueError, match=message):
                function(tree)
    with pytest.raises(ValueError, match="params\\['layers'\\] is empty"):
        transform.column_orthogonal_transform(params | {"layers": []})
