"""GPT-2 in one file: its initialisation and its forward pass. Knows no optimizer and no ranks.

Shapes: B sequences, T tokens of a sequence, C = n_embd channels, H heads, V vocabulary.
"""

from __future__ import annotations

import math
import re
from typing import cast

import torch
import torch.nn.functional as F
from presets import EMBEDDINGS, GPTConfig
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.scale = config.attention_scale
        self.fused = config.qkv == "fused"
        channels = config.n_embd
        if self.fused:
            self.qkv = nn.Linear(channels, 3 * channels)
        else:
            self.q = nn.Linear(channels, channels)
            self.k = nn.Linear(channels, channels)
            self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        # (B, T, C) -> (B, H, T, C / H)
        q, k, v = (t.view(batch, length, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(batch, length, -1)))


class MLP(nn.Module):
    """C -> 4C -> C with the tanh form of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(F.gelu(self.fc(x), approximate="tanh")))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """GPT-2. The output layer is the token embedding itself, so the tie is one parameter, not two
    names.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def width_mults(self) -> dict[str, float]:
        """By full name what muP divides the learning rate of a parameter by: `width_mult` for
        hidden matrices, else 1.
        """
        width_mult = self.config.width_mult
        return {
            name: width_mult if is_hidden_matrix(name, p) else 1.0
            for name, p in self.named_parameters()
        }

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill every parameter (modified in place) from `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        # Each layer adds to the residual stream twice; this keeps its variance from growing with
        # depth.
        hidden_std = self.config.init_std / math.sqrt(self.config.width_mult)
        residual_std = hidden_std / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)  # LayerNorm
            elif is_hidden_matrix(name, parameter):
                parameter.normal_(
                    0.0,
                    residual_std if name.endswith("proj.weight") else hidden_std,
                    generator=generator,
                )
            else:
                parameter.normal_(0.0, self.config.init_std, generator=generator)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) of `idx` (B, T), and with `targets` (B, T) the mean loss in nats per
        token.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(
                f"a sequence of {length} tokens came; the model holds {self.config.block_size}. "
                "Cut it."
            )
        x = self.tokens(idx) + self.positions(torch.arange(length, device=idx.device))
        for block in self.blocks:
            x = block(x)
        # scaled before the product, where there are fewer numbers than behind it
        logits = F.linear(self.norm(x) * (1.0 / self.config.width_mult), self.tokens.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(
        self, idx: Tensor, num_tokens: int, *, seed: int, temperature: float = 0.8
    ) -> Tensor:
        """Continue `idx` (B, T) by `num_tokens`, drawn at `temperature`: (B, T + num_tokens)."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            chances = (logits[:, -1].float().cpu() / temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            idx = torch.cat((idx, drawn.to(idx.device)), dim=1)
        return idx


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether both dimensions of a parameter of `GPT` grow with the width."""
    return parameter.ndim == 2 and re.search(EMBEDDINGS, name) is None


def build(config: GPTConfig, seed: int) -> GPT:
    """A model on the CPU, the same on every machine for one `seed`."""
    with torch.device("meta"):  # skips PyTorch's own initialisation, which ours replaces
        model = GPT(config)
    model.to_empty(device="cpu")
    model.initialize(seed)
    return model
