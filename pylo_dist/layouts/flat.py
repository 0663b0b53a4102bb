"""FSDP1 with `use_orig_params=False`: a module's parameters are flat ones, each of which stands for
many tensors. A learned optimizer takes one piece per original parameter in their place. Writes the
gradients of flat parameters where those of pieces are set.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import check_reader
from . import fsdp1

_caller = sys._getframe


class FlatPiece(torch.nn.Parameter):
    """This rank's elements of one original parameter: 1-D, or of its shape where its unit is not
    sharded. A view of the flat parameter's memory (see `follow`).

    Its gradient is that part of the flat parameter's, and it is trainable if that is. A gradient of
    None is remembered until the next pass, and those of all pieces are the flat parameter's own.
    """

    _fsdp_flattened = True  # as torch marks parameters that a unit holds, and Lightning looks for
    _shared: _Shared
    _place: int
    _begin: int
    _shape: tuple[int, ...]

    @staticmethod
    def __new__(cls, shared: _Shared, place: int, begin: int, shape: tuple[int, ...]) -> FlatPiece:
        local = _part(fsdp1.local_of(shared.flat), begin, shape)
        piece: FlatPiece = super().__new__(cls, local, False)
        piece._shared, piece._place, piece._begin, piece._shape = shared, place, begin, shape
        return piece

    @property
    def grad(self) -> Tensor | None:
        check_reader(self, _caller(1).f_code)
        return self._shared.gradient(self)

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        self._shared.set_gradient(self, grad)

    @grad.deleter
    def grad(self) -> None:
        self._shared.set_gradient(self, None)

    @property
    def requires_grad(self) -> bool:
        return self._shared.flat.requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self._shared.flat.requires_grad = requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> FlatPiece:
        self.requires_grad = requires_grad
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        # torch's set_optimizer_state_dict, which looks for the model's own, ends in a KeyError
        return (
            f"FlatPiece({tuple(self.shape)} of a flat parameter; load states with FullyShardedData"
            "Parallel.optim_state_dict_to_load and load_state_dict, or pylo_dist.checkpoint)"
        )

    def __deepcopy__(self, memo: object) -> FlatPiece:
        raise TypeError(
            "a piece of a flat parameter of FullyShardedDataParallel has no copy of its own: build "
            "an optimizer on the parameters of the other model"
        )

    def part_of(self, flat: Tensor) -> Tensor:
        """The view of this piece's elements in a tensor that lies as the flat parameter does."""
        return _part(flat, self._begin, self._shape)


class _Shared:
    """What the pieces of one flat parameter have in common.

    Attributes:
        flat: the flat parameter.
        pieces: how many there are.
    """

    def __init__(self, flat: Tensor, pieces: int) -> None:
        self.flat, self.pieces = flat, pieces
        self._without: set[int] = set()  # pieces whose gradient was taken away
        self._seen: Any = None  # weakly, the gradient of which it was

    def gradient(self, piece: FlatPiece) -> Tensor | None:
        grad = fsdp1.reduced_of(self.flat)
        if grad is None:
            return None
        mine = piece.part_of(grad)
        if self._without:
            if self._seen() is not grad:  # there was a pass since
                self._without.clear()
            elif piece._place in self._without:
                if not bool(mine.any()):
                    return None
                self._without.discard(piece._place)  # a pass has added to it
        return mine

    def set_gradient(self, piece: FlatPiece, grad: Tensor | None) -> None:
        mine = self.gradient(piece)
        if grad is None:
            if mine is not None:
                mine.zero_()
                self._leave_out([piece._place])
            return
        if tuple(grad.shape) != piece._shape or grad.device != piece.device:
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} on {grad.device} for a piece of a flat "
                f"parameter: wanted shape {piece._shape} on {piece.device}"
            )
        if mine is None:
            if fsdp1.reduced_of(self.flat) is None:
                self.flat.grad = torch.zeros_like(fsdp1.local_of(self.flat))
                self._without.clear()
                self._leave_out(place for place in range(self.pieces) if place != piece._place)
            self._without.discard(piece._place)
            mine = piece.part_of(self.flat.grad)  # type: ignore[arg-type]
        if mine.data_ptr() != grad.data_ptr():
            mine.copy_(grad)

    def _leave_out(self, places: Iterable[int]) -> None:
        grad = self.flat.grad
        assert grad is not None
        if self._seen is None or self._seen() is not grad:
            self._without.clear()
            self._seen = weakref.ref(grad)
        self._without.update(places)
        if len(self._without) == self.pieces:
            self.flat.grad = None
            self._without.clear()


def _part(flat: Tensor, begin: int, shape: tuple[int, ...]) -> Tensor:
    return flat.narrow(0, begin, torch.Size(shape).numel()).view(shape)


