"""Stochastic rounding of float32 state to bfloat16, with random bits that are a function of what
they are for. Writes nothing.

Rounded to nearest a slow mean stands still: with decay 0.999 a step changes it by less than half a
unit in bfloat16's last place. Rounded up with the probability of what is cut off, it is right on
average. The bits come from no generator but from a hash of (seed, step, slot, global index of the
element), so that any cut, any number of ranks and threads and any device write the same state. The
idea is that of counter-based generators (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC'11); the hash is a finaliser of two multiplications between shifted exclusive ors, as
MurmurHash3 has one, with multipliers that C. Wellons' search for low bias found.
csrc/include/pylo_dist/rounding.h is the same for the compiled passes, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor

from ..core.rule import Batch

Word = Union[int, Tensor]  # of 32 bits: Python ints, or int64

WORD = 0xFFFFFFFF
START = 0x9E3779B9  # 2^32 / golden ratio: mix(0) is 0
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
# bits of the largest finite bfloat16 and of inf as float32, and of NaN as bfloat16
LARGEST, INFINITE, NAN = 0x7F7F0000, 0x7F800000, 0x7FC0


def mix(x: Any) -> Any:
    """A bijection of 32-bit words, in which every bit depends on all."""
    x = x ^ (x >> 16)
    x = (x * FIRST) & WORD
    x = x ^ (x >> 15)
    x = (x * SECOND) & WORD
    return x ^ (x >> 16)


def chained(key: Word, word: Word) -> Any:
    """The key of the words so far and one more."""
    return mix(key ^ word)


def to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """`x` in bfloat16, rounded away from zero with the probability that what is cut off is of a
    unit.

    The bits are added to the lower half of the float32, and then that is cut off: exact for what
    bfloat16 holds. NaN and inf stay what they are; a number that the sum could make infinite, of
    bfloat16's largest on, is cut off as it is, so that it stays finite.

    Args:
        x: float32. bits: int64 in 0 .. 2^16 - 1, of the same shape.
    """
    exact = x.contiguous().view(torch.int32)
    magnitude = exact & 0x7FFFFFFF
    upper = torch.where(magnitude >= LARGEST, exact, exact + bits.to(torch.int32)) >> 16
    return torch.where(magnitude > INFINITE, NAN, upper).to(torch.int16).view(torch.bfloat16)


def to_nearest(x: Tensor) -> Tensor:
    """`x` in bfloat16 to nearest, ties to even, for state that is loaded; what is finite stays
    so.
    """
    largest = torch.finfo(torch.bfloat16).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(torch.bfloat16)


@dataclass(slots=True)
class Rounding:
    """How state is stored in one step of a parameter group.

    Attributes:
        key: of seed and step, int64 0-d.
    """

    key: Tensor
    _of_pairs: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, hyper: dict[str, Any], device: torch.device) -> Rounding:
        """For the tensors of a group on a device.

        Args:
            hyper: the group: `state_seed`, and `step`, how many were taken before this one.
        """
        seed = hyper["state_seed"]
        key = chained(chained(START, seed & WORD), seed >> 32)
        return cls(chained(key, hyper["step"].to(device) & WORD))

    def key_of(self, pair: int) -> Tensor:
        """That of a pair of slots, which share a word per element."""
        if pair not in self._of_pairs:
            self._of_pairs[pair] = chained(self.key, pair)
        return self._of_pairs[pair]

    def of_elements(self, index: Tensor, numel: int) -> Draw:
        """What elements of a tensor of `numel` get; `index`: their global indices, int64."""
        return Draw(self, index, numel > 1 << 32)


@dataclass(slots=True)
class Roundings:
    """Those of the parameter groups in one step, each made when it is asked for."""

    device: torch.device
    _of_groups: dict[int, Rounding] = field(default_factory=dict)

    def of(self, hyper: dict[str, Any]) -> Rounding:
        """That of a group."""
        if id(hyper) not in self._of_groups:
            self._of_groups[id(hyper)] = Rounding.of(hyper, self.device)
        return self._of_groups[id(hyper)]

    def keys(self, batch: Batch) -> Tensor:
        """The keys of all items, int64 (items,), for the compiled passes."""
        groups, group_of = batch.hypers()
        return torch.stack([self.of(group).key for group in groups]).index_select(0, group_of)


def is_halved(state: Tensor) -> bool:
    """Whether this is kept in bfloat16, and rounded when it is written."""
    return state.dtype == torch.bfloat16


@dataclass(slots=True)
class Draw:
    """The random bits of some elements in one step; a word for two slots when it is asked for.

    Attributes:
        index: int64, in the shape of the elements.
        high: whether there are indices beyond 32 bits.
    """

    rounding: Rounding
    index: Tensor
    high: bool = False
    _words: dict[int, Tensor] = field(default_factory=dict)

    def bits(self, slot: int) -> Tensor:
        """16 of them for every element, int64: of even slots the lower ones of their word."""
        pair = slot // 2
        if pair not in self._words:
            key = chained(self.rounding.key_of(pair), self.index >> 32 if self.high else 0)
            self._words[pair] = mix((self.index + key) & WORD)
        word = self._words[pair]
        return word >> 16 if slot % 2 else word & 0xFFFF

    def rounded(self, x: Tensor, slot: int) -> Tensor:
        """New state as it is stored, bfloat16.

        Args:
            x: float32 in the shape of `index`, or with one dim more in front: of as many slots, the
                first of which is `slot`.
        """
        if x.dim() == self.index.dim():
            return to_bfloat16(x, self.bits(slot))
        return torch.stack([to_bfloat16(one, self.bits(slot + k)) for k, one in enumerate(x)])
