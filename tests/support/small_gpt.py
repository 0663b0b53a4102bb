"""A training script in the manner of small GPT repositories: a config of plain numbers, decay for
matrices only, warm-up and cosine written into the groups by hand. Takes seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pylo_dist

TEXT = (
    "the quick brown fox jumps over the lazy dog while the small grey cat sleeps on the warm "
    "stone wall and the old dog barks at the moon over the quiet field "
) * 8


@dataclass
class Config:
    """As written for AdamW."""

    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    weight_decay: float = 0.1
    warmup_iters: int = 10
    max_iters: int = 80
    batch_size: int = 8
    block_size: int = 24
    width: int = 24


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.before(x)).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.joined(mixed)
        return x + self.narrow(nn.functional.gelu(self.wide(self.between(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.places = nn.Parameter(torch.zeros(config.block_size, config.width))
        self.blocks = nn.Sequential(Block(config.width), Block(config.width))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.tokens(tokens) + self.places)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def lr_at(step: int, config: Config) -> float:
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    share = (step - config.warmup_iters) / (config.max_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (
        config.learning_rate - config.min_lr
    )


def train(config: Config) -> float:
    """Train from scratch. Returns the mean loss of the last ten steps, in nats per character."""
    generator = torch.Generator().manual_seed(0)
    letters = sorted(set(TEXT))
    data = torch.tensor([letters.index(letter) for letter in TEXT])
    torch.manual_seed(0)
    model = GPT(len(letters), config)
    named = list(model.named_parameters())
    groups = [
        {"params": [x for x in named if x[1].dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [x for x in named if x[1].dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = pylo_dist.AdafacLO(groups, weights="demo", lr=config.learning_rate)
    losses = []
    for step in range(config.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        starts = torch.randint(
            len(data) - config.block_size - 1, (config.batch_size,), generator=generator
        )
        windows = torch.stack([data[i : i + config.block_size + 1] for i in starts])
        loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10
