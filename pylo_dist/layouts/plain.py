"""Parameters as they are: whole tensors (plain and DDP), and local pieces bound by an adapter.
Reads gradients; writes parameters back where they could not be viewed as one dimension.

Legend: N local elements; a parameter and its gradient are seen as (N,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.pieces import PieceParameter, ShardBinding, ShardedParam, bound_shard, raw_grad
from ..core.shards import TensorShard
from .fsdp1 import check_reduced, is_flat

_PLAIN = (Tensor, torch.nn.Parameter)
_ARE_PLAIN = frozenset(_PLAIN)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)  # of parameters of any precision


def is_dtensor(tensor: object) -> bool:
    """Whether this is a `torch.distributed.tensor.DTensor`; that module, slow to import, is not
    asked.
    """
    return (
        type(tensor) not in _PLAIN
        and hasattr(tensor, "placements")
        and hasattr(tensor, "device_mesh")
    )


# classes of parameters whose numbers are their own memory
_HELD = frozenset((*_PLAIN, PieceParameter))


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, sharing its memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    local: Any = tensor.to_local()  # type: ignore[attr-defined]
    local = local.wait() if hasattr(local, "wait") else local  # a collective may be under way
    # of the local tensor: an operation on a DTensor costs ten times as much
    return local.detach()  # type: ignore[no-any-return]


def memory_of(tensors: Sequence[Tensor]) -> list[int]:
    """The address of what this rank holds of each."""
    if not _ARE_PLAIN.issuperset(map(type, tensors)) and any(map(is_dtensor, tensors)):
        tensors = [*map(local_tensor, tensors)]
    return [*map(Tensor.data_ptr, tensors)]


def check_leaf(fqn: str, param: Tensor) -> None:
    """Raise ValueError for the result of an operation, which backward gives no gradient."""
    if not (param.is_leaf or param.retains_grad):
        raise ValueError(
            f"{fqn!r} is the result of an operation ({param.grad_fn}), no leaf tensor: give the "
            "parameter that it was made of"
        )


_PART_OF = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


def part_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of the tensor of which this one is a part, where its attributes say so as in
    `torch.distributed.checkpoint.CheckpointableTensor`; None where they do not.
    """
    if not (hasattr(tensor, _PART_OF[0]) and all(hasattr(tensor, name) for name in _PART_OF)):
        return None
    return tuple(tensor.global_shape)  # type: ignore[attr-defined]


