"""Everything that talks to torch.distributed; the only folder that does.

From the ground up: `store` bounds what is asked of it, `meeting` knows it alone, `collectives`
process groups, `own` those that one user has to itself, `agreement` what ranks must have in common.
"""

from .agreement import PeerError, agree, check_equal, checksums, differing, raise_together, together
from .collectives import (
    PHASES,
    Collective,
    Pending,
    Reduction,
    all_gather,
    all_reduce,
    broadcast,
    can_reduce,
    check_group,
    default_group,
    device_type,
    gather_objects,
    group_over,
    rank,
    ranks_of,
    reduce_scatter,
    sent,
    serve,
    size,
    union,
)
from .meeting import (
    GRACE,
    PATIENCE,
    CommunicationError,
    Declined,
    awaited_by,
    decline,
    meet,
    meetings,
    timeout_of,
)
from .own import OwnGroup, own_group
from .store import within

__all__ = [
    "GRACE",
    "PATIENCE",
    "PHASES",
    "Collective",
    "CommunicationError",
    "Declined",
    "OwnGroup",
    "PeerError",
    "Pending",
    "Reduction",
    "agree",
    "all_gather",
    "all_reduce",
    "awaited_by",
    "broadcast",
    "can_reduce",
    "check_equal",
    "check_group",
    "checksums",
    "decline",
    "default_group",
    "device_type",
    "differing",
    "gather_objects",
    "group_over",
    "meet",
    "meetings",
    "own_group",
    "raise_together",
    "rank",
    "ranks_of",
    "reduce_scatter",
    "sent",
    "serve",
    "size",
    "timeout_of",
    "together",
    "union",
    "within",
]
