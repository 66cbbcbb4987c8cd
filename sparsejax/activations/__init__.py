"""Sparse activations: neurons, experts and inputs that a token does not use are not computed."""
