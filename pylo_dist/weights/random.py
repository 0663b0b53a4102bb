"""Weights of random numbers, to try what has nothing to do with learning: layouts, checkpoints,
launchers, rules of one's own. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from .load import RANDOM, MetaNetwork, load_weights
from .registry import WeightsError, architecture_named

SIZES = {"H": 32, "P": 8}  # of what the architecture leaves open
OTHER_SIZE = 16
SCALE = 0.05  # with which the released rules move a parameter by well under a hundredth of its rms


def random_weights(
    architecture: str, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> MetaNetwork:
    """Random weights for `weights=`: a step moves little and learns nothing, which an optimizer on
    them warns of. The same numbers for the same arguments, on every rank.

    Args:
        architecture: the name of a registered one, such as "velo".
        sizes: of what the architecture leaves open, by letter; default: 32 hidden units H of an
            LSTM, 8 sets P of an MLP. The released VeLO has 512 and 256.

    Raises:
        WeightsError: an unknown architecture, a seed or a size that is none.
    """
    known = architecture_named(architecture)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise WeightsError(f"seed={seed!r}: wanted an int >= 0")
    letters = {
        size[-1] for shape in known.shapes.values() for size in shape if isinstance(size, str)
    }
    for letter, size in (sizes or {}).items():
        if letter not in letters or type(size) is not int or size < 1:
            raise WeightsError(
                f"sizes[{letter!r}]={size!r}: wanted 1 or more for "
                f"{', '.join(sorted(letters)) or 'no letter'}, which {architecture} leaves open"
            )
    chosen = {letter: SIZES.get(letter, OTHER_SIZE) for letter in letters} | dict(sizes or {})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(known.shapes.items()):
        numbers = [
            size if isinstance(size, int) else int(size[:-1] or 1) * chosen[size[-1]]
            for size in shape
        ]
        tensors[name] = SCALE * torch.randn(numbers, generator=generator)
    network = load_weights(tensors, known)
    return replace(network, name="random", source=f"{RANDOM}, seed {seed}")
