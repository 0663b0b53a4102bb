"""Process groups that one user has to itself: what it sends there has an order of its own, whatever
else the same ranks send. Makes groups, and keeps those that were given back.

Making one is collective. Given back they are when an optimizer is collected as garbage, which each
rank does at another time; so ranks tell each other which they have free before one is used again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist

from .collectives import default_group, gather_objects, new_group, ranks_of
from .meeting import timeout_of

_Key = tuple[tuple[int, ...], str, float]  # the ranks, the backend, the timeout
_MADE: dict[_Key, list[OwnGroup]] = {}
_WORLDS: list[Any] = []  # the one in which they were made


class OwnGroup:
    """A process group over the ranks of another one, for one user at a time.

    Attributes:
        group: the process group.
        free: whether nobody uses it now.
        broken: whether a collective in it failed, or was left in the middle; nobody gets it again.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.free = self.broken = False

    def give_back(self, *unfinished: Collection[Any]) -> None:
        """Let another user have it, unless something is `unfinished`; no collective."""
        self.broken = self.broken or any(unfinished)
        self.free = True


def own_group(group: Any) -> OwnGroup:
    """One with the ranks, the backend and the timeout of `group`. Collective over `group`.

    Raises:
        CommunicationError: a rank did not come within the timeout.
    """
    world = default_group()
    if not _WORLDS or _WORLDS[0] is not world:  # the one before was destroyed, with all its groups
        _MADE.clear()
        _WORLDS[:] = [world]
    ranks = ranks_of(group)
    backend = str(dist.distributed_c10d.get_backend_config(group))
    device = torch.device(sorted(known.type for known in group._device_types)[-1])
    timeout = timeout_of(group, device)
    made = _MADE.setdefault((tuple(ranks), backend, timeout), [])
    mine = {number for number, own in enumerate(made) if own.free and not own.broken}
    free: set[int] = set.intersection(*gather_objects(mine, group))
    if free:
        own = made[min(free)]
        own.free = False
        return own
    own = OwnGroup(new_group(ranks, timeout, backend=backend, sort_ranks=False))
    made.append(own)
    return own
