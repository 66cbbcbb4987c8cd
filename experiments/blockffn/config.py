"""Settings of the BlockFFN experiment, its presets, and the arms that are compared."""

import dataclasses
from typing import Literal

from experiments.harness.config import ExperimentError
from experiments.harness.decoder_arms import DecoderConfig
from sparsejax.models import LlamaConfig

SLUG = "blockffn"
DRAFT = "draft"
DATASET = "c4/en"  # of the paper preset
SHOWN_CHUNK = 8  # of the CLS that the paper reports


@dataclasses.dataclass(frozen=True)
class Losses:
    """Factors of what an arm adds to the cross-entropy, and what divides its gates.

    `adaptive` is of the chunk loss.
    """

    al: float = 0.0
    cs: float = 0.0
    l1: float = 0.0
    adaptive: bool = False
    router: Literal["rms", "sum", "none"] = "rms"

    @property
    def name(self) -> str:
        """Unique in a run."""
        return "-".join(self._parts("{}{:g}")).replace(" ", "-").lower() or "none"

    @property
    def label(self) -> str:
        """For people."""
        return ", ".join(self._parts("{} {:g}")) or "no extra loss"

    def _parts(self, form: str) -> list[str]:
        factors = {"AL": self.al, "CS": self.cs, "L1": self.l1}
        parts = [form.format(name, factor) for name, factor in factors.items() if factor]
        parts += ["adaptive"] if self.adaptive else []
        return parts if self.router == "rms" else [*parts, f"router {self.router}"]


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """Settings of `python -m experiments.blockffn`."""

    experts: int = 16
    """Experts of every layer."""
    expert_width: int = 16
    """Neurons of an expert."""
    lambda_cs: tuple[float, ...] = (0.1, 0.1, 0.3, 0.3)
    """Factors of the chunk sparsification loss, one an arm; the first is that of the claims."""
    lambda_al: tuple[float, ...] = (0.002, 0.0, 0.0, 0.02)
    """Factors of the activation locality loss, one for each of lambda_cs."""
    lambda_l1: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    """Factors of the mean absolute gate, in arms of their own; the first is that of the claims."""
    adaptive: bool = True
    """One more arm: the first one with a lambda_cs that follows its loss."""
    adaptive_start: int = 100
    """Steps before lambda_cs is first adapted."""
    adaptive_every: int = 25
    """Steps between two adaptations."""
    router: tuple[Literal["sum", "none"], ...] = ("sum", "none")
    """More arms: the first one with gates that are divided by their sum, or by nothing."""
    chunk: int = 32
    """Tokens of a chunk in the chunk sparsification loss."""
    alpha: float = 100.0
    """Sharpness of the activation locality loss."""
    eval_chunks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Lengths of the chunks whose union of experts is measured, and which the model is read by."""
    draft_tokens: tuple[int, ...] = (2, 4, 8)
    """Tokens that the draft model writes before they are checked, in speculative decoding."""
    draft_width: int = 32
    """Width of the draft model, which has as many heads and gated feed-forward layers."""
    draft_layers: int = 1
    """Blocks of the draft model."""
    prompts: int = 16
    """Validation windows whose beginnings are continued."""
    prompt_tokens: int = 16
    """Tokens of a beginning; the rest of the sequence is decoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("experts", "expert_width", "chunk", "draft_width", "draft_layers", "prompts",
                     "prompt_tokens"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_factors()
        for length in self.eval_chunks:
            if length < 1 or self.seq_len % length:
                raise ExperimentError(
                    f"eval_chunks has {length}; it must divide seq_len = {self.seq_len}"
                )
        given = self.eval_chunks
        if sorted(set(given)) != list(given) or not {SHOWN_CHUNK, self.chunk} <= set(given):
            raise ExperimentError(
                f"eval_chunks are {given}; give ascending ones, with {SHOWN_CHUNK} and chunk = "
                f"{self.chunk} among them"
            )
        if not self.draft_tokens or min(self.draft_tokens) < 1:
            raise ExperimentError(f"draft_tokens are {self.draft_tokens}; give positive ones")
        if self.new_tokens(max(self.draft_tokens)) < 1:
            raise ExperimentError(
                f"prompt_tokens is {self.prompt_tokens} and draft_tokens {self.draft_tokens}; "
                f"together they leave no room in seq_len = {self.seq_len}"
            )
        if self.adaptive_every < 1 or self.adaptive_start < 2 * self.adaptive_every:
            raise ExperimentError(
                f"adaptive_start is {self.adaptive_start}; it must be at least twice "
                f"adaptive_every = {self.adaptive_every}, which must be positive"
            )
        for build in (self.model, self.draft):
            build()  # its checks

    def _check_factors(self) -> None:
        if not self.alpha > 0:
            raise ExperimentError(f"alpha is {self.alpha}; it must be positive")
        if len(self.lambda_al) != len(self.lambda_cs) or not self.lambda_cs:
            raise ExperimentError(
                f"lambda_al are {self.lambda_al} and lambda_cs {self.lambda_cs}; give one of each "
                "for every arm"
            )
        if min(*self.lambda_al, *self.lambda_cs) < 0:
            raise ExperimentError("lambda_al and lambda_cs must not be negative")
        l1 = self.lambda_l1
        if not l1 or min(l1) <= 0 or len(set(l1)) < len(l1):
            raise ExperimentError(f"lambda_l1 are {l1}; give positive ones that differ")
        if len(set(self.router)) < len(self.router):
            raise ExperimentError(f"router is {self.router}; give different ones")
        pairs = list(zip(self.lambda_al, self.lambda_cs))
        if len(set(pairs)) < len(pairs) or (0, 0) in pairs:
            raise ExperimentError(
                f"lambda_al and lambda_cs make the arms {pairs}; they must differ, and not be 0"
            )
        if self.adaptive and not self.lambda_cs[0] > 0:
            raise ExperimentError("lambda_cs begins with 0, which cannot be adaptive")

    def model(
        self, vocab_size: int = 256, router: Literal["rms", "sum", "none"] = "rms"
    ) -> LlamaConfig:
        """The model with experts, which all arms but the draft train."""
        return self.decoder(
            vocab_size,
            d_ff=self.experts * self.expert_width,
            ffn="block",
            n_experts=self.experts,
            router_norm=router,
        )

    def draft(self, vocab_size: int = 256) -> LlamaConfig:
        """The small gated model that writes drafts."""
        return dataclasses.replace(
            self.model(vocab_size),
            d_model=self.draft_width,
            n_layers=self.draft_layers,
            d_ff=4 * self.draft_width,
            head_dim=None,
            ffn="gated",
            n_experts=None,
        )

    def new_tokens(self, draft_tokens: int) -> int:
        """How many tokens are decoded; the last draft must fit behind them."""
        return self.seq_len - self.prompt_tokens - draft_tokens + 1

    def losses(self) -> dict[str, Losses]:
        """The losses of every arm, by the name of the arm."""
        pairs = [Losses(al, cs) for al, cs in zip(self.lambda_al, self.lambda_cs)]
        arms = [Losses(), *(Losses(l1=factor) for factor in self.lambda_l1), *pairs]
        arms += [dataclasses.replace(pairs[0], router=router) for router in self.router]
        if self.adaptive:
            arms.append(dataclasses.replace(pairs[0], adaptive=True))
        return {arm.name: arm for arm in arms}

    def labels(self) -> dict[str, str]:
        """What tables and figures call the arms."""
        return {name: losses.label for name, losses in self.losses().items()} | {
            DRAFT: "draft, gated"
        }

    @property
    def ours(self) -> str:
        """The arm of the claims."""
        return Losses(self.lambda_al[0], self.lambda_cs[0]).name

    @property
    def baseline(self) -> str:
        """The arm that the claims compare it with."""
        return Losses(l1=self.lambda_l1[0]).name

    @property
    def shown(self) -> tuple[str, str, str]:
        """The arms that are looked at more closely, the one without an extra loss first."""
        return "none", self.baseline, self.ours


PRESETS = {
    "laptop": Config(checkpoint_every=500),
    "test": Config(
        preset="test",
        seeds=2,
        d_model=16,
        layers=2,
        heads=2,
        batch=8,
        seq_len=32,
        steps=20,
        warmup=5,
        eval_windows=64,
        experts=8,
        expert_width=4,
        lambda_cs=(0.1,),
        lambda_al=(0.002,),
        lambda_l1=(0.05,),
        adaptive=False,
        router=(),
        adaptive_start=10,
        adaptive_every=5,
        eval_chunks=(8, 32),
        draft_tokens=(3,),
        draft_width=8,
        prompts=3,
        prompt_tokens=8,
        checkpoint_every=20,
    ),
    # 1.2B; the paper's rate of 0.01 is muP's, which this optimiser does not have
    "paper": Config(
        preset="paper",
        dataset=DATASET,
        d_model=1792,
        layers=35,
        heads=28,
        positions="rope",
        experts=56,
        expert_width=128,
        batch=768,
        seq_len=4096,
        steps=40_000,
        warmup=2000,
        learning_rates=(1e-3,),
        dtype="bfloat16",
        remat=True,
        lambda_cs=(0.05,),
        lambda_al=(0.002,),
        lambda_l1=(0.05,),
        chunk=64,
        adaptive_start=1000,
        adaptive_every=100,
        draft_tokens=(32,),
        draft_width=448,
        draft_layers=2,
        prompt_tokens=1024,
        checkpoint_every=1000,
        log_every=100,
    ),
}
