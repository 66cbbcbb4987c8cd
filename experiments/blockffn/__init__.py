"""BlockFFN: experts that neighbouring tokens share, by two losses beside a ReLU router.

Paper: BlockFFN: end-side acceleration-friendly mixture-of-experts with chunk-level activation
sparsity (2025, arXiv 2507.08771). Expected there, at 0.1B: activation locality and chunk
sparsification raise CLS_8, the share of experts that no token of eight chose, to 71 % where an L1
norm of the gates leaves 45 % at the same sparsity of single tokens, at no loss of perplexity.

Small byte models are trained without an extra loss, with L1, and with several factors of the
paper's two. Shown are sparsity by token and by chunk, what it costs, and how many sets of experts
are still told apart: a router that has become constant closes the gap between the two as well. The
trained models are then read through the union of a chunk's experts, also by speculative decoding
with a small draft model, whose greedy texts repeat themselves and so need fewer experts.
"""

MINUTES = {"laptop": "5", "test": "0.3", "paper": "checked abstractly"}
