"""Accelerator kernels of sparsejax: one op a folder, knowing nothing of sparsejax.

Every op is a public function that validates its arguments, chooses an implementation and owns
the `custom_vjp`; its `reference` module is the definition that all implementations are tested
against. `README.md` says how to add one.
"""

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.nm_matmul import nm_matmul
from pallas_kernels.sparse_ffn import sparse_ffn
from pallas_kernels.statistical_topk import statistical_topk

__all__ = [
    "block_sparse_attention",
    "block_sparse_matmul",
    "nm_matmul",
    "sparse_ffn",
    "statistical_topk",
]
