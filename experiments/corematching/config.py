"""Settings of the CoreMatching experiment, its presets, and the decoder that they describe."""

import dataclasses
from typing import Any, Literal

from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.language import LanguageConfig, is_pretrained
from sparsejax.models import LLAMA_SIZES
from sparsejax.models.vision_language_config import CoreMatching, VisionLanguageConfig

SLUG = "corematching"
REFERENCES = ("token", "core_neurons", "attention")
LABELS = {
    "token": "overlap with the question",
    "core_neurons": "overlap with core neurons",
    "attention": "attention of the question",
    "random": "random tokens",
}
BLIND = 1  # layers in which the question of cells sees itself alone
SYSTEM, QUESTION, VOCABULARY = 5, 59, 32000  # text before and behind the image of the chat form
LLAVA_TOKENS = 576
CHUNK = 256  # samples at a time


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of `python -m experiments.corematching`."""

    seeds: int = 3
    """Trained decoders, and draws of prompts for the language model."""
    form: Literal["cells", "chat"] = "cells"
    """Of the decoder: cells has marked image tokens that see each other, one question token that is
    blind in the first layer, and no positions; chat is LLaVA's: system text, image, question, all
    causal with rotary positions."""
    vision_tokens: int = 16
    """Image tokens."""
    markers: int = 24
    """Markers that the cells of an image are told apart by."""
    layers: int = 3
    """Of the decoder."""
    d: int = 48
    """Its width."""
    heads: int = 4
    """Its attention heads."""
    f: int = 192
    """Its neurons in every layer."""
    vision_steps: int = 1000
    """Training steps of the decoder."""
    vision_batch: int = 64
    """Samples a step."""
    vision_learning_rate: float = 3e-3
    """Peak of Adam, after the warm-up; it falls to 0 along a cosine."""
    warmup: int = 50
    """Steps of the warm-up."""
    samples: int = 2048
    """Samples of test digits that are measured on."""
    select_layer: tuple[int, ...] = (0, 1)
    """Layers after which tokens are dropped, one at a time."""
    keep: tuple[str, ...] = ("elbow", "1", "2", "4", "6", "8", "12")
    """Which image tokens stay: those above the elbow of the scores, or so many with the highest."""
    reference: tuple[str, ...] = REFERENCES
    """What scores them: overlap with the neurons of the question (token) or with the core neurons,
    or the attention that they get from the question, as in FastV."""
    on_flat: Literal["none", "all"] = "none"
    """Image tokens that stay where scores have no elbow."""
    rho: float = 0.2
    """Share of a token's active neurons that counts towards the core."""
    beta: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Shares of the neurons that are core in the language model."""
    vision_beta: float = 0.4
    """The same in the decoder of images."""
    core_layers: str = "all"
    """Layers of which neurons are pruned: all, or FIRST:STOP (the released code's 6:27 of 32)."""
    prompt: int = 48
    """Tokens of a prompt of the language model."""
    continuation: int = 16
    """Tokens read behind it with core neurons alone, each of which predicts the next."""
    prompts: int = 64
    """Prompts of every draw."""
    timed: tuple[int, int, int, int] = (8, 512, 8, 1408)
    """Layers, width, heads and neurons of the decoder of LLaVA's form that is timed."""
    capacity: int = 192
    """Places that a prompt of that form has left behind the layer of the choice, text included."""
    decode_tokens: int = 32
    """Tokens of each timed continuation; 0 times nothing."""
    rounds: int = 5
    """Measurements of each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(
            self,
            positive=("vision_tokens", "layers", "d", "heads", "f", "vision_steps", "vision_batch",
                      "samples", "prompt", "continuation", "prompts", "timed", "rounds"),
            shares=("rho", "beta", "vision_beta"),
            known={"reference": REFERENCES, "form": ("cells", "chat")},
            examples=None,
        )  # fmt: skip
        if self.form == "chat" and self.preset != "paper":
            raise ExperimentError("form is 'chat'; it is checked with --preset paper and timed")
        if self.form == "cells" and self.markers < self.vision_tokens:
            raise ExperimentError(
                f"markers is {self.markers}; {self.vision_tokens} image tokens need as many"
            )
        if "token" not in self.reference:
            raise ExperimentError(f"reference is {self.reference}; token must be among them")
        for rule in self.keep or ("none",):
            if rule != "elbow" and not (rule.isdecimal() and 0 < int(rule) <= self.vision_tokens):
                raise ExperimentError(
                    f"keep is {rule!r}; give elbow or numbers from 1 to {self.vision_tokens}"
                )
        for layer in self.select_layer or (-1,):
            if not 0 <= layer < self.layers - 1:
                raise ExperimentError(
                    f"select_layer is {layer}; it must be from 0 to {self.layers - 2}, so that "
                    "there are later layers"
                )
        if not 0 < self.warmup < self.vision_steps:
            raise ExperimentError(
                f"warmup is {self.warmup}; it must be at least 1 and below vision_steps"
            )
        if not self.vision_learning_rate > 0:
            raise ExperimentError(
                f"vision_learning_rate is {self.vision_learning_rate}; it must be positive"
            )
        if self.samples > CHUNK and self.samples % CHUNK:
            raise ExperimentError(f"samples is {self.samples}; it must be a multiple of {CHUNK}")
        if min(self.rho, self.vision_beta, *self.beta) <= 0:
            raise ExperimentError("rho, beta and vision_beta must be above 0")
        if self.prompt + self.continuation > self.seq_len:
            raise ExperimentError(
                f"prompt and continuation have {self.prompt + self.continuation} tokens; seq_len "
                f"allows {self.seq_len}"
            )
        if self.decode_tokens < 0:
            raise ExperimentError(f"decode_tokens is {self.decode_tokens}; it must be at least 0")
        if self.capacity <= SYSTEM + QUESTION:
            raise ExperimentError(
                f"capacity is {self.capacity}; it must be more than the {SYSTEM + QUESTION} tokens "
                "of text, which stay"
            )
        if self.timed[0] < 2:
            raise ExperimentError(f"timed is {self.timed}; it must have 2 layers or more")
        try:
            vision_model(self)
            timed_model(self)
        except ValueError as error:
            raise ExperimentError(str(error)) from error
        if not is_pretrained(self.model):
            depth = LLAMA_SIZES[self.model].n_layers
            self.layer_range(self.layers if self.form == "chat" else min(depth, self.timed[0]))

    def layer_range(self, n_layers: int) -> tuple[int, int]:
        """First layer of those whose neurons are pruned, and the one behind the last."""
        if self.core_layers == "all":
            return 0, n_layers
        first, _, stop = self.core_layers.partition(":")
        if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop) <= n_layers):
            raise ExperimentError(
                f"core_layers is {self.core_layers!r}; it must be all or FIRST:STOP, with STOP at "
                f"most {n_layers}"
            )
        return int(first), int(stop)


def vision_model(config: Config) -> VisionLanguageConfig:
    """The decoder of the settings."""
    sizes = (config.layers, config.d, config.heads, config.f)
    if config.form == "chat":
        return chat_model(config, sizes, config.vision_tokens)
    return VisionLanguageConfig(
        vision_tokens=config.vision_tokens,
        patch_inputs=digits.INPUTS,
        vocab_size=1,
        outputs=digits.CLASSES,
        markers=config.markers,
        max_seq_len=config.vision_tokens + 1,
        rotary=False,
        image_attention="full",
        blind_layers=BLIND,
        embed_std=0.5,
        **as_sizes(sizes),
    )


def timed_model(config: Config) -> VisionLanguageConfig:
    """The decoder that is timed: LLaVA's form and image tokens."""
    return chat_model(config, config.timed, LLAVA_TOKENS)


def chat_model(
    config: Config, sizes: tuple[int, int, int, int], vision_tokens: int
) -> VisionLanguageConfig:
    """A decoder of LLaVA's form from its layers, width, heads and neurons."""
    prompt = SYSTEM + vision_tokens + QUESTION
    return VisionLanguageConfig(
        vision_tokens=vision_tokens,
        patch_inputs=1024,  # features of CLIP's ViT-L/14
        vocab_size=VOCABULARY,
        prefix=SYSTEM,
        max_seq_len=prompt + max(config.decode_tokens, 1),
        dtype=config.dtype,
        param_dtype=config.dtype,
        **as_sizes(sizes),
    )


def as_sizes(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Layers, width, heads and neurons by the names of the model's fields."""
    return dict(zip(("n_layers", "d_model", "n_heads", "d_ff"), sizes))


def selection(config: Config, n_layers: int, layer: int) -> CoreMatching:
    """Both prunings of a prompt of the chat form."""
    return CoreMatching(
        rho=config.rho,
        beta=config.vision_beta,
        select_layer=layer,
        layers=config.layer_range(n_layers),
        on_flat=config.on_flat,
        capacity=config.capacity,
    )


PRESETS = {
    "laptop": Config(seeds=6, dense_steps=500),
    "test": Config(
        preset="test",
        seeds=2,
        layers=2,
        d=16,
        f=32,
        vision_steps=20,
        vision_batch=16,
        warmup=4,
        samples=64,
        select_layer=(0,),
        keep=("elbow", "4", "8"),
        beta=(0.4, 0.8),
        dense_steps=20,
        batch=4,
        prompts=4,
        timed=(2, 32, 2, 64),
        decode_tokens=2,
        rounds=1,
        checkpoint_every=20,
    ),
    "pretrained": Config(
        preset="pretrained",
        model="smollm2",
        batch=1,
        seq_len=192,
        prompt=128,
        continuation=64,
        prompts=8,
        core_layers="6:25",  # of 30, as the released code leaves the ends of 32 layers dense
    ),
    "paper": Config(
        preset="paper",
        form="chat",
        vision_tokens=LLAVA_TOKENS,
        layers=32,
        d=4096,
        heads=32,
        f=11008,
        select_layer=(5,),
        core_layers="6:27",
        dtype="bfloat16",
        vision_batch=1,
    ),
}
