"""CAST: a small LLaMA trained to 2:4 sparsity without ever masking the forward pass.

Paper: CAST, Continuous and differentiable semi-structured sparsity-aware training for large
language models (2025, arXiv 2509.25996); expected there: perplexity within 0.1 of dense at 2:4.

A small LLaMA is trained on real text, or a pretrained one is loaded (`--model`), and kept as the
dense teacher; then every method starts from it with the same steps, batches and schedule, at each
learning rate. The table shows each method at its best one. The dense model trained on for the
same steps stands beside them. `--preset pretrained` shows CAST on a real model beside pruning at
once, and `--preset retrained` masks of magnitude, SparseGPT and Wanda there, held while the weights
are trained as long with the same teacher.
"""

MINUTES = {
    "laptop": "10",
    "pretrained": "an evening",
    "retrained": "an evening",
    "test": "1",
    "paper": "checked abstractly",
}
