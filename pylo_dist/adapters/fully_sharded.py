"""`shard`: a model and its optimizer on FSDP2 in one call. Shards the model (in place); initialises
one on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Union

import torch
from torch import Tensor, nn

from .. import comm
from ..core.shards import TensorShard
from ..layouts.construction import built_on_all
from ..layouts.dtensor import TENSOR_PARALLEL, shard_of
from ..layouts.plain import check_param, is_dtensor, local_tensor
from ..optimizer import LearnedOptimizer, checks
from .attributes import attributes_of, hand_on

Wrap = Union[None, type[nn.Module], Sequence[type[nn.Module]], Callable[[nn.Module], bool]]


@comm.during("pylo_dist.shard")
def shard(
    model: nn.Module,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    *,
    mesh: Any = None,
    wrap: Wrap = None,
    mixed_precision: Any = None,
    reshard_after_forward: bool | int = True,
    **optimizer_kwargs: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shard a model over ranks with `torch.distributed.fsdp.fully_shard` and build its optimizer.
    Collective.

    Every transformer block is a unit that is gathered and freed as a whole, the rest of the model
    one more. A tied parameter stays in one unit. Rank 0's parameters and buffers are given to all
    ranks first, as DDP does. Parameters that FSDP2 cannot cut (0-dim or empty) stay whole; the
    learned optimizer averages their gradients. A model on the meta device is initialised module by
    module after sharding, with the numbers that one process with rank 0's random state would draw.

    Args:
        model: modified in place. Tensor parallelism (`parallelize_module`) comes before, activation
            checkpointing too.
        optimizer_class: e.g. `pylo_dist.VeLO`; any torch optimizer that works on DTensors; or a
            callable that takes named parameters and `optimizer_kwargs`. Frozen parameters are left
            out.
        mesh: 1-D: sharded over it; 2-D with named dimensions: copies along the first, sharded along
            the second (HSDP). None: all ranks.
        wrap: which modules are units: classes, or a callable that is asked of each module. None:
            the classes that a Hugging Face model names in `_no_split_modules`, else the entries of
            each outermost ModuleList or ModuleDict whose entries are of one class and consist of
            several modules.
        mixed_precision: None; a dtype to compute in, parameters and gradient averages staying
            float32; or a `MixedPrecisionPolicy`.
        reshard_after_forward: False keeps blocks gathered until their backward; an int: how many
            ranks share them meanwhile.
        **optimizer_kwargs: for `optimizer_class`.

    Returns:
        (model, optimizer).

    Raises:
        ValueError: what cannot be sharded, by name, before the model is changed; what the optimizer
            refuses, after that; on all ranks.
        PeerError: `wrap`, `optimizer_class` or a `reset_parameters` raised on another rank.

    Example::

        torch.distributed.init_process_group()
        model, optimizer = pylo_dist.shard(model, pylo_dist.VeLO, num_steps=20_000)
    """
    import torch.distributed.fsdp as fsdp
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if comm.default_group() is None:
        _check_arguments(model, optimizer_class, mesh, wrap, mixed_precision, reshard_after_forward)
        raise ValueError(
            "torch.distributed is not initialised: start the ranks with torchrun, then call "
            "init_process_group()"
        )
    group = (
        comm.group_over(tuple(sorted(mesh.mesh.flatten().tolist())))
        if isinstance(mesh, DeviceMesh)
        else comm.default_group()
    )

    def prepare() -> tuple[
        list[tuple[str, nn.Parameter]], list[tuple[str, nn.Module]], dict[str, Any]
    ]:
        _check_arguments(model, optimizer_class, mesh, wrap, mixed_precision, reshard_after_forward)
        named = list(model.named_parameters())
        _check_model(model, named, mesh, fsdp.FSDPModule)
        if mesh is not None:
            _check_mesh(mesh)
        kwargs = optimizer_kwargs
        if isinstance(optimizer_class, type) and issubclass(optimizer_class, LearnedOptimizer):
            kwargs = optimizer_class.before_sharding(
                [(fqn, param) for fqn, param in named if param.requires_grad], kwargs
            )
        return named, _meta_modules(model), kwargs

    named, on_meta, optimizer_kwargs = comm.together(prepare, group, ValueError)
    units = comm.together(lambda: units_of(model, wrap), group)
    settings = {
        "optimizer_class": getattr(optimizer_class, "__qualname__", type(optimizer_class).__name__),
        "mesh": None if mesh is None else [mesh.device_type, list(mesh.mesh.shape)],
        "mixed_precision": mixed_precision,
        "reshard_after_forward": reshard_after_forward,
    }
    comm.check_equal(
        "setting, unit or tensor of the model given to shard()",
        [*(f"{name}={value}" for name, value in settings.items()), *_specs(model, units)],
        group,
        torch.device(comm.device_type() if mesh is None else mesh.device_type),
    )
    attributes = attributes_of(model)
    if mesh is None:
        mesh = init_device_mesh(
            comm.device_type(), (comm.size(comm.default_group()),), mesh_dim_names=("dp",)
        )
    if mixed_precision is not None and isinstance(mixed_precision, torch.dtype):
        mixed_precision = fsdp.MixedPrecisionPolicy(
            param_dtype=mixed_precision, reduce_dtype=torch.float32
        )
    device = torch.device(mesh.device_type)
    ignored = {param for _, param in named if param.dim() == 0 or param.numel() == 0}
    whole = ignored | set(model.buffers())
    with torch.no_grad():
        for tensor in [*dict.fromkeys([*(p for _, p in named), *model.buffers()])]:
            if tensor.is_meta:
                continue
            if tensor in whole:  # fully_shard does not move what it ignores
                tensor.data = tensor.data.to(device)
            _give_to_all(local_tensor(tensor), device, group)

    options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored}
    if mixed_precision is not None:
        options["mp_policy"] = mixed_precision

    def cut() -> None:
        for unit in units:
            fsdp.fully_shard(unit, reshard_after_forward=reshard_after_forward, **options)
        # the parameters of the root are wanted again as soon as backward begins: FSDP2's own
        # default keeps them
        fsdp.fully_shard(
            model,
            reshard_after_forward=None if reshard_after_forward is True else reshard_after_forward,
            **options,
        )
        hand_on(model, attributes)
        if on_meta:
            model.to_empty(device=device)

    comm.together(cut, group)
    if on_meta:
        with _random_state_of_first_rank(device, group):
            comm.together(lambda: _initialise(on_meta, device), group)
    trained = [(fqn, p) for fqn, p in model.named_parameters() if p.requires_grad]
    return model, built_on_all(
        lambda: optimizer_class(trained, **optimizer_kwargs), [param for _, param in trained]
    )


