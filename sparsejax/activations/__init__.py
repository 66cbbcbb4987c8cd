"""Sparse activations: neurons, experts and inputs that a token does not use are not computed."""

from sparsejax.activations.block_ffn import (
    ExpertPath,
    RouterNorm,
    block_ffn,
    relu_rms_router,
)
from sparsejax.activations.block_ffn_losses import (
    AdaptiveFactorState,
    activation_locality_loss,
    adaptive_factor_init,
    adaptive_factor_step,
    chunk_level_sparsity,
    chunk_sparsification_loss,
    expert_probabilities,
    reuse_ratio,
    token_level_sparsity,
)
from sparsejax.activations.input_sparsity import (
    InputSetting,
    SparseInputs,
    input_histograms,
    input_thresholds,
    sparse_inputs,
)
from sparsejax.activations.orthogonal_transform import column_orthogonal_transform, fold_norms
from sparsejax.activations.spark import (
    neuron_major,
    spark_attention,
    spark_ffn,
    statistical_ffn,
)
from sparsejax.activations.speculative import SpeculativeResult, speculative_decode
from sparsejax.activations.wina import (
    column_norms,
    empirical_icdf,
    input_scores,
    kept_inputs,
    prefill_positions,
    product_of_kept,
    sparse_linear,
    wina_mask,
)
from sparsejax.activations.wina_allocation import (
    allocation_at,
    effective_sparsity,
    greedy_allocation,
)
from sparsejax.activations.wina_baselines import (
    cats_activation,
    cats_threshold,
    low_rank_factors,
    r_sparse_budget,
    r_sparse_linear,
    teal_histogram,
    teal_threshold,
)

__all__ = [
    "AdaptiveFactorState",
    "ExpertPath",
    "InputSetting",
    "RouterNorm",
    "SparseInputs",
    "SpeculativeResult",
    "activation_locality_loss",
    "adaptive_factor_init",
    "adaptive_factor_step",
    "allocation_at",
    "block_ffn",
    "cats_activation",
    "cats_threshold",
    "chunk_level_sparsity",
    "chunk_sparsification_loss",
    "column_norms",
    "column_orthogonal_transform",
    "effective_sparsity",
    "empirical_icdf",
    "expert_probabilities",
    "fold_norms",
    "greedy_allocation",
    "input_histograms",
    "input_scores",
    "input_thresholds",
    "kept_inputs",
    "low_rank_factors",
    "neuron_major",
    "prefill_positions",
    "product_of_kept",
    "r_sparse_budget",
    "r_sparse_linear",
    "relu_rms_router",
    "reuse_ratio",
    "spark_attention",
    "spark_ffn",
    "sparse_inputs",
    "sparse_linear",
    "speculative_decode",
    "statistical_ffn",
    "teal_histogram",
    "teal_threshold",
    "token_level_sparsity",
    "wina_mask",
]
