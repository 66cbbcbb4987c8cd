"""Kernel heterogeneity: dictionaries of many bandwidths code photographs more sparsely.

Paper: Ladret, Casanova and Perrinet, "Kernel Heterogeneity Improves Sparseness of Natural Images
Representations" (2023). Expected: a dictionary of log-Gabor kernels with six orientation bandwidths
gives sparser convolutional codes than one of as many kernels with one bandwidth, at some cost in
quality; learned dictionaries improve both.

Both are coded by the study's solver, whose penalty moves and which stops far from the minimum, and
by one near the minimum: what belongs to the dictionary shows under both. `--variant downstream`
trains classifiers on the codes of labelled images.
"""

MINUTES = {"laptop": "4", "downstream": "6", "test": "0.2", "paper": "checked abstractly"}
