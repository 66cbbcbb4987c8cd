"""Block-sparse attention: what the authors of five papers compute from the blocks that they chose.

A rule of this file only turns a stored selection into sources. It takes arrays of the file by name
and gives results by name, in the file's layout.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.block_sparse_attention import (
    KVSource,
    block_sparse_attention,
    merge_lse,
    transpose_lists,
    validate_sources,
)

pytestmark = pytest.mark.vectors

WAYS = {
    "xla": {"implementation": "xla"},
    "triton": {"implementation": "triton", "interpret": True},
    "tpu": {"implementation": "tpu", "interpret": True},
}
SINGLE = {"": 1e-4}
"""Tolerances of the kernels, which compute in float32."""

SNAPKV = (
    "q k v approximation_window kernel_size local_window prefix_tokens token_capacity "
    "min_head_capacity_ratio kept_index kept_count"
)
IGNORED = {
    "block_sparse": "top_blocks sparsity",
    "vertical_slash": "vertical_index num_vertical sink_columns slash_offset num_slash "
    "local_slashes last_q sparsity",
    "flexprefill": "q k v alpha min_budget last_q num_vertical vertical_index num_slash "
    "slash_offset",
    "snapkv": SNAPKV,
    "ada_snapkv": SNAPKV,
    "quest": "page_min page_max share_pages token_budget",
    "nosa": "kernel_size kernel_stride init_blocks local_blocks select_blocks topk_blocks "
    "compressed_k stage1_score block_score_query block_score_agnostic boundary_tie cis_chunk_mean",
    "llsa": "topk",
}
"""Keys that belong to the selection, by kind of case; a kind without a rule has no other key."""

# of the positions of a query and a key
causal, earlier, later = operator.ge, operator.gt, operator.lt


def source(k, v, starts, counts=None, **more):
    """A source of lists `[Hs, Nq, S]`, or `[Nq, S]` for all heads; what is negative is absent."""
    starts = starts.reshape(-1, *starts.shape[-2:]).astype(np.int32)
    if counts is None:
        starts = np.take_along_axis(starts, np.argsort(starts < 0, axis=-1, kind="stable"), axis=-1)
        counts = np.sum(starts >= 0, axis=-1)
    counts = np.broadcast_to(counts, starts.shape[:2]).astype(np.int32)
    return KVSource(k, v, starts, counts, **more)


def one_head_axis(x):
    """`[B, H, ...]` to `[B * H, ...]`."""
    return x.reshape(-1, *x.shape[2:])


def means(x, n):
    """Of n tokens after the other: `[H, L, D]` to `[H, L / n, D]`."""
    return x.reshape(len(x), -1, n, x.shape[2]).mean(2)


# the rules


def block_sparse(case, attend, q, k, v):
    block, tiles = case["block_size"], -(-q.shape[1] // case["block_size"])
    starts = case["block_index"][:, :tiles] * block
    blocks = source(k, v, starts, case["block_count"][:tiles], width=block)
    return {"out": attend(q, [blocks], block_q=block, mask_mod=causal)[0]}


def vertical_slash(case, attend, q, k, v):
    block = case["block_size"]
    ranges = source(k, v, case["block_start"], case["block_count"], width=block, aligned=False)
    columns = source(k, v, case["column_index"], case["column_count"], width=1)
    return {"out": attend(q, [ranges, columns], block_q=block, mask_mod=causal)[0]}


def quest(case, attend, q, k, v):
    page, q = case["page_size"], q[:, None]
    options = {"block_q": 1, "mask_mod": causal, "q_pos": jnp.array([len(k) - 1])}
    k, v = (x.swapaxes(0, 1) for x in (k, v))
    pages = source(k, v, case["selected_pages"][:, None] * page, width=page)
    out, _ = attend(q, [pages], **options)
    # where all logits are 0 the log-sum-exp counts the tokens
    _, lse = attend(jnp.zeros_like(q), [pages], **options)
    return {"out": out[:, 0], "new_length": jnp.exp(lse[:, 0])}


def nosa(case, attend, q, k, v, w_delta, a):
    block, starts = case["block_size"], case["selected_blocks"] * case["block_size"]
    positions = jnp.arange(len(q)) + (len(k) - 1 if case["decode"] else 0)
    cis = a * jax.nn.softplus(v.reshape(len(v), -1) @ w_delta.T)
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    blocks = source(k, v, starts, width=block, log_weight=cis.T)
    out, _ = attend(q, [blocks], block_q=1, mask_mod=causal, q_pos=positions)
    return {"out": out.swapaxes(0, 1), "cis": cis}


def psa(case, attend, q, k, v):
    block, factors = case["block"], one_head_axis(case["pool_factor_mask"])
    shape, (q, k, v) = q.shape, (one_head_axis(x) for x in (q, k, v))
    padded = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0)), mode="edge") for x in (k, v)]
    sources = []
    for f in np.unique(factors[factors > 0]).tolist():
        keys, values = (k, v) if f == 1 else (means(x, f) for x in padded)
        ids = np.where(factors == f, np.arange(factors.shape[2]), -1)
        last = np.arange(1, keys.shape[1] + 1, dtype=np.int32) * f - 1
        weight = jnp.full(keys.shape[:2], np.log(f), keys.dtype)
        more = {"width": block // f, "log_weight": weight, "kv_pos": np.tile(last, (len(keys), 1))}
        sources.append(source(keys, values, ids * (block // f), **more))
    out, _ = attend(q, sources, block_q=block, mask_mod=causal if case["causal"] else None)
    return {"out": out.reshape(shape)}


def llsa(case, attend, q, k, v):
    block, levels, shape = case["block_size"], case["levels"], q.shape
    q, k, v = (one_head_axis(x) for x in (q, k, v))
    tiles, sources = q.shape[1] // block, []
    for level in range(levels + 1):
        width, starts = k.shape[1], np.zeros((tiles, 1))
        if level < levels:
            chosen = one_head_axis(case[f"topk_level{level}" if level else "topk_fine"])
            width, starts = block, np.repeat(chosen, block**level, axis=1) * block
        weight = jnp.full(k.shape[:2], np.log(case["weights"][level]), k.dtype)
        sources.append(source(k, v, starts, width=width, log_weight=weight))
        if level < levels:
            k, v = means(k, block), means(v, block)
    out, lse = attend(q, sources, block_q=block)

    # the transpose of the fine lists, as one list of all key blocks' query blocks
    lists, counts = transpose_lists(jax.tree.map(jnp.asarray, sources[0]), tiles, tiles)
    absent = jnp.arange(tiles, dtype=counts.dtype) >= counts[..., None]
    order = jnp.argsort(absent.reshape(len(q), -1), axis=-1, stable=True)
    flat = jnp.take_along_axis(lists.reshape(len(q), -1), order, axis=-1)
    offsets = jnp.pad(jnp.cumsum(counts, axis=-1), ((0, 0), (1, 0)))
    for name in ("refcode_grad_k", "refcode_grad_v"):
        case.ignore(name, reason="the authors' L = 1 gradients lack the weight on the coarse part")
    return {
        "out": out.reshape(shape),
        "lse": lse.reshape(shape[:3]),
        "transpose_flat": flat[:, : sources[0].starts[0].size].reshape(*shape[:2], -1),
        "transpose_offsets": offsets.reshape(*shape[:2], -1),
    }


# Combiner: an entry's value carries behind it which slot of the joint softmax the entry is


def combiner(case, attend, x, w_query, w_key, w_value, w_out, **of_axial):
    kind, s, heads = case["kind"], case["segment_length"], case["num_heads"]

    def project(x, w):
        return one_head_axis(jnp.einsum("blm,mhd->bhld", x, w))

    def by_head(y):
        return y.reshape(-1, heads, *y.shape[1:])

    def summary_key(y):
        y = jnp.einsum("bhld,hdm->blm", by_head(y), of_axial["w_summary_proj"])
        y = jax.nn.standardize(x + y, axis=-1, epsilon=1e-6)
        y = y * of_axial["ln_scale"] + of_axial["ln_bias"]
        return project(y, of_axial["w_summary_key"])

    q, k, v = (project(x, w) for w in (w_query, w_key, w_value))
    kinds = {"fixed": fixed, "logsparse": logsparse, "axial_mixture": mixture}
    kinds["axial_rowmajor"] = functools.partial(axial, summary_key)
    seen = by_head(kinds[kind](attend, q, k, v, s))
    out, weights = jnp.split(seen, [v.shape[2]], axis=-1)
    if kind == "axial_mixture":
        weights = weights.reshape(*weights.shape[:2], -1, s, weights.shape[3])
    weights = weights.swapaxes(1, 2)
    if kind == "axial_rowmajor":
        weights = weights.reshape(len(x), -1, s, *weights.shape[2:])
    return {"out": jnp.einsum("bhld,hdm->blm", out, w_out), "joint_weights": weights}


def fixed(attend, q, k, v, s):
    n = q.shape[1] // s
    kpool, vbar = summaries(attend, q, k, v, [s])
    own = source(k, named(v, np.arange(n * s) % s, s + n), every(n, s), width=s)
    # the lists leave a query's own span out: its last query has the position of the span
    ids = np.where(np.tri(n, k=-1), np.arange(n), -1)
    last = np.broadcast_to(np.arange(1, n + 1, dtype=np.int32) * s - 1, kpool.shape[:2])
    spans = source(kpool, named(vbar, s + np.arange(n), s + n), ids, width=1, kv_pos=last)
    return attend(q, [own, spans], block_q=s, mask_mod=causal)[0]


def logsparse(attend, q, k, v, _):
    length = q.shape[1]
    levels = np.arange((length - 1).bit_length())
    kpool, vbar = summaries(attend, q, k, v, 2**levels)
    begin = np.cumsum([0, *(length >> levels[:-1])])
    ended = np.arange(length)[:, None] >> levels
    starts = np.where(ended % 2, begin + ended - 1, -1)
    slots = len(levels) + 1
    own = source(k, named(v, 0, slots), np.arange(length)[:, None], width=1)
    vbar = named(vbar, np.repeat(1 + levels, length >> levels), slots)
    return attend(q, [own, source(kpool, vbar, starts, width=1)], block_q=1)[0]


def axial(summary_key, attend, q, k, v, s):
    n = q.shape[1] // s
    row, column = np.divmod(np.arange(n * s), s)
    vbar, _ = attend(q, [source(k, v, every(n, s), width=s)], block_q=s)
    own = source(k, named(v, column, s + n), every(n, s), width=s)
    value = named(vbar, s + row, s + n)
    above = source(turned(summary_key(vbar), n), turned(value, n), every(s, n), width=n)
    return crossed(attend, q, [own], [above], s, mask_mod=causal)


def mixture(attend, q, k, v, s):
    n = q.shape[1] // s
    row, column = np.divmod(np.arange(n * s), s)

    def pooled(x, axis, reverse=False):
        """Maxima up to the token before; that before the first is never attended to."""
        x = lax.cummax(x.reshape(len(x), n, s, -1), axis, reverse=reverse)
        return jnp.roll(x, -1 if reverse else 1, axis).reshape(len(x), n * s, -1)

    def part(key, value, slot, *, mask=None, skip=None):
        """Of rows where there is a mask, else of columns."""
        value = named(value, slot, 3 * n + 2 * s)
        if mask is None:
            return source(turned(key, n), turned(value, n), every(s, n, skip), width=n)
        cut = {"tile_mask": np.zeros((1, n, 1), np.int32), "masks": mask[None]}
        return source(key, value, every(n, s, skip), width=s, **cut)

    rows = source(k, v, every(n, s), width=s)
    columns = source(turned(k, n), turned(v, n), every(s, n), width=n)
    above, _ = attend(turned(pooled(q, 1), n), [columns], block_q=n, mask_mod=earlier)
    left, _ = attend(pooled(q, 2), [rows], block_q=s, mask_mod=earlier)
    right, _ = attend(pooled(q, 2, reverse=True), [rows], block_q=s, mask_mod=later)
    others, slot = ~np.eye(s, dtype=bool), n + 2 * s + row
    in_rows = [
        part(k, v, n + column, mask=np.tri(s, dtype=bool)),
        part(pooled(k, 1), turned(above, s), n + s + column, mask=others, skip=0),
    ]
    in_columns = [
        part(k, v, row),
        part(pooled(k, 2), left, slot, skip=0),
        part(pooled(k, 2, reverse=True), right, n + slot, skip=s - 1),
    ]
    return crossed(attend, q, in_rows, in_columns, s)


def crossed(attend, q, in_rows, in_columns, s, **of_rows):
    """One softmax over sources that follow the rows of a grid and such that follow its columns."""
    n = q.shape[1] // s
    out, lse = attend(turned(q, n), in_columns, block_q=n, mask_mod=earlier)
    of_columns = turned(out, s), turned(lse[..., None], s)[..., 0]
    return merge_lse([attend(q, in_rows, block_q=s, **of_rows), of_columns])[0]


def turned(x, rows):
    """A grid, row after row, as column after column."""
    return x.reshape(len(x), rows, -1, x.shape[2]).swapaxes(1, 2).reshape(x.shape)


def every(n, width, skip=None):
    """Lists in which tile t of n reads tile t of the keys, and tile `skip` none."""
    return np.where(np.arange(n) == skip, -1, np.arange(n) * width)[:, None]


def summaries(attend, q, k, v, spans):
    """Keys and values of the whole spans of a sequence, one length of spans after the other."""
    pooled, tokens = [], []
    for span in spans:
        n = q.shape[1] // span
        pooled.append([x[:, : n * span].reshape(len(x), n, span, -1).max(2) for x in (q, k)])
        at = np.arange(n * span).reshape(n, span)
        tokens.append(np.pad(at, ((0, 0), (0, max(spans) - span)), constant_values=-1))
    qpool, kpool = (jnp.concatenate(x, axis=1) for x in zip(*pooled))
    tokens = source(k, v, np.concatenate(tokens), width=1)
    return kpool, attend(qpool, [tokens], block_q=1)[0]


def named(v, slot, slots):
    """Values that carry behind them which slot of the joint softmax they are."""
    slot = jax.nn.one_hot(slot, slots, dtype=v.dtype)
    return jnp.concatenate([v, jnp.broadcast_to(slot, (*v.shape[:2], slots))], axis=-1)


# the comparison


def evaluate(rule, case, inputs, cotangent, way):
    """All results of a case, and whether its sources are such as the TPU's kernel takes.

    XLA's form computes in double precision, and gradients; a kernel the values in single precision.
    """
    dtype, fitting = jnp.float64 if way == "xla" else jnp.float32, []

    def attend(q, sources, **options):
        for s in sources:
            empty = {name: np.empty(getattr(s, name).shape, dtype) for name in ("k", "v")}
            lists = dataclasses.replace(s, **empty, log_weight=None)
            validate_sources(q, [lists], block_q=options["block_q"])
            fitting.append(s.aligned and s.width % 8 == 0)
        sources = jax.tree.map(jnp.asarray, sources)
        return block_sparse_attention(q, sources, **options, **WAYS[way])

    def forward(inputs):
        found = rule(case, attend, **inputs)
        return found["out"], found

    @jax.jit
    def run(inputs, up):
        if up is None:
            return forward(inputs)[1]
        _, pull, found = jax.vjp(forward, inputs, has_aux=True)
        return found | {f"grad_{name}": x for name, x in pull(up)[0].items()}

    with jax.enable_x64(way == "xla"):
        inputs = {name: jnp.asarray(case[name], dtype) for name in inputs.split() if name in case}
        up = jnp.asarray(case[cotangent], dtype) if cotangent in case and way == "xla" else None
        return run(inputs, up), all(fitting)


def compare(case, found, tolerances):
    for name, value in found.items():
        if name in case:
            value, wanted = np.asarray(value), np.asarray(case[name])
            assert value.shape == wanted.shape, name
            stated = 0 if value.dtype.kind == "i" else tolerances.get(name, tolerances[""])
            atol = stated * max(1, np.abs(wanted).max())
            np.testing.assert_allclose(value, wanted, rtol=0, atol=atol, err_msg=name)


def check(file, rules, tolerances, *, inputs, kind=None, cases="case", others="", up="cotangent"):
    """Compares a file.

    Args:
      rules: by the kind of a case, which stands under the key `kind`, or one under a kind for all.
      tolerances: by kind or result, or "" for all others, of the largest entry or of 1.
      cases, others: families of keys, with attention and without. up: key of the cotangent.
    """
    assert file.families() <= {cases, *others.split()}
    kernels = set()
    for case in file.cases(cases):
        name = str(case[kind]) if kind else next(iter(rules))
        for key in IGNORED.get(name, "").split():
            case.ignore(key, reason="belongs to the rule's selection")
        if name not in rules:
            continue
        rule, stated = rules[name], {"": tolerances[name]} if name in tolerances else tolerances
        found, whole_tiles = evaluate(rule, case, inputs, up, "xla")
        compare(case, found, stated)
        # each kernel on the first case of a rule that it takes
        for way in ("triton", "tpu") if whole_tiles else ("triton",):
            if (rule, way) not in kernels:
                kernels.add((rule, way))
                compare(case, evaluate(rule, case, inputs, up, way)[0], SINGLE)
    assert kernels


def test_sparse_frontier(reference):
    rules = {"block_sparse": block_sparse, "vertical_slash": vertical_slash, "quest": quest}
    # one key of vertical_slash was rounded after the output had been computed
    tolerances = {"vertical_slash": 1e-6, "": 1e-12}
    file = reference("sparse_frontier")
    check(file, rules, tolerances, inputs="q k v", kind="method", others="block diag")


def test_nosa(reference):
    rules, inputs = {"nosa": nosa}, "q k v w_delta a"
    check(reference("nosa"), rules, {"": 1e-6}, inputs=inputs, others="slots")


def test_combiner(reference):
    rules = dict.fromkeys(["fixed", "logsparse", "axial_rowmajor", "axial_mixture"], combiner)
    tolerances = {"out": 1e-12, "grad_x": 1e-12, "joint_weights": 1e-6, "": 1e-5}
    inputs = "x w_query w_key w_value w_out w_summary_proj w_summary_key ln_scale ln_bias"
    check(reference("combiner"), rules, tolerances, inputs=inputs, kind="kind")


def test_psa(reference):
    more = {"inputs": "q k v", "cases": "attn", "others": "imp seg sim thr topk", "up": "dout"}
    check(reference("psa"), {"psa": psa}, {"out": 1e-6, "": 4e-6}, **more)


def test_llsa(reference):
    check(reference("llsa"), {"llsa": llsa}, {"": 2e-5}, inputs="q k v", up="dout")
