"""Sparse representations: coding rates and CRATE, sparse coding solvers and dictionaries."""

from sparsejax.coding.constraints import normalise
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
from sparsejax.coding.matching_pursuit import matching_pursuit, orthogonal_matching_pursuit
from sparsejax.coding.rate_reduction import (
    coding_rate,
    coding_rate_gradient,
    projected_coding_rate,
    sparse_rate_reduction,
    subspace_coding_rate,
)
from sparsejax.coding.self_distillation import dino_loss, update_center, update_teacher
from sparsejax.coding.solvers import (
    Operators,
    Trace,
    check_dictionary,
    fista,
    ista,
    ista_step,
    objective,
    odl_block,
    spectral_norm_sq,
)

__all__ = [
    "DictionaryState",
    "Operators",
    "Trace",
    "attention_maps",
    "check_dictionary",
    "coding_rate",
    "coding_rate_gradient",
    "coordinate_descent",
    "dictionary_step",
    "dino_loss",
    "fista",
    "implicit_codes",
    "init_dictionary",
    "ista",
    "ista_step",
    "learn_batch",
    "masked_patch_loss",
    "matching_pursuit",
    "mssa",
    "normalise",
    "objective",
    "odl_block",
    "orthogonal_matching_pursuit",
    "patchify",
    "projected_coding_rate",
    "random_keep",
    "sincos_positions",
    "sparse_rate_reduction",
    "spectral_norm_sq",
    "subspace_coding_rate",
    "update_center",
    "update_teacher",
]
