"""Speed: what sparsity costs, and what it saves, against plain JAX on the same machine."""