def _check_arguments(
    model: object,
    optimizer_class: object,
    mesh: object,
    wrap: object,
    mixed_precision: object,
    reshard_after_forward: object,
) -> None:
    """Raise ValueError for an argument of `shard` that is nothing of what it may be."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not isinstance(model, nn.Module):
        raise checks.refused("model", model, "a torch.nn.Module")
    if not callable(optimizer_class):
        raise checks.refused("optimizer_class", optimizer_class, "a class of optimizers")
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise checks.refused("mesh", mesh, "a DeviceMesh, or None for all ranks")
    if isinstance(wrap, type):
        wrap = (wrap,)
    if isinstance(wrap, (list, tuple, set, frozenset)):
        fits = all(isinstance(c, type) and issubclass(c, nn.Module) for c in wrap)
    else:
        fits = wrap is None or callable(wrap)
    if not fits:
        raise checks.refused("wrap", wrap, "classes of modules, a callable, or None")
    if not (
        mixed_precision is None
        or isinstance(mixed_precision, MixedPrecisionPolicy)
        or (isinstance(mixed_precision, torch.dtype) and mixed_precision.is_floating_point)
    ):
        wanted = "a floating-point dtype, a MixedPrecisionPolicy, or None"
        raise checks.refused("mixed_precision", mixed_precision, wanted)
    if not isinstance(reshard_after_forward, bool):
        checks.whole("reshard_after_forward", reshard_after_forward, "True, False, or an int", 1)


def units_of(model: nn.Module, wrap: Wrap = None) -> list[nn.Module]:
    """The modules that become units of their own, innermost first; see `shard` for `wrap`."""
    chosen = {module for module in _chosen(model, wrap) if module is not model}
    while True:  # a parameter of two units (tied) belongs to none of them, but to what holds both
        owners: dict[nn.Parameter, set[nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            path = name.split(".") if name else []
            chain = [
                model.get_submodule(".".join(path[:depth])) for depth in range(len(path), 0, -1)
            ]
            owner = next((m for m in chain if m in chosen), model)
            for param in module.parameters(recurse=False):
                owners.setdefault(param, set()).add(owner)
        torn = {unit for several in owners.values() if len(several) > 1 for unit in several} - {
            model
        }
        if not torn:
            break
        chosen -= torn
    return [module for module in reversed(list(model.modules())) if module in chosen]


def _chosen(model: nn.Module, wrap: Wrap) -> Iterator[nn.Module]:
    if wrap is None:
        names = set(getattr(model, "_no_split_modules", None) or ())
        of_these = [module for module in model.modules() if type(module).__name__ in names]
        yield from of_these or _blocks(model)
        return
    if isinstance(wrap, type) or not callable(wrap):
        classes = (wrap,) if isinstance(wrap, type) else tuple(wrap)
        found = [module for module in model.modules() if isinstance(module, classes)]
        missing = [
            c.__name__ for c in classes if not any(isinstance(module, c) for module in found)
        ]
        if missing:
            raise ValueError(f"wrap names {', '.join(missing)}, of which the model has no module")
        yield from found
        return
    yield from (module for module in model.modules() if wrap(module))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Entries of outermost lists of modules that are all alike and large enough to be worth a
    collective.
    """
    for child in module.children():
        entries = (
            list(child.children()) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else []
        )
        if len({type(entry) for entry in entries}) == 1 and all(
            _is_composite(entry) for entry in entries
        ):
            yield from entries
        else:
            yield from _blocks(child)


