"""DSnoT: swapping weights of a pruned network, without training, so that its mean outputs return.

Paper: Zhang et al., Dynamic sparse no training: training-free fine-tuning for sparse LLMs (ICLR
2024, arXiv 2310.08915); expected there: LLaMA-7B at 70 % on WikiText-2, perplexity 26.8 lower than
that of the Wanda mask it starts from.

Multilayer perceptrons trained on digits are pruned layer by layer, by magnitude or by Wanda, and
the masks are swapped with and without the rule that the error may not change its sign. Every start
ranks the weights of each output by itself, as the swaps do. Beside it stands the perplexity of a
small LLaMA pruned to 2:4 at once by magnitude, Wanda and SparseGPT. With `--model`, a pretrained
language model is pruned by each of these, with and without swaps.
"""

MINUTES = {
    "laptop": "2",
    "pretrained": "180, beside other work",
    "test": "0.5",
    "paper": "checked abstractly",
}
