"""A change of basis of a decoder's residual stream in which WINA's criterion is exact.

In the basis of the left singular vectors of a kernel `[in, out]` its rows are orthogonal, so what
dropped inputs lose adds up in squares. An RMS norm commutes with such a rotation once its weight
is folded into the kernels that follow, and the model stays the same.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

_READ = {"norm1": ("q", "k", "v"), "norm2": ("gate", "up")}  # which kernels follow a norm
_WRITE = ("o", "down")
_KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


def fold_norms(params: PyTree) -> PyTree:
    """Multiplies the weights of the RMS norms into the kernels that follow them; they become 1.

    On the host in float64, so not under `jit`; not differentiated.

    Args:
      params: `{"embed": [v, d], "head": [d, v], "final_norm": [d], "layers": [...]}` with layers
        `{"q", "k", "v", "o", "gate", "up", "down": [in, out], "norm1", "norm2": [d]}`, where norm1
        is before q, k and v, and norm2 before gate and up. A layer may also have a `{name}_bias`
        of each kernel. Tied embeddings are given as two.

    Returns:
      The same tree, in its dtypes.

    Raises:
      ValueError: parts that are missing or unknown, or of shapes that do not fit.

    Source: SliceGPT (2024, arXiv 2401.15024); WINA (2025, arXiv 2505.19427). The latter's code also
    subtracts the mean of every embedding, which an RMS norm does not allow.

    >>> layer = {name: jnp.eye(2) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    >>> layer |= {"norm1": jnp.asarray([2.0, 3.0]), "norm2": jnp.ones(2)}
    >>> ends = {"embed": jnp.eye(2), "head": jnp.eye(2), "final_norm": jnp.ones(2)}
    >>> fold_norms({**ends, "layers": [layer]})["layers"][0]["q"]
    Array([[2., 0.],
           [0., 3.]], dtype=float32)
    """
    wide = _widened(params)
    _fold(wide)
    return _narrowed(wide, params)


def column_orthogonal_transform(
    params: PyTree,
) -> tuple[PyTree, list[dict[str, Float[Array, "d d"]]]]:
    """Folds the norms and rotates the residual stream: k and gate of every layer become orthogonal.

    Their rows (the columns of `[out, in]`) get the singular values as norms, 0 beyond the rank.
    Attention of layer l works in the basis of its k, the rest of it in that of its gate, the head
    in that of the last gate. A residual sum therefore becomes `x @ shortcut + f(x)`: two products
    `[d, d]` a layer that the dense model has not. Compute `column_norms` afterwards.

    On the host in float64, so not under `jit`; not differentiated. Signs and order of singular
    vectors are not unique, nor are then the rotated kernels; what the model computes is.

    Args:
      params: as `fold_norms` takes them. Biases of o and down are rotated, the others stay.

    Returns:
      The tree in its dtypes, and for every layer `{"attn", "mlp"}` shortcuts `[d, d]` in the dtype
      of the embedding.

    Raises:
      ValueError: as `fold_norms`, or no layers.

    Source: WINA (2025, arXiv 2505.19427), section on the tensor transformation.

    >>> layer = {name: jnp.eye(2) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    >>> layer |= {"k": jnp.asarray([[1.0], [1.0]]), "norm1": jnp.ones(2), "norm2": jnp.ones(2)}
    >>> ends = {"embed": jnp.eye(2), "head": jnp.eye(2), "final_norm": jnp.ones(2)}
    >>> rotated, shortcuts = column_orthogonal_transform({**ends, "layers": [layer]})
    >>> jnp.abs(rotated["layers"][0]["k"][:, 0]).round(3)
    Array([1.414, 0.   ], dtype=float32)
    """
    wide = _widened(params)
    _fold(wide)
    layers = wide["layers"]
    if not layers:
        raise ValueError("params['layers'] is empty: there is no kernel to be made orthogonal")
    basis = _left_vectors(layers[0]["k"])
    wide["embed"] = wide["embed"] @ basis
    shortcuts = []
    for i, layer in enumerate(layers):
        inner = _left_vectors(layer["gate"])
        after = _left_vectors(layers[i + 1]["k"]) if i + 1 < len(layers) else inner
        for norm, rotation in (("norm1", basis), ("norm2", inner)):
            for name in _READ[norm]:
                layer[name] = rotation.T @ layer[name]
        for name, rotation in zip(_WRITE, (inner, after)):
            for written in (name, f"{name}_bias"):
                if written in layer:
                    layer[written] = layer[written] @ rotation
        shortcuts.append({"attn": basis.T @ inner, "mlp": inner.T @ after})
        basis = after
    wide["head"] = basis.T @ wide["head"]
    dtype = params["embed"].dtype
    made = [{name: jnp.asarray(a, dtype) for name, a in pair.items()} for pair in shortcuts]
    return _narrowed(wide, params), made


def _left_vectors(kernel: np.ndarray) -> np.ndarray:
    """All of them, also those beyond the rank: an orthogonal matrix `[in, in]`."""
    # of a wide kernel the right vectors, which nobody needs, are the larger part
    return np.linalg.svd(kernel, full_matrices=kernel.shape[0] > kernel.shape[1])[0]


def _fold(wide: dict[str, Any]) -> None:
    """Folds in place."""
    for layer in wide["layers"]:
        for norm, names in _READ.items():
            for name in names:
                layer[name] = layer[norm][:, None] * layer[name]
            layer[norm] = np.ones_like(layer[norm])
    wide["head"] = wide["final_norm"][:, None] * wide["head"]
    wide["final_norm"] = np.ones_like(wide["final_norm"])


def _widened(params: Any) -> dict[str, Any]:
    """A copy on the host in float64, once everything is there."""
    _check_parts("params", params, {"embed", "head", "final_norm", "layers"}, set())
    width = params["embed"].shape[-1]
    _check_shape("embed", params["embed"], (None, width))
    _check_shape("head", params["head"], (width, None))
    _check_shape("final_norm", params["final_norm"], (width,))
    biases = {f"{name}_bias" for name in _KERNELS}
    for i, layer in enumerate(params["layers"]):
        _check_parts(f"params['layers'][{i}]", layer, {*_KERNELS, *_READ}, biases)
        for norm, names in _READ.items():
            _check_shape(f"layers[{i}] {norm}", layer[norm], (width,))
            for name in names:
                _check_shape(f"layers[{i}] {name}", layer[name], (width, None))
        for name in _WRITE:
            _check_shape(f"layers[{i}] {name}", layer[name], (None, width))
    layers = [{name: np.asarray(a, np.float64) for name, a in x.items()} for x in params["layers"]]
    ends = ("embed", "head", "final_norm")
    return {name: np.asarray(params[name], np.float64) for name in ends} | {"layers": layers}


def _narrowed(wide: dict[str, Any], params: Any) -> dict[str, Any]:
    """Back on the device, each array in the dtype that it had."""
    layers = [
        {name: jnp.asarray(a, old[name].dtype) for name, a in layer.items()}
        for layer, old in zip(wide["layers"], params["layers"])
    ]
    ends = ("embed", "head", "final_norm")
    return {name: jnp.asarray(wide[name], params[name].dtype) for name in ends} | {"layers": layers}


def _check_parts(name: str, tree: Any, required: set[str], optional: set[str]) -> None:
    missing, unknown = required - set(tree), set(tree) - required - optional
    if missing or unknown:
        raise ValueError(
            f"{name} lacks {', '.join(sorted(missing)) or 'nothing'} and has unknown "
            f"{', '.join(sorted(unknown)) or 'nothing'}; it needs {', '.join(sorted(required))}"
        )


def _check_shape(name: str, array: Any, shape: tuple[int | None, ...]) -> None:
    fits = len(array.shape) == len(shape)
    if not (fits and all(n in (None, m) for n, m in zip(shape, array.shape))):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(array.shape)}; it must be [{wanted}]")
