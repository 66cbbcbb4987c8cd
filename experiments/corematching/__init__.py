"""CoreMatching: image tokens and neurons that a vision-language model can do without.

Paper: Wang et al., CoreMatching: co-adaptive sparse inference with token and neuron pruning for
vision-language models (ICML 2025, arXiv 2505.19235); expected there: with the core tokens and core
neurons of its prompt LLaVA-1.5 keeps its accuracy (TextVQA 55.8 of 57.8 %) and decodes 9.2 times
faster.

A small decoder of our own is asked for one of sixteen digits. How often is it among the image
tokens whose active neurons overlap with the question's, and what is the answer without the others?
Beside it stand the core neurons of prompts of a small language model, and the times of a larger
decoder with both prunings. With `--model`, core neurons of a pretrained language model: perplexity
of what follows a prompt, and tokens a second.
"""

MINUTES = {
    "laptop": "4",
    "pretrained": "4",
    "test": "0.3",
    "paper": "checked abstractly",
}
