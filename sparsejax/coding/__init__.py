"""Sparse representations: coding rates and CRATE, sparse coding solvers and dictionaries."""

from sparsejax.coding.checks import check_dictionary
from sparsejax.coding.constraints import normalise
from sparsejax.coding.convolutional import (
    CscState,
    csc_admm,
    csc_fista,
    csc_objective,
    csc_reconstruct,
    online_dictionary_step,
    psnr,
    sparseness,
)
from sparsejax.coding.coordinate_descent import coordinate_descent
from sparsejax.coding.crate import (
    attention_maps,
    masked_patch_loss,
    mssa,
    patchify,
    random_keep,
    sincos_positions,
)
from sparsejax.coding.dictionary_learning import (
    DictionaryState,
    dictionary_step,
    init_dictionary,
    learn_batch,
)
from sparsejax.coding.implicit import implicit_codes
from sparsejax.coding.log_gabor import circular_window, log_gabor, log_gabor_dictionary
from sparsejax.coding.matching_pursuit import matching_pursuit, orthogonal_matching_pursuit
from sparsejax.coding.rate_reduction import (
    coding_rate,
    coding_rate_gradient,
    projected_coding_rate,
    sparse_rate_reduction,
    subspace_coding_rate,
)
from sparsejax.coding.receptive_fields import (
    GaborFit,
    density,
    excess_kurtosis,
    gabor_fit,
    gratings,
    local_contrast_normalise,
    orientation_selectivity,
    pool_size,
    relative_error,
    spectral_whiten,
    whiten,
)
from sparsejax.coding.self_distillation import dino_loss, update_center, update_teacher
from sparsejax.coding.solvers import (
    Operators,
    Trace,
    fista,
    ista,
    ista_step,
    ista_trace,
    objective,
    odl_block,
    spectral_norm_sq,
)

__all__ = [
    "CscState",
    "DictionaryState",
    "GaborFit",
    "Operators",
    "Trace",
    "attention_maps",
    "check_dictionary",
    "circular_window",
    "coding_rate",
    "coding_rate_gradient",
    "coordinate_descent",
    "csc_admm",
    "csc_fista",
    "csc_objective",
    "csc_reconstruct",
    "density",
    "dictionary_step",
    "dino_loss",
    "excess_kurtosis",
    "fista",
    "gabor_fit",
    "gratings",
    "implicit_codes",
    "init_dictionary",
    "ista",
    "ista_step",
    "ista_trace",
    "learn_batch",
    "local_contrast_normalise",
    "log_gabor",
    "log_gabor_dictionary",
    "masked_patch_loss",
    "matching_pursuit",
    "mssa",
    "normalise",
    "objective",
    "odl_block",
    "online_dictionary_step",
    "orientation_selectivity",
    "orthogonal_matching_pursuit",
    "patchify",
    "pool_size",
    "projected_coding_rate",
    "psnr",
    "random_keep",
    "relative_error",
    "sincos_positions",
    "sparse_rate_reduction",
    "sparseness",
    "spectral_norm_sq",
    "spectral_whiten",
    "subspace_coding_rate",
    "update_center",
    "update_teacher",
    "whiten",
]
