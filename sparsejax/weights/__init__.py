"""Sparse weights: training, pruning and storing them."""

from sparsejax.weights.baselines import (
    AstState,
    ast_adamw,
    maskllm_hard_mask,
    maskllm_init,
    maskllm_mask,
)
from sparsejax.weights.cast import (
    AdamSState,
    adams,
    cast_loss,
    check_reach,
    decay_budget,
    groups_in_pattern,
    sparsity_report,
)
from sparsejax.weights.compact import (
    Compressed24,
    compress_2to4,
    decompress_2to4,
    load_compact,
    save_compact,
    unpack_indices,
)
from sparsejax.weights.one_shot import (
    ActivationStats,
    activation_stats,
    magnitude_mask,
    merge_stats,
    wanda_mask,
)
from sparsejax.weights.random_search import (
    SearchResult,
    node_sampler,
    paired_comparison,
    random_search,
    sample_edge_masks,
    sample_node_masks,
)
from sparsejax.weights.scaling import (
    CAST_PATTERN,
    ScaledLinear,
    finish,
    fold_and_prune,
    init_scales,
    scale_params,
    scaled_kernel,
)
from sparsejax.weights.sequential import PruneMethod, capture_inputs, prune_sequential

__all__ = [
    "CAST_PATTERN",
    "ActivationStats",
    "AdamSState",
    "AstState",
    "Compressed24",
    "PruneMethod",
    "ScaledLinear",
    "SearchResult",
    "activation_stats",
    "adams",
    "ast_adamw",
    "capture_inputs",
    "cast_loss",
    "check_reach",
    "compress_2to4",
    "decay_budget",
    "decompress_2to4",
    "finish",
    "fold_and_prune",
    "groups_in_pattern",
    "init_scales",
    "load_compact",
    "magnitude_mask",
    "maskllm_hard_mask",
    "maskllm_init",
    "maskllm_mask",
    "merge_stats",
    "node_sampler",
    "paired_comparison",
    "prune_sequential",
    "random_search",
    "sample_edge_masks",
    "sample_node_masks",
    "save_compact",
    "scale_params",
    "scaled_kernel",
    "sparsity_report",
    "unpack_indices",
    "wanda_mask",
]
