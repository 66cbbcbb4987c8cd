"""Sparse-IFT: larger sparse layers at the FLOPs of a dense network, and masks that move.

Paper: Thangarasa, Saxena, Gupta and Lie, "Sparse-IFT: sparse iso-FLOP transformations for
maximizing training efficiency" (ICML 2024). Expected: at equal FLOPs a widened sparse network is
better than the dense one, and RigL's moving masks better than static ones.

The laptop's network on digits has four layers. "wide" makes all of them sparse, as "narrow" (the
dense network's widths) does; "parallel" (a ReLU of every branch), "factorized" (nothing between the
factors) and "doped" replace the first three. With `--model` a backbone: "wide" makes all but its
first layer and its head sparse, the others replace its 3 x 3 convolutions. A network of this
project's language models stacks its blocks, which local transformations refuse; it is left out.
"""

MINUTES = {"laptop": "4", "test": "0.3", "paper": "checked abstractly"}
