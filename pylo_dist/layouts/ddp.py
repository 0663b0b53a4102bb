"""DistributedDataParallel, as seen from the parameters that a wrapper may hold: whether it averages
their gradients. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .objects import living


def wrappers_of(params: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """The wrappers that hold one of these."""
    ids, found = set(map(id, params)), living((DistributedDataParallel,))
    return [wrapper for wrapper in found if any(id(own) in ids for own in wrapper.parameters())]


def left_out(named: Sequence[tuple[str, Tensor]]) -> ValueError | None:
    """What is wrong with a step on these parameters, which all have a gradient: a wrapper averages
    only what was trainable when it was made, and leaves each rank its own gradient of the rest.
    """
    wrappers = wrappers_of([param for _, param in named])
    averaged = {key for wrapper in wrappers for key in _averaged(wrapper)}
    # not those that a wrapper was told to ignore
    held = {id(param) for wrapper in wrappers for param in wrapper._module_parameters}
    for fqn, param in named:
        if id(param) in held - averaged:
            return ValueError(
                f"{fqn!r} was frozen when DistributedDataParallel was given the model, and has a "
                "gradient now, which it does not average, so that the ranks would drift apart: "
                "wrap the model while the parameter is trainable (find_unused_parameters=True) and "
                "freeze it after that, or wrap it again"
            )
    return None


def _averaged(wrapper: Any) -> set[int]:
    """By id, the parameters of which the wrapper averages gradients."""
    params = wrapper._module_parameters
    if wrapper._get_ddp_logging_data()["num_parameter_tensors"] == len(params):
        return set(map(id, params))
    # memory of their size for a moment
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    return {id(param) for bucket in buckets for param in bucket.parameters()}
