"""Whether a gradient of any rank is no number, shown to all ranks in what they hold. Writes one
element of the gradients.

It comes with the gradients themselves: behind its part of a bucket every rank adds 0, or NaN if its
own gradients of the bucket cannot be added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .buckets import Bucket
from .sharing import Sharing


class Nonfinite:
    """The warnings of all ranks that came with gradients, until somebody looks at these.

    Args:
        buckets: in whose pieces it is shown; the list may grow.
    """

    def __init__(self, buckets: Sequence[Bucket], sharing: Sharing) -> None:
        self._buckets, self._sharing = buckets, sharing
        # 0 or NaN; by device, since they come on streams of their own
        self._sums: dict[torch.device, Tensor] = {}

    def heard(self, warning: Tensor) -> None:
        """A bucket has arrived with this one, 0-d, the sum over ranks."""
        warning = warning.to(torch.float32)
        before = self._sums.get(warning.device)
        self._sums[warning.device] = warning.clone() if before is None else before + warning

    def forget(self) -> None:
        """The gradients that these were about are gone."""
        self._sums.clear()

    @property
    def unseen(self) -> bool:
        """Whether gradients have arrived since the last `spread`."""
        return bool(self._sums)

    @torch.no_grad()
    def spread(self) -> bool:
        """Let a NaN or inf of any rank be seen in the gradients of every rank that holds anything,
        once per reduction.

        For code outside that decides from its own gradients whether to step, such as
        torch.amp.GradScaler: to decide otherwise than the other ranks would be a hang. Exact: 0 is
        added where all gradients are finite.

        Returns:
            Whether gradients have arrived since the last call.
        """
        sums, self._sums = [*self._sums.values()], {}
        if not sums:
            return False
        if self._sharing.holders is None:
            return True
        for bucket in self._buckets:
            for member in bucket.members:
                if member.piece.numel() and member.piece.grad is not None:
                    for warning in sums:
                        member.piece.grad[:1].add_(warning.to(member.piece.device))
                    return True
        return True
