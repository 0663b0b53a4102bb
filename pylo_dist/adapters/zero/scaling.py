"""Whether all ranks have multiplied their pieces' gradients by one number between backward and the
step. Reads gradients.

torch's clip_grad_norm_ on pieces divides them by the norm of this rank's own, so that no two ranks
step on the same gradient. What changes gradients element by element is left alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import comm
from .buckets import Bucket
from .others import LateAnswer

SLOTS = 3  # of the ranks that say a factor: how many, its sum, the sum of its squares


class Scaling:
    """Compares by what ranks have scaled gradients since they were first looked at.

    Args:
        buckets: of whose pieces; the list may grow.
        group: the ranks that compare, not None.
    """

    def __init__(self, buckets: Sequence[Bucket], group: Any) -> None:
        self._buckets, self.group = buckets, group
        self._then: tuple[Tensor, Tensor] | None = None
        self._late = LateAnswer()

    def look(self) -> None:
        """Gradients have arrived, and somebody may change them from here on."""
        self._then = self._norms()

    def forget(self) -> None:
        """The gradients looked at are gone, or others have been added to them."""
        self._then = None

    def mine(self) -> Tensor:
        """This rank's part of the sum, float64 (SLOTS,): its factor, 1 where nobody has looked, or
        nothing if that was no scaling.
        """
        device = self._buckets[0].flat.device
        then, self._then = self._then, None
        slots = torch.ones(SLOTS, dtype=torch.float64, device=device)
        now = None if then is None else self._norms()
        if then is not None:
            slots.zero_()
        if then is not None and now is not None:
            largest, norm = now[0] / then[0], now[1] / then[1]
            scaled = ((norm - largest).abs() <= max(1e-4, self._rounding()) * largest).double()
            powers = torch.stack([torch.ones_like(largest), largest, largest.square()])
            slots = torch.where(scaled > 0, powers, slots)
        return slots

    def problem(self, total: Tensor) -> ValueError | None:
        """The error if factors differ, alike on all ranks; on a GPU that of the step before.

        Args:
            total: (SLOTS,) the sum over ranks.
        """
        count, first, second = total.unbind()
        unlike = count * second - first.square() > (self._rounding() * first).square()
        found: ValueError | None = self._late.ask([_unlike()], [unlike.reshape(1)])
        return found

    def riding(self, phases: Iterator[list[comm.Collective]]) -> Iterator[list[comm.Collective]]:
        """The phases of a learned step, in whose first sum over the group the factors are added up
        too; raises what `problem` says before anything changes.
        """
        waits = True
        for collectives in phases:
            groups = [group for group, _ in map(_as_sum, collectives)]
            if not waits or self.group not in groups:
                yield collectives
                continue
            waits, place = False, groups.index(self.group)
            buffer = _as_sum(collectives[place])[1]
            packed = torch.cat([buffer.reshape(-1), self.mine().to(buffer)])
            yield [*collectives[:place], (self.group, packed), *collectives[place + 1 :]]
            buffer.copy_(packed[:-SLOTS].view_as(buffer))
            problem = self.problem(packed[-SLOTS:])
            if problem is not None:
                if isinstance(phases, Generator):
                    phases.close()
                raise problem

    def _rounding(self) -> float:
        """By how much factors may differ that are meant alike."""
        kinds = {(b.flat if b.master is None else b.master).dtype for b in self._buckets}
        return 16 * max(torch.finfo(kind).eps for kind in kinds)

    @torch.no_grad()
    def _norms(self) -> tuple[Tensor, Tensor] | None:
        """The largest element and the norm of all gradients here, float64 0-d."""
        grads = [
            member.piece.grad
            for bucket in self._buckets
            for member in bucket.members
            if member.piece.grad is not None and member.piece.numel()
        ]
        if not grads:
            return None
        device = self._buckets[0].flat.device
        both = [
            torch.stack([number.to(device, torch.float64) for number in numbers])
            for numbers in (_largest_elements(grads), torch._foreach_norm(grads, 2))
        ]
        return both[0].max(), both[1].square().sum().sqrt()


def _largest_elements(grads: Sequence[Tensor]) -> list[Tensor]:
    """Of each gradient its largest magnitude, 0-d and exact; NaN where there is one.

    Args:
        grads: of one device, none of them empty.
    """
    if not grads or grads[0].device.type != "cpu":
        return list(torch._foreach_norm(list(grads), torch.inf)) if grads else []
    # on a CPU twenty times as fast as vector_norm
    ends = [torch.aminmax(grad.detach()) for grad in grads]
    return [torch.maximum(-low, high) for low, high in ends]


def _as_sum(collective: Any) -> tuple[Any, Any]:
    """Group and buffer of a sum; no group of anything else."""
    return collective if type(collective) is tuple else (None, None)


def _unlike() -> ValueError:
    return ValueError(
        "the ranks have multiplied the gradients in optimizer.param_groups by different numbers, "
        "as torch's clip_grad_norm_ does, which knows this rank's pieces alone; clip with "
        "pylo_dist.clip_grad_norm_(optimizer, max_norm), or with max_grad_norm= of learned ones"
    )
