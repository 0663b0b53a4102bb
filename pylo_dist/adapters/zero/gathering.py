"""Bring updated parameters to all ranks, bucket by bucket, while the next forward pass begins.
Writes the buckets' flat memory.

Between the step and the arrival of a bucket its parameters are `PendingParameter`s: whatever reads
one waits for it first.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ... import comm
from ...core import trace
from ...core.devices import stream_of
from .buckets import Bucket
from .sharing import Sharing

_ARRIVAL = "_pylo_dist_arrival"


class PendingParameter(nn.Parameter):
    """The class of a parameter whose values are on their way; it becomes an `nn.Parameter` again
    when something reads it.

    Only what says nothing about values (shape, dtype, `grad`, ...) leaves it as it is.
    """

    @classmethod
    # compiled code that meets one asks for it outside of its graph; torch.compiler.disable would
    # import dynamo with this package
    @_disable_dynamo
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_NOTHING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, PendingParameter):
                wait_for(leaf)
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        wait_for(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait_for(self)
        return self.__reduce_ex__(protocol)


_READS_NOTHING = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")),
    *(getattr(Tensor, name).__get__ for name in ("is_leaf", "is_cuda", "is_cpu", "is_sparse")),
    *(getattr(Tensor, name).__get__ for name in ("grad", "grad_fn", "requires_grad")),
    *(getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")),
    getattr(Tensor, "grad").__delete__,  # noqa: B009
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.requires_grad_),
    *(Tensor.__hash__, Tensor.__len__),
}


def wait_for(param: Tensor) -> None:
    """Until the values of a PendingParameter are there. Raises CommunicationError."""
    getattr(param, _ARRIVAL)()


class ParameterGatherer:
    """All-gathers buckets after a step.

    A bucket is waited for at once, unless every module that owns one of its parameters ran its
    forward pass in plain Python since the last step: code compiled by torch.compile looks at
    parameters before any hook of ours could wait for them.

    Args:
        buckets: in the order of the reductions; forward needs them the other way round.
        overlap: whether to let buckets arrive during the next forward pass at all.
    """

    def __init__(
        self, buckets: list[Bucket], sharing: Sharing, *, overlap: bool, timeout: float | None
    ) -> None:
        self.buckets = buckets
        self._sharing, self._overlap, self._timeout = sharing, overlap, timeout
        self._owners: dict[int, set[int]] = {}  # id(parameter) -> modules that own it
        # modules whose forward pass began in Python since the last step
        self._ran: set[int] = set()

    def watch(self, model: nn.Module) -> None:
        """Wait for parameters in the forward pre-hooks of the modules that own them."""
        if self._sharing.group is None or not self._overlap:
            return
        this = weakref.ref(self)
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                module.register_forward_pre_hook(_ForwardHook(this))
                for param in own:
                    self._owners.setdefault(id(param), set()).add(id(module))

    @trace.phased("gather: start")
    @torch.no_grad()
    def start(self) -> None:
        """Send the updated parts; each bucket's parameters wait for their values when they are
        read.
        """
        if self._sharing.group is None:
            return
        ran, self._ran = self._ran, set()
        at_once: list[comm.Pending] = []
        for b in reversed(range(len(self.buckets))):
            bucket = self.buckets[b]
            what = f"the all-gather of parameters, bucket {b}"
            pending = comm.all_gather(
                bucket.flat,
                bucket.shard,
                self._sharing.group,
                what,
                self._timeout,
                bucket.slices,
            )
            if not self._may_wait(bucket, ran):
                at_once.append(pending)
                continue
            home = stream_of(bucket.flat.device)
            arrive = _arrival(pending, [member.param for member in bucket.members], home)
            for member in bucket.members:
                setattr(member.param, _ARRIVAL, arrive)
                member.param.__class__ = PendingParameter
        for pending in at_once:  # only now, with all of them on their way
            with trace.phase("gather: wait"):
                pending.wait()

    def _may_wait(self, bucket: Bucket, ran: set[int]) -> bool:
        params = [member.param for member in bucket.members]
        if any(type(param) is not nn.Parameter for param in params):
            return False
        owned = (self._owners.get(id(param)) for param in params)
        return all(owners and owners <= ran for owners in owned)

    def wait(self) -> None:
        """Until all parameters are there."""
        for bucket in self.buckets:
            for member in bucket.members:
                if type(member.param) is PendingParameter:
                    wait_for(member.param)


def _arrival(
    pending: comm.Pending, params: list[Tensor], home: torch.Stream | None
) -> Callable[[], None]:
    """What the first reader of these calls: its stream waits, and that of the step, `home`. So
    another one that reads later sees the values if it comes after either, as with any tensor.
    """

    def arrive() -> None:
        with trace.phase("gather: wait"):
            pending.wait()
        here = None if home is None else stream_of(home.device)
        if home is not None and here is not None and here != home:
            home.wait_stream(here)
        for param in params:
            param.__class__ = nn.Parameter
            delattr(param, _ARRIVAL)

    return arrive


class _ForwardHook:
    """Waits for a module's own parameters before its forward pass; in a copy of the model it does
    nothing.
    """

    def __init__(self, gatherer: weakref.ref[ParameterGatherer] | None = None) -> None:
        self._gatherer = gatherer

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return _ForwardHook, ()

    def __call__(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or self._gatherer is None:
            return
        alive = self._gatherer()
        if alive is not None:
            alive._ran.add(id(module))
        for param in module._parameters.values():
            if type(param) is PendingParameter:
                wait_for(param)
