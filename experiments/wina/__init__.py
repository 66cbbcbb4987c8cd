"""WINA: inputs of linear layers dropped at inference by magnitude times weight norm.

Paper: Chen et al., WINA: weight informed neuron activation for accelerating large language model
inference (2025, arXiv 2505.19427), with TEAL, CATS and R-Sparse; expected there: at 65 % WINA in
the rotated model beats TEAL, and TEAL in the rotated model, on the average of six tasks.

A random layer with norms that are more and more unequal, a small network trained on digits whose
inputs are dropped at test time, and the time of a layer that reads its kept rows alone. With
`--model`, a pretrained language model with every method: perplexity, multiply-adds and tokens a
second, in one table.
"""

MINUTES = {
    "laptop": "1",
    "pretrained": "25",
    "test": "0.3",
    "paper": "checked abstractly",
}
