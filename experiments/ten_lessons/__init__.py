"""Ten lessons of sparsity: what coarser zeros cost in bits, and what zeros cost to train.

Paper: Liu & Wang, Ten lessons we have learned in the new "Sparseland": a short handbook for sparse
neural network researchers (2023, arXiv 2302.02596), which has no figures of its own. The division
into numbered lessons is this project's. Expected: at equal density, unstructured zeros keep more
accuracy than any structure (L3); masks multiplied into dense kernels save no time (L9).

`--lesson L3` prunes one network at 87.5 % in six granularities and compares bits per character.
`--lesson L5` and `--lesson L9` count the operations and bytes of every way to train, beside the
measured time of a step. L2 is `python -m experiments.gradual_pruning`.
"""

MINUTES = {"laptop": "6", "test": "1", "paper": "checked abstractly"}
