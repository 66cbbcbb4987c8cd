"""Spark Transformer: 8 % of the neurons by a statistical top-k, in models of equal parameters.

Paper: You et al., Spark Transformer: reactivating sparsity in FFN and attention (NeurIPS 2025,
arXiv 2506.06644); expected there: Gemma-2 2B with 8 % of its neurons and at most 256 keys a token
needs 1 / 2.5 of the multiply-adds at the same quality, and the operator costs next to nothing.

Statistical top-k is timed against ReLU and against what finds the k largest entries by rank, on
rows as long as the model's. Byte models of equal parameters are trained with a gated feed-forward
network, Spark's, a statistical top-k of all gates and a ReLU, and with Spark attention; beside them
stands a gated network so narrow that it multiplies as often as Spark's. Every arm is shown at its
best learning rate. The speed of decoding is measured by `experiments.benchmarks.decoding`.
"""

MINUTES = {"laptop": "6", "test": "0.3", "paper": "checked abstractly"}
