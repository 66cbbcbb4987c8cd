"""Lazy neurons: ReLU networks grow sparse by themselves, and what keeping even fewer does.

Paper: Li et al., The lazy neuron phenomenon: on emergence of activation sparsity in transformers
(ICLR 2023, arXiv 2210.06313); expected there: 3 % of T5-Base's neurons fire for a token although
nothing asks for it, wider networks are sparser, and keeping the 128 largest activations alone makes
a network more robust to wrong labels.

Byte models with ReLU networks of two widths are trained, and the share of their neurons that fire
is followed from the first step on, layer by layer; beside them stands one that keeps the largest
activations alone. The argument of why it falls, a gradient that is
positive on average at every neuron that fires, is tried on random weights. Networks on digits with
wrong labels compare ReLU with the k largest activations; at this size the paper's robustness does
not show, and nothing depends on it. With `--model`, the neurons of a pretrained model are measured.
"""

MINUTES = {
    "laptop": "3",
    "pretrained": "2",
    "test": "0.3",
    "paper": "checked abstractly",
}