def mark_part(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor`, as the same part as `source` where that is one (modified in place)."""
    if part_of(source) is not None:
        for name in _PART_OF:
            setattr(tensor, name, getattr(source, name))
    return tensor


def held_in(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the numbers of one of another class, such as torchao's; [] for one that
    holds its own.
    """
    if type(tensor) in _PLAIN:
        return []
    with torch.no_grad():  # of a DTensor to_local() is an operation
        local: Any = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    if type(local) in _PLAIN or not hasattr(local, "__tensor_flatten__"):
        return []
    names, _ = local.__tensor_flatten__()
    return [getattr(local, name) for name in names]


def check_param(fqn: str, param: Tensor) -> None:
    """Raise ValueError for a parameter that no learned rule can update."""
    if is_flat(param):
        raise ValueError(
            f"{fqn!r} is a flat parameter of FullyShardedDataParallel (FSDP1), which holds many "
            "tensors as one: build a learned optimizer on the wrapped model's parameters, or wrap "
            "the model with use_orig_params=True"
        )
    whole = None if bound_shard(param) is not None else part_of(param)
    if whole not in (None, tuple(param.shape)):
        raise ValueError(
            f"{fqn!r} of shape {tuple(param.shape)} says that it is a part of a tensor of shape "
            f"{whole} (torch.distributed.checkpoint.CheckpointableTensor), and not with which "
            "ranks it shares that one: shard the model with fully_shard or as DTensors"
        )
    if param.is_meta:
        raise ValueError(
            f"{fqn!r} is on the meta device: build the optimizer after the model was sharded and "
            "initialised (pylo_dist.shard does both)"
        )
    if param.layout != torch.strided:
        raise ValueError(
            f"{fqn!r} has layout {param.layout}; learned optimizers need dense parameters "
            "(torch.strided)"
        )
    if param.is_complex():
        raise ValueError(
            f"{fqn!r} is {param.dtype}; learned optimizers need real parameters: optimize "
            "torch.view_as_real of it"
        )
    if not param.is_floating_point():
        raise ValueError(
            f"{fqn!r} is {param.dtype}; learned optimizers need a floating-point parameter"
            f"{'' if param.requires_grad else ': leave this one out, which is frozen'}"
        )
    inner = held_in(param) if param.requires_grad else []  # frozen ones are never written
    local = local_tensor(param) if inner else param
    if inner and not any((t.dtype, t.shape) == (local.dtype, local.shape) for t in inner):
        raise ValueError(
            f"{fqn!r} is a {type(local).__name__}, which keeps {param.dtype} numbers as "
            f"{', '.join(f'{t.dtype} {tuple(t.shape)}' for t in inner)}: a step would be rounded "
            "to those. Train the parameter before it is quantised, or freeze it and train "
            "adapters beside it"
        )


def describe(fqn: str, param: Tensor) -> ShardBinding:
    """Where the elements of `param` lie, and with whom they are shared."""
    return bound_shard(param) or ShardBinding(TensorShard.whole(fqn, tuple(param.shape)), None)


def collect(
    binding: ShardBinding,
    param: Tensor,
    summed: Tensor | None = None,
    before: ShardedParam | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> ShardedParam:
    """The parameter and its gradient as local 1-D tensors: views where the memory allows, else
    copies (see `publish`).

    Args:
        summed: takes the place of a `.grad` that is a DTensor of summands.
        before: the result of the step before, which is taken over (modified in place) where the
            parameter is as it was.
        state: the parameter's, in float64 where it was a float64 parameter.

    Raises:
        ValueError: a sparse gradient; one of a precision that is not served; one that FSDP1 has not
            reduced; another shape, precision or device than when the optimizer was built.
    """
    shard = binding.shard
    grad = _gradient_of(param) if summed is None else summed
    if grad is not None and grad.layout != torch.strided:
        raise ValueError(
            f"{shard.fqn!r} has a sparse gradient, learned optimizers need a dense one: build its "
            "embedding with sparse=False"
        )
    if grad is not None and grad.dtype not in _GRADIENTS and grad.dtype is not param.dtype:
        raise ValueError(
            f"{shard.fqn!r} has a gradient of {grad.dtype}: wanted "
            f"{', '.join(map(str, _GRADIENTS))} or the parameter's own {param.dtype}; convert it "
            "before the step"
        )
    as_before = before is not None and _is_as_before(binding, param, before.value)
    if not as_before:
        _check_as_built(binding, param, state or {})
    if grad is None:
        return absent(binding, param)
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    sharded = before if before is not None and as_before else without_gradient(binding, param)
    local = local_tensor(grad)
    if local.dim() != 1 or local.requires_grad or not local.is_contiguous() or local.is_neg():
        local = local.detach().resolve_neg().reshape(-1).contiguous()
    check_reduced(shard.fqn, local, shard.numel)
    sharded.grad, sharded.present = local, binding.present
    return sharded


def _gradient_of(param: Tensor) -> Tensor | None:
    return raw_grad(param) if type(param) is PieceParameter else param.grad


def _is_as_before(binding: ShardBinding, param: Tensor, value: Tensor) -> bool:
    """Whether `value`, that of the step before, is all of a parameter of which nothing but its
    numbers is another now. Asked for every parameter in every step.
    """
    return (
        type(param) in _HELD
        and param.data_ptr() == value.data_ptr()
        and param.is_contiguous()
        and param.dtype is value.dtype
        and param.shape == shape_of(binding, param)
    )


def are_as_before(
    params: Sequence[Tensor], values: Sequence[Tensor], shapes: Sequence[torch.Size]
) -> bool:
    """As `_is_as_before` of all parameters, whose `shapes` those of `shape_of` are: in lists, since
    it is asked in every step.
    """
    return (
        _HELD.issuperset(map(type, params))
        and [*map(Tensor.data_ptr, params)] == [*map(Tensor.data_ptr, values)]
        and all(map(Tensor.is_contiguous, params))
        and [param.dtype for param in params] == [value.dtype for value in values]
        and [param.shape for param in params] == shapes
    )


def shape_of(binding: ShardBinding, param: Tensor) -> torch.Size:
    """The shape that a parameter has had since the optimizer was built."""
    shard = binding.shard
    return torch.Size(shard.shape if bound_shard(param) is None else (shard.numel,))


def are_local(grads: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> bool:
    """Whether all gradients, of those that there are, are this rank's elements as they lie.

    Args:
        shapes: of what this rank holds of their parameters.
    """
    there = [grad for grad in grads if grad is not None]
    return (
        _ARE_PLAIN.issuperset(map(type, there))
        and all(g is None or g.shape == shape for g, shape in zip(grads, shapes, strict=True))
        and all(grad.layout is torch.strided and not grad.requires_grad for grad in there)
        and all(map(Tensor.is_contiguous, there))
        and all(grad.dtype in _GRADIENTS for grad in there)
        and not any(map(Tensor.is_neg, there))
    )


def _check_as_built(binding: ShardBinding, param: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a parameter of another shape, or of another precision or device than
    its state.
    """
    shard = binding.shard
    if tuple(param.shape) != (shard.shape if bound_shard(param) is None else (shard.numel,)):
        raise ValueError(
            f"{shard.fqn!r} has shape {tuple(param.shape)} now, another than when the optimizer "
            "was built: build it after that"
        )
    for tensor in state.values():
        if (tensor.dtype == torch.float64) != (param.dtype == torch.float64):
            raise ValueError(
                f"{shard.fqn!r} is {param.dtype} now, and its state {tensor.dtype}: call "
                "model.double() or model.float() before building the optimizer, or build another "
                "one"
            )
        if tensor.device != param.device:
            raise ValueError(
                f"{shard.fqn!r} is on {param.device} now, and its state on {tensor.device}: move "
                "the model before building the optimizer, or build another one"
            )
        break


def absent(binding: ShardBinding, param: Tensor) -> ShardedParam:
    """As `collect` where this rank has no gradient."""
    sharded = without_gradient(binding, param)
    if binding.holders is not None:
        # other ranks may have one: then it is zero here
        sharded.grad = sharded.value.new_zeros(sharded.value.shape)
    return sharded


def without_gradient(binding: ShardBinding, param: Tensor) -> ShardedParam:
    """As `collect`, before there is a gradient."""
    # reshape alone may give a view with steps between its elements, where rules expect none
    value = local_tensor(param).detach().reshape(-1).contiguous()
    if value.numel() != binding.shard.numel:  # exchanged, which `collect` refuses
        value = value.new_zeros(binding.shard.numel)
    return _of(binding, value)


def _of(b: ShardBinding, value: Tensor) -> ShardedParam:
    return ShardedParam(
        b.shard, value, None, False, b.group, b.peers, b.rank, b.holders, b.replicas
    )


def publish(sharded: ShardedParam, param: Tensor) -> None:
    """Write the values back into `param` where `collect` had to copy them (`param` is modified in
    place).
    """
    local = local_tensor(param)
    if not local.is_contiguous():
        local.copy_(sharded.value.view(local.shape))
