"""Units that FSDP keeps gathered beyond a pass. An evaluation leaves the root so, and under
SHARD_GRAD_OP or `reshard_after_forward=False` every unit; FSDP takes what is gathered for the
parameters of the next pass. A step moves the shards alone, so what was gathered before it must go.

Legend: a *unit* is a module of `fully_shard` or of `FullyShardedDataParallel`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import fsdp1
from .objects import living
from .plain import is_dtensor


def releases_of(params: Sequence[Tensor]) -> list[Callable[[], None]]:
    """For each unit that holds some of these parameters, what has its next pass gather them anew;
    to be called outside of a pass. Costs nothing where nothing is gathered, keeps no unit alive.

    Looks through all objects of the process where there are DTensors.
    """
    if any(map(fsdp1.is_flattened, params)):
        return fsdp1.releases(params)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    mine = {id(param) for param in params if is_dtensor(param)}
    if fsdp is None or not mine:
        return []
    return [
        partial(_release, weakref.ref(unit))
        for unit in living((fsdp.FSDPModule,))
        if any(id(param) in mine for param in _sharded(unit))
    ]


def _release(unit: weakref.ref[Any]) -> None:
    module = unit()
    if module is not None:
        module.reshard()


def _sharded(unit: Any) -> Iterator[Tensor]:
    """The sharded parameters of one `fully_shard`, which are not the module's while it is
    gathered.
    """
    state = unit._get_fsdp_state()
    # torch 2.10 has one group of parameters in place of a list
    groups: Iterable[Any] = getattr(
        state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]
    )
    for group in groups:
        for held in getattr(group, "fsdp_params", ()):
            yield held.sharded_param
