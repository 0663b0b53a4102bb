"""The model and the data of every example: put your own in their place.

A small GPT that learns to count: each sequence goes up by 1, 2 or 3, modulo 31.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

TOKENS, LENGTH, WIDTH = 31, 16, 64


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, as models of transformers give it; `ids` and `labels` are (batch, LENGTH)."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, ids.device)
        x = self.tokens(ids) + self.places
        for block in self.blocks:
            x = block(x, mask, is_causal=True)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss}


def batches(steps: int, rank: int = 0, size: int = 16) -> Iterator[dict[str, Tensor]]:
    """Other sequences on every rank."""
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        first = torch.randint(TOKENS, (size, 1), generator=generator)
        pace = torch.randint(1, 4, (size, 1), generator=generator)
        ids = (first + pace * torch.arange(LENGTH + 1)) % TOKENS
        yield {"ids": ids[:, :-1], "labels": ids[:, 1:]}
