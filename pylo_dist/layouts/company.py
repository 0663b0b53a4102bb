"""In whose hands parameters are beside those of their optimizer: a pipeline, torch's
ZeroRedundancyOptimizer, DDP inside a Join. Looks through the objects of the process; changes none.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objects import living

# what is found by the names of modules that only their users import
_PIPELINES = ("torch.distributed.pipelining.stage", "_PipelineStageBase")
_DEALERS = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
_WRAPPERS = ("torch.nn.parallel.distributed", "DistributedDataParallel")


@dataclass(frozen=True, slots=True)
class Company:
    """What else has a hand in the parameters of an optimizer.

    Attributes:
        part: what the optimizer has of a model whose other tensors other ranks have, in words;
            None: all of it, as far as can be seen.
        wrappers: the DistributedDataParallel modules that hold a parameter of it.
    """

    part: str | None
    wrappers: tuple[weakref.ref[Any], ...]

    def joins(self) -> bool:
        """Whether inputs may be uneven: a wrapper is in a Join, which goes on without the ranks
        that have none left.
        """
        for wrapper in self.wrappers:
            config = getattr(wrapper(), "_join_config", None)
            if config is not None and config.enable and not config.throw_on_early_termination:
                return True
        return False


def company_of(optimizer: object, params: Sequence[Tensor]) -> Company:
    """Who else has a hand in `params`; `optimizer` is theirs."""
    stages, dealers, wrappers = (_class(*names) for names in (_PIPELINES, _DEALERS, _WRAPPERS))
    found = living(tuple(kind for kind in (stages, dealers, wrappers) if kind is not None))
    mine = _ids(params)
    around = [thing for thing in _of(found, wrappers) if _holds(thing, mine)]
    part = _stage(_of(found, stages), mine) or _dealt(_of(found, dealers), optimizer, mine)
    return Company(part, tuple(map(weakref.ref, around)))


def part_of(optimizer: object, params: Sequence[Tensor]) -> str | None:
    """`Company.part` alone: looks through nothing where it cannot be a part."""
    stages, dealers = _class(*_PIPELINES), _class(*_DEALERS)
    kinds = tuple(kind for kind in (stages, dealers) if kind is not None)
    if not kinds:
        return None
    found, mine = living(kinds), _ids(params)
    return _stage(_of(found, stages), mine) or _dealt(_of(found, dealers), optimizer, mine)


def _class(module: str, name: str) -> type | None:
    found: type | None = getattr(sys.modules.get(module), name, None)
    return found


def _of(found: Sequence[Any], kind: type | None) -> list[Any]:
    return [] if kind is None else [thing for thing in found if isinstance(thing, kind)]


def _ids(params: Sequence[Tensor]) -> set[int]:
    """Those of the model's parameters; of a piece the model has the whole."""
    return {id(getattr(param, "whole", param)) for param in params}


def _holds(module: torch.nn.Module, mine: set[int]) -> bool:
    return any(id(param) in mine for param in module.parameters())


def _stage(stages: Sequence[Any], mine: set[int]) -> str | None:
    """Which part of a pipeline holds these parameters; None for none, or for all its stages."""
    own = [stage for stage in stages if _holds(stage.submod, mine)]
    numbers = sorted({stage.stage_index for stage in own})
    total = max((stage.num_stages for stage in own), default=0)
    if len(numbers) == total:
        return None
    which = " and ".join(map(str, numbers))
    return f"stage {which} of the {total} of a pipeline (torch.distributed.pipelining)"


def _dealt(dealers: Sequence[Any], optimizer: object, mine: set[int]) -> str | None:
    """How many tensors torch's ZeroRedundancyOptimizer has given its `optimizer` on this rank; None
    for another optimizer, or for all.
    """
    for dealer in dealers:
        whole = sum(len(group["params"]) for group in dealer.param_groups)
        if dealer.optim is optimizer and len(mine) < whole:
            return f"{len(mine)} of {whole} tensors, as torch's ZeroRedundancyOptimizer deals them"
    return None
