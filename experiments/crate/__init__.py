"""CRATE: a transformer whose layers compress and sparsify, against others of its width.

Papers: Yu et al., White-box transformers via sparse rate reduction (NeurIPS 2023, arXiv 2306.01129
and 2311.13110), and its masked autoencoder (ICLR 2024, arXiv 2404.02446). Expected there: with a
quarter of the parameters of a ViT a CRATE is some points less accurate on ImageNet, coding rates
fall and tokens grow sparser from layer to layer, and the attention of the class token finds the
object; causal CRATE models text worse than a GPT, CRATE-alpha less so.

By default classifiers of digits: CRATE and a ViT of equal width, the measures of its layers before
and after training, and maps of its attention. `--variant mae` reconstructs masked digits,
`dino` learns from views of them without labels, `gpt` predicts bytes and `bert` fills them in.
"""

MINUTES = {
    "laptop": "5",
    "mae": "4",
    "dino": "5",
    "gpt": "5",
    "bert": "13",
    "test": "0.3",
    "paper": "checked abstractly",
}
"""`python -m experiments.crate`."""
