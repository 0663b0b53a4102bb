"""Building optimizers over DTensors: the ranks meet, and an error of one reaches those that wait
for it. Looks at parameters; changes none.

A constructor compares the ranks of a mesh group by group. A rank that fails before (weights that
only it lacks, a parameter that cannot be served) says so to those that would wait. A rank without a
DTensor compares nothing; it learns in its first steps that others wait for it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding
from ..core.scalars import as_python, with_python_numbers
from . import fsdp1
from .describe import domain_of
from .dtensor import check_domain
from .flat import opened
from .plain import is_dtensor

LOOKS = 10  # steps in which whole parameters ask whether others wait for DTensors
_TOLD = "_pylo_dist_told"  # on an exception: the ranks that wait know of it
_UNORDERED = (set, frozenset, WeakSet)
Groups = list[list[Any]]
T = TypeVar("T")


class Announced(ABCMeta):
    """A class whose instances are built on all ranks, or on none.

    An instance knows as `given` what it is built with, by name, without the parameters: its
    constructor already, and adapters that build it anew over pieces of these.
    """

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the constructor, for `help` and all who ask which arguments there are."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("params")
        params = _as_lists(given)  # looked at here, and again by the constructor
        args, kwargs = tuple(map(as_python, args)), with_python_numbers(kwargs)
        with _failures_told(lambda: _groups_of(params)):
            check_ordered(params)
            params = _opened(params)
            if args:
                args = (params, *args[1:])
            elif "params" in kwargs:
                kwargs["params"] = params
            named = {**dict(zip(cls.__signature__.parameters, args, strict=False)), **kwargs}
            new: Any = cls.__new__
            made = new(cls, *args, **kwargs)
            made.given = {key: value for key, value in named.items() if key != "params"}
            made.__init__(*args, **kwargs)
        return made


def announced(
    add_param_group: Callable[[Any, dict[str, Any]], None],
) -> Callable[[Any, dict[str, Any]], None]:
    """`add_param_group` of an optimizer, whose failure on one rank is told to the others."""

    @functools.wraps(add_param_group)
    def wrapped(optimizer: Any, param_group: dict[str, Any]) -> None:
        group = _as_lists([param_group])[0]
        if isinstance(group, dict):
            group = with_python_numbers(group)
        known = [param for other in optimizer.param_groups for param in other["params"]]
        with _failures_told(
            lambda: [known + [param for new in _groups_of([group]) for param in new]]
        ):
            check_ordered([group], len(optimizer.param_groups))
            others = [other for other in optimizer.param_groups if other["params"]]
            group = opened([group], all("param_names" in other for other in others))[0]
            add_param_group(optimizer, group)

    return wrapped


def check_ordered(params: Any, first: int = 0) -> None:
    """Raise TypeError for parameters or groups in a set, whose order is another in every process:
    numbers, names and places of parameters follow from it.

    Args:
        params: as a user gives them; a group alone in a list.
        first: the number of the first group.
    """
    if isinstance(params, _UNORDERED):
        raise TypeError(
            f"the parameters are in a {type(params).__name__}, whose order is another in every "
            "process and run: give them in a list, in the model's order"
        )
    for i, entry in enumerate(params, first) if isinstance(params, (list, tuple)) else ():
        if isinstance(entry, dict) and isinstance(entry.get("params"), _UNORDERED):
            raise TypeError(
                f'the "params" of group {i} are in a {type(entry["params"]).__name__}, whose order '
                "is another in every process and run: give them in a list, in the model's order"
            )


def meet(named: Sequence[tuple[str, Any]], kind: str) -> None:
    """Wait for the ranks that hold parts of these parameters, all those of an optimizer of this
    kind so far.

    Raises:
        ValueError: what keeps one of them from building the same.
        CommunicationError: one did not come in time.
    """
    params = [param for _, param in named]
    sharded = [(fqn, param) for fqn, param in named if is_dtensor(param)]
    try:
        check_domain(sharded)
    except ValueError as error:  # nobody can say who waits
        for ranks in {domain_of(params), tuple(range(comm.size(comm.default_group())))}:
            comm.decline(ranks, error)
        setattr(error, _TOLD, True)
        raise
    for ranks in _domains([params]):
        entries = [kind, *([fqn, list(param.shape)] for fqn, param in named)]
        comm.meet(ranks, f"the construction of {kind}", entries, _patience(params))


def built_on_all(build: Callable[[], T], params: Sequence[Any]) -> T:
    """What a callable of the user makes of these parameters, as an optimizer of ours or another
    one; what it raises on one rank is raised on all.

    Raises:
        PeerError: another rank could not build; what else `build` raises, on this rank.
        CommunicationError: one did not come in time.
    """
    ranks = domain_of(params)
    if len(ranks) < 2:
        return build()
    try:
        made = build()
        # those of another kind have not met
        comm.meet(ranks, "the construction of an optimizer", [], _patience(params))
    except comm.Declined as error:
        raise comm.PeerError(str(error)) from None
    except comm.CommunicationError:
        raise
    except Exception as error:
        if not hasattr(error, _TOLD):
            comm.decline(ranks, error)
        raise
    return made


def _patience(params: Sequence[Any]) -> float:
    """Seconds to wait for the ranks that hold parts of these parameters."""
    mesh = next((param.device_mesh for param in params if is_dtensor(param)), None)
    if mesh is None:
        return comm.timeout_of(comm.default_group(), params[0].device)
    device = torch.device(mesh.device_type)
    return max(comm.timeout_of(mesh.get_group(axis), device) for axis in range(mesh.ndim))


def check_alone(bindings: Mapping[Tensor, ShardBinding], kind: str) -> None:
    """Raise ValueError if other ranks wait for this one to build what it has built, but of
    sharded tensors.

    Asks the store, no rank: cheap, for the first steps of whole parameters.
    """
    if comm.size(comm.default_group()) == 1 or any(map(is_dtensor, bindings)):
        return
    if any(binding.holders is not None for binding in bindings.values()):
        return
    world = comm.default_group()
    waiting = comm.awaited_by(comm.timeout_of(world, torch.device(comm.device_type())))
    if waiting is None:
        return
    who, ranks, theirs = waiting
    mine = [
        kind,
        *([binding.shard.fqn, list(binding.shard.shape)] for binding in bindings.values()),
    ]
    if theirs != mine[: len(theirs)]:
        return
    error = ValueError(
        f"{mine[1][0]!r} and all other parameters are whole tensors here, on rank {who} of the "
        f"same {kind} they are sharded: shard the model alike on all ranks; an optimizer of this "
        "rank alone takes process_group=False"
    )
    comm.decline(ranks, error)
    raise error


@contextmanager
def _failures_told(groups: Callable[[], Groups]) -> Iterator[None]:
    """Around code that meets the ranks of these groups of parameters, one after the other, each
    time with all groups before.
    """
    if comm.size(comm.default_group()) == 1:
        yield
        return
    before = comm.meetings()
    try:
        # wrapped models that nobody keeps are collected on one rank sooner than on another
        held = fsdp1.units_of(filter(fsdp1.is_held, itertools.chain(*groups())))
        yield
        del held
    except Exception as error:
        if not hasattr(error, _TOLD):
            for ranks in _would_meet(groups)[comm.meetings() - before :][:1]:
                comm.decline(ranks, error)
            setattr(error, _TOLD, True)
        raise


def _would_meet(groups: Callable[[], Groups]) -> list[tuple[int, ...]]:
    try:
        return _domains(groups())
    except ValueError:  # nobody can say who waits
        return [tuple(range(comm.size(comm.default_group())))]


def _domains(groups: Groups) -> list[tuple[int, ...]]:
    """Whom a constructor meets, in order."""
    met, so_far = [], []
    for group in groups:
        so_far += group
        ranks = domain_of(so_far)
        if len(ranks) > 1:
            met.append(ranks)
    return met


def _as_lists(params: Any) -> Any:
    """The same parameters or groups: lists in place of what can be looked at only once, and names
    as the model has them that FSDP1 wraps.
    """
    if isinstance(params, Iterator):
        params = list(params)
    if not isinstance(params, (list, tuple)):
        return params
    return type(params)(
        [
            {**entry, "params": _as_lists(entry["params"])}
            if isinstance(entry, dict) and "params" in entry
            else _unwrapped(entry)
            for entry in params
        ]
    )


def _opened(params: Any) -> Any:
    """All parameters or groups of a constructor, as `opened`."""
    if not isinstance(params, (list, tuple)):
        return params
    if any(isinstance(entry, dict) for entry in params):
        return opened(params, True)
    return opened([params], True)[0]


def _unwrapped(entry: Any) -> Any:
    """A parameter, its name without what FSDP1 puts before it."""
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        name, param = entry
        return (fsdp1.bare(name), param) if fsdp1.PREFIX in name else entry
    return entry


def _groups_of(params: Any) -> Groups:
    """The parameters of each group, of whatever a user may give."""
    if not isinstance(params, Iterable) or isinstance(params, Tensor):
        return []
    entries = list(params)
    if not any(isinstance(entry, dict) for entry in entries):
        return [
            [
                entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
                for entry in entries
            ]
        ]
    return [
        group
        for entry in entries
        if isinstance(entry, dict)
        for group in _groups_of(_listed(entry.get("params")))
    ]


def _listed(params: Any) -> Any:
    return [params] if isinstance(params, Tensor) else params