def follow(pieces: Iterable[FlatPiece]) -> None:
    """Make pieces views of their flat parameters again, where those have other memory now (lazy
    initialisation, `model.to`), for a step. Raises ValueError inside of `summon_full_params`, and
    where the gradient is not reduced.
    """
    places: dict[int, tuple[Tensor, int]] = {}
    for piece in pieces:
        flat = piece._shared.flat
        if id(flat) not in places:
            fsdp1.check_in_shards(piece)
            local = fsdp1.local_of(flat).detach()
            if flat.grad is not None:
                unit, place = fsdp1.place_of(piece)
                fsdp1.check_reduced(fsdp1.names_in(unit)[place], flat.grad, local.numel())
            places[id(flat)] = local, local.data_ptr()
        local, address = places[id(flat)]
        where = address + piece._begin * local.element_size()
        if piece.dtype != local.dtype or (piece.numel() and piece.data_ptr() != where):
            piece.data = piece.part_of(local)


# --------------------------------------------------------------- in the place of flat parameters


def pieces_of(flat: Tensor) -> list[tuple[str, FlatPiece]]:
    """A piece per original parameter of a flat one, in the order of that, with names from the
    wrapped module on.

    Raises:
        ValueError: its module is gone, or a parameter lies in a way that cannot be served.
    """
    unit = fsdp1.unit_of(flat)
    names = fsdp1.names_in(unit)
    shared, found = _Shared(flat, len(names)), []
    numel = fsdp1.local_of(flat).numel()
    for place, name in enumerate(names):
        begin, shape = fsdp1.begin_at(unit, place), fsdp1.shape_at(unit, place)
        if fsdp1.is_cut(unit):
            peers, group = fsdp1.shards_at(name, unit, place)
            shard = peers[comm.rank(group)]
            begin += shard.start - comm.rank(group) * numel
            begin, shape = min(max(begin, 0), numel), (shard.numel,)
        else:
            fsdp1.check_order(name, unit, place)
        piece = FlatPiece(shared, place, begin, shape)
        fsdp1.adopt(piece, unit, place)
        found.append((name, piece))
    return found


def opened(groups: Sequence[Any], names: bool) -> list[Any]:
    """The same parameter groups with pieces in the place of flat parameters, in the order in which
    the modules have them; as they are where there is no flat one.

    Args:
        groups: each a dict with a list of parameters or of (name, parameter), or such a list.
        names: give parameters their names in the outermost wrapped module where they have none.
    """
    flats = [param for _, param in map(_pair, _entries(groups)) if fsdp1.is_flat(param)]
    if not flats:
        return list(groups)
    tree = Tree(_outermost(list(map(fsdp1.unit_of, flats))))
    names = names and all(
        name is not None or fsdp1.is_flat(param) or tree.find(param) is not None
        for name, param in map(_pair, _entries(groups))
    )
    return [
        {**group, "params": _opened(group["params"], names, tree)}
        if isinstance(group, dict)
        else _opened(group, names, tree)
        for group in groups
    ]


def _opened(entries: Any, names: bool, tree: Tree) -> list[Any]:
    found: list[tuple[int, Any]] = []
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        name, param = _pair(entry)
        if not fsdp1.is_flat(param):
            place, own = tree.find(param) or (len(tree), "")
            found.append((place, (own, param) if name is None and names else entry))
            continue
        for inner, piece in pieces_of(param):
            place, own = tree.find(piece) or (len(tree), inner)
            if name is not None:
                own = name.removesuffix(fsdp1.FLAT) + inner
            found.append((place, (own, piece) if names or name is not None else piece))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _entries(groups: Sequence[Any]) -> Iterator[Any]:
    for group in groups:
        given = group.get("params") if isinstance(group, dict) else group
        yield from given if isinstance(given, (list, tuple)) else [given]


def _pair(entry: Any) -> tuple[str | None, Any]:
    named = isinstance(entry, tuple) and len(entry) == 2
    return entry if named else (None, entry)


def _outermost(units: Sequence[Any]) -> list[Any]:
    """The outermost wrapped modules around these units."""
    every = [(module, {id(inner) for inner in module.modules()}) for module in fsdp1.wrapped()]
    found: dict[int, Any] = {}
    for unit in units:
        around = [entry for entry in every if id(unit) in entry[1]]
        root = max(around, key=lambda entry: len(entry[1]))[0]
        found[id(root)] = root
    return list(found.values())


class Tree:
    """The parameters of some modules as they were before FSDP1 wrapped them: their order, and their
    names from those modules on.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._found: dict[Any, tuple[int, str]] = {}
        for root in roots:
            held: dict[int, list[tuple[Any, str]]] = {}  # by module, what a unit holds of it
            for module in filter(fsdp1.is_unit, root.modules()):
                for place, (owner, own) in enumerate(fsdp1.modules_in(module)):
                    held.setdefault(id(owner), []).append(((id(module), place), own))
            for path, module in root.named_modules():
                before = fsdp1.bare(path + "." if path else "")
                own_params = [(id(p), own) for own, p in module._parameters.items()]
                for key, own in [*own_params, *held.get(id(module), ())]:
                    self._found.setdefault(key, (len(self._found), before + own))

    def __len__(self) -> int:
        return len(self._found)

    def find(self, param: Any) -> tuple[int, str] | None:
        """The place of a parameter among all and its name, or None."""
        if isinstance(param, FlatPiece):
            unit, place = fsdp1.place_of(param)
            return self._found.get((id(unit), place))
        return self._found.get(id(param))
