"""The shape of a GPT-2 with its parameterisation, and the shapes that have a name. Without PyTorch,
to read a command fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# The tensors with one dimension that grows with the width, by full name; all other matrices are
# hidden ones, with two.
EMBEDDINGS = r"^(tokens|positions)\.weight$"


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The shape of a model, and its parameterisation: the standard one, or with `mup_base_width`
    muP.

    muP, the maximal update parameterisation, makes settings that were tuned on a narrow model hold
    for a wide one. The base model, where both parameterisations are the same, has `mup_base_width`
    channels in `mup_base_heads` heads (None: `n_head`, so that heads grow wider with the model).
    With m = n_embd / mup_base_width and d, d_base channels of a head in this model and in the base
    model, this follows table 8 of Yang et al. 2022 (arXiv 2203.03466), whose output layer may be
    tied to the embedding, with its learning rates for Adam, and definition 4.1 for attention:

        embeddings, biases, norms    as in the base model
        hidden matrices              initial standard deviation times 1 / sqrt(m);
                                     learning rate times 1 / m, see `width_mults`
        logits                       times 1 / m
        attention scores             q k sqrt(d_base) / d, which is q k / sqrt(d) where d = d_base

    Raises ValueError where the numbers make no GPT-2, or no base model.
    """

    vocab_size: int
    block_size: int  # longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    init_std: float = 0.02  # of embeddings and matrices
    qkv: Literal["fused", "split"] = "fused"  # one (3C, C) matrix, or three (C, C)
    mup_base_width: int | None = None
    mup_base_heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; every head needs "
                "the same number of channels."
            )
        if self.qkv not in ("fused", "split"):
            raise ValueError(f"qkv is {self.qkv!r}; choose 'fused' or 'split'.")
        for name in ("mup_base_width", "mup_base_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.mup_base_width is None and self.mup_base_heads is not None:
            raise ValueError(
                f"mup_base_heads {self.mup_base_heads} came without mup_base_width; give both, or "
                "neither."
            )
        if self.mup_base_width is not None and self.mup_base_width % (
            self.mup_base_heads or self.n_head
        ):
            raise ValueError(
                f"mup_base_width {self.mup_base_width} is not a multiple of its "
                f"{self.mup_base_heads or self.n_head} heads; choose another width, or "
                "mup_base_heads if the base model has another number of heads."
            )

    @property
    def width_mult(self) -> float:
        """m, how many times wider than the base model this one is; 1 without muP."""
        return 1.0 if self.mup_base_width is None else self.n_embd / self.mup_base_width

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        head = self.n_embd // self.n_head
        base_head = (
            head
            if self.mup_base_width is None
            else self.mup_base_width // (self.mup_base_heads or self.n_head)
        )
        return 1.0 / math.sqrt(head * (head / base_head))


# nano and micro read bytes and are sized for CPUs; the others are GPT-2's own four shapes. GPT-2's
# 0.02 suits 768 channels; with 128 the loss would stay at letter frequencies for some 200 steps,
# hence
# 0.02 sqrt(768 / 128) = 0.05.
PRESETS: dict[str, GPTConfig] = {
    "nano": GPTConfig(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_embd=64, init_std=0.05),
    "micro": GPTConfig(
        vocab_size=256, block_size=128, n_layer=4, n_head=4, n_embd=128, init_std=0.05
    ),
    "124m": GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
    "355m": GPTConfig(vocab_size=50257, block_size=1024, n_layer=24, n_head=16, n_embd=1024),
    "774m": GPTConfig(vocab_size=50257, block_size=1024, n_layer=36, n_head=20, n_embd=1280),
    "1.5b": GPTConfig(vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600),
}