def _is_composite(module: nn.Module) -> bool:
    return (
        sum(
            1 for part in module.modules() if next(part.parameters(recurse=False), None) is not None
        )
        > 1
    )


def _check_model(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], mesh: Any, fsdp2: type
) -> None:
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if isinstance(module, fsdp2):
            raise ValueError(
                f"{where} was given to fully_shard before: build the optimizer on its parameters, "
                "optimizer_class(model.named_parameters(), ...)"
            )
        if type(module).__name__ in ("FullyShardedDataParallel", "DistributedDataParallel"):
            raise ValueError(
                f"{where} is wrapped in {type(module).__name__}: give pylo_dist.shard the model "
                "without it"
            )
    for fqn, param in named:
        if not param.is_meta and param.requires_grad:
            check_param(fqn, param)
        if is_dtensor(param) and mesh is None:
            raise ValueError(
                f"{fqn!r} is a DTensor already (tensor parallelism): name the data-parallel ranks, "
                'pylo_dist.shard(..., mesh=mesh["dp"])'
            )
    if not any(param.requires_grad for _, param in named):
        raise ValueError("the model has no trainable parameter (requires_grad=True) to optimize")


def _check_mesh(mesh: Any) -> None:
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}: wanted 1 (sharded) or 2 "
            "(copies, sharded); of a larger mesh pass the data-parallel part, such as "
            'mesh["dp_replicate", "dp_shard"]'
        )
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise ValueError(
            'a 2-D mesh needs names: init_device_mesh(..., mesh_dim_names=("replicate", "shard"))'
        )
    parallel = [
        name for name in mesh.mesh_dim_names or () if name.lower() in (*TENSOR_PARALLEL, "pp")
    ]
    if parallel:
        raise ValueError(
            f"the mesh has the dimension {parallel[0]!r}: pylo_dist.shard takes the data-parallel "
            'part of a mesh, such as mesh["dp"]; apply parallelize_module first'
        )


