"""Feed-forward layers that read only the rows of active neurons, or active experts.

The sparsity of decoding: one token of a Spark, CATS or WINA layer reads the rows that a list
names, and a chunk of tokens the union of the experts that any of them chose (BlockFFN). Who is
active is decided elsewhere; lists have a static capacity and a dynamic length.
"""

from pallas_kernels.sparse_ffn.experts import ExpertBlocks, expert_union_ffn
from pallas_kernels.sparse_ffn.ffn import sparse_ffn
from pallas_kernels.sparse_ffn.rows import (
    Blocks,
    check_rows,
    gather_rows_matvec,
    scatter_rows_vecmat,
)
from pallas_kernels.sparse_ffn.weights import bit_patterns

__all__ = [
    "Blocks",
    "ExpertBlocks",
    "bit_patterns",
    "check_rows",
    "expert_union_ffn",
    "gather_rows_matvec",
    "scatter_rows_vecmat",
    "sparse_ffn",
]
