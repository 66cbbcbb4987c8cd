"""One token at a time: what decoding gains from sparse activations, layer by layer and in a model.

`python -m experiments.benchmarks.decoding` times the feed-forward layer alone and then a whole
decoder (embedding, attention to a cache of 128 tokens, logits) of the shape of Gemma-2 2B at
reduced depth, against the faster of the dense forms. Weights are random and of equal number in all.

Decoding reads every weight that it needs once a token, so memory sets the bound: beside each time
stand the megabytes that it reads and how many times fewer these are than the dense model's. Rows
of single neurons are read more slowly than whole matrices, and bit patterns have to be widened: one
core does about 10^10 weights a second, which is less than memory gives where it gives 30 GB/s.
"""