def _specs(model: nn.Module, units: Sequence[nn.Module]) -> Iterator[str]:
    """What must be alike on all ranks before one of them sends: units, parameters and buffers."""
    names = {module: name for name, module in model.named_modules()}
    for unit in units:
        yield f"the unit {names[unit]!r}"
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            local = list(local_tensor(tensor).shape) if is_dtensor(tensor) else "whole"
            yield (
                f"the {kind} {name!r}: {list(tensor.shape)}, {local}, {tensor.dtype}"
                f"{', on the meta device' if tensor.is_meta else ''}"
                f"{', frozen' if kind == 'parameter' and not tensor.requires_grad else ''}"
            )


def _give_to_all(tensor: Tensor, device: torch.device, group: Any) -> None:
    """tensor <- that of the first rank (modified in place), wherever it lies."""
    if comm.size(group) == 1 or not tensor.numel():
        return
    carried = tensor.to(device).contiguous()
    comm.broadcast(carried, 0, group)
    if carried is not tensor:
        tensor.copy_(carried)


def _meta_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with tensors on the meta device. Raises ValueError for one that cannot be
    initialised.
    """
    found = []
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        on_meta = [key for key, tensor in own if tensor.is_meta]
        if not on_meta:
            continue
        if not callable(getattr(module, "reset_parameters", None)):
            raise ValueError(
                f"{f'{name}.{on_meta[0]}' if name else on_meta[0]!r} is on the meta device, and "
                f"{type(module).__name__} has no reset_parameters() to initialise it: add one, or "
                "build the model on a real device"
            )
        found.append((name, module))
    return found


@torch.no_grad()
def _initialise(modules: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
    """Draw the parameters of these modules as one process would, one module at a time whole, and
    keep this rank's part.
    """
    done: dict[int, bool] = {}
    names: dict[int, str] = {}
    for name, module in modules:
        sharded = dict(module.named_parameters(recurse=False))
        drawn = {}
        for key, param in sharded.items():
            full = torch.full(param.shape, float("nan"), dtype=param.dtype, device=device)
            drawn[key] = nn.Parameter(full, requires_grad=param.requires_grad)
            module._parameters[key] = drawn[key]
        buffers = [
            (key, b) for key, b in module.named_buffers(recurse=False) if b.is_floating_point()
        ]
        for _, buffer in buffers:
            buffer.fill_(float("nan"))
        try:
            module.reset_parameters()  # type: ignore[operator]
        finally:
            module._parameters.update(sharded)
        for key, param in sharded.items():
            names.setdefault(id(param), f"{name}.{key}" if name else key)
            if not bool(drawn[key].isnan().any()):
                own = (
                    shard_of(key, param)
                    if is_dtensor(param)
                    else TensorShard.whole(key, tuple(param.shape))
                )
                local = local_tensor(param)
                local.copy_(own.take(drawn[key]).view(local.shape))
                done[id(param)] = True
        for key, buffer in buffers:
            names[id(buffer)] = f"{name}.{key}" if name else key
            done[id(buffer)] = not bool(buffer.isnan().any())
    left = [fqn for key, fqn in names.items() if not done.get(key)]
    if left:
        raise ValueError(
            f"reset_parameters() left {left[0]!r} without values: build the model on a real device"
        )


@contextmanager
def _random_state_of_first_rank(device: torch.device, group: Any) -> Iterator[None]:
    """Every rank draws what the first would; afterwards each goes on from where it was."""
    on_host = device.type == "cpu"
    here = [] if on_host else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(here, device_type="cuda" if on_host else device.type):
        state = torch.get_rng_state()
        _give_to_all(state, device, group)
        torch.set_rng_state(state)
        if not on_host:
            module = torch.get_device_module(device)
            state = module.get_rng_state()
            _give_to_all(state, device, group)
            module.set_rng_state(state)
        yield
