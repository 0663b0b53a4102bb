"""Trees of states: what a checkpoint holds by key, beside what is to be loaded into. Reads no file;
makes new trees, and tensors to be read into.

A tree is nested dicts and lists; a leaf has a key of its own in a checkpoint, and the path to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts.plain import is_dtensor, mark_part, part_of
from ..optimizer import LearnedOptimizer
from ..optimizer.loading import check_names, matched_groups
from ..optimizer.sharded_state import MASTER, given, wrap_element
from .flat_model import FlatModel

KEPT = {torch.float32, torch.bfloat16}  # what state is kept in, and loads into each other


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that may not be loaded; the message names the file or
    the key.
    """


def is_stateful(value: Any) -> bool:
    """Whether this is loaded through a method of its own: a model, optimizer or scheduler."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def unwrapped(value: Any) -> Any:
    """A model without the wrappers that change the names of its parameters."""
    while isinstance(value, nn.Module):
        inner = (
            value.module
            if isinstance(value, nn.parallel.DistributedDataParallel)
            else getattr(value, "_orig_mod", None)
        )
        if inner is None:
            return FlatModel.of(value)
        value = inner
    return value


def state_of(value: Any) -> Any:
    """What is saved of an entry; nested dicts are it themselves.

    Raises:
        CheckpointError: an optimizer of parameters that are parts of tensors, of whose state
            nothing says so.
    """
    if not is_stateful(value):
        return value
    if isinstance(value, torch.optim.Optimizer) and not _is_ours(value):  # which refuse parts
        _check_whole(value)
    value = unwrapped(value)
    state = value.state_dict()
    if isinstance(value, nn.Module):  # which takes its tensors' attributes off
        own = [
            *value.named_parameters(remove_duplicate=False),
            *value.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in own:
            if isinstance(state.get(name), Tensor):
                mark_part(state[name], tensor)
    return state


def _is_ours(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, LearnedOptimizer) or hasattr(optimizer, "inner")


def _check_whole(optimizer: torch.optim.Optimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if part_of(param) not in (None, tuple(param.shape)):
                raise CheckpointError(
                    f"a parameter of shape {tuple(param.shape)} in group {i} of "
                    f"{type(optimizer).__name__} is a part of a tensor of shape {part_of(param)}, "
                    "and its state does not say so: give the tensors of its state, marked as its "
                    "parameters are, in nested dicts"
                )


def aside(value: Any, dtype: torch.dtype | None = None) -> Any:
    """The same nested containers with new tensors, which are not filled; of their own dtypes unless
    one is given.
    """
    if isinstance(value, Tensor):
        if is_dtensor(value):
            return torch.empty_like(value.detach(), dtype=dtype)
        return mark_part(value.detach().new_empty(value.shape, dtype=dtype), value)
    if isinstance(value, Mapping):
        return {key: aside(entry) for key, entry in value.items()}
    return [aside(entry) for entry in value] if isinstance(value, list) else value


def load_into(value: Any, state: dict[str, Any]) -> None:
    """Through `load_state_dict`. Our optimizers keep the tensors of `state`, which are nobody
    else's: no second copy, unless a hook of the user sees them.
    """
    tensors: list[Tensor] = []
    hooks = getattr(unwrapped(value), "_optimizer_load_state_dict_pre_hooks", None)
    if isinstance(value, torch.optim.Optimizer) and _is_ours(value) and not hooks:
        tensors = [entry for _, entry in _leaves(state) if isinstance(entry, Tensor)]
    with given(tensors):
        unwrapped(value).load_state_dict(state)


@dataclass(frozen=True, slots=True)
class Index:
    """What a verified checkpoint holds, by key.

    Attributes:
        folder: for messages.
        entries: torch's metadata of every flat key: of tensors their `size` and `properties.dtype`,
            of other things nothing.
        paths: the path of every flat key through dicts (strings) and lists (numbers).
    """

    folder: Path
    entries: dict[str, Any]
    paths: dict[str, tuple[Any, ...]]

    def check(
        self, template: dict[str, Any], optional: Sequence[str], complete: Sequence[str]
    ) -> None:
        """Compare what is wanted with what is there; entries that may be missing leave the template
        (modified in place).

        Args:
            complete: keys of which the checkpoint may hold nothing else.

        Raises:
            CheckpointError: a key that is missing, unknown, or of another shape or dtype.
        """
        wanted = dict(_leaves(template))
        known = {tuple(map(str, path)): key for key, path in self.paths.items()}
        for path, value in wanted.items():
            key = known.get(tuple(map(str, path)))
            if key is None:
                if path[0] not in optional and path[-1] != MASTER:
                    raise CheckpointError(
                        f"{self.folder} has no {'.'.join(map(str, path))!r}; it is of another "
                        "model or optimizer"
                    )
                _remove(template, path)
                continue
            size: Any = getattr(self.entries[key], "size", None)
            if isinstance(value, Tensor) != (size is not None):
                raise CheckpointError(
                    f"{self.folder}: {key!r} is {'no ' if size is None else 'a '}tensor, wanted "
                    "the other"
                )
            if isinstance(value, Tensor):
                found = (tuple(size), self.entries[key].properties.dtype)
                shape = part_of(value) or tuple(value.shape)
                if found != (shape, value.dtype):
                    raise CheckpointError(
                        f"{self.folder}: {key!r} is {found[1]} of shape {found[0]}, wanted "
                        f"{value.dtype} of {shape}"
                    )
        paths = {tuple(map(str, path)) for path in wanted}
        for path, key in known.items():
            if (
                path[0] in complete
                and path not in paths
                and path[0] not in optional
                and path[-1] != MASTER
            ):
                raise CheckpointError(
                    f"{self.folder} has {key!r}, which is not wanted here; it is of another model "
                    "or optimizer"
                )

    def optimizer_template(
        self,
        key: str,
        optimizer: torch.optim.Optimizer,
        own: dict[str, Any],
        groups: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """What to read for an optimizer: its groups as they were saved, and its state.

        State that was saved of parameters that have none here is made as it was saved: torch's
        optimizers make theirs in the first step, and frozen parameters have none. A learned
        optimizer says itself which groups fit and how its state looks; of torch's, what was saved
        and their defaults tell.

        Args:
            own: its state dict, with tensors to be read into.
            groups: the saved ones.

        Raises:
            ValueError: groups that do not fit.
        """
        state = {i: dict(entries) for i, entries in own["state"].items()}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        inner = getattr(optimizer, "inner", optimizer)
        saved, matched = {i for _, i, _ in self._saved_state(key)}, groups
        if _is_ours(optimizer):
            matched = matched_groups(groups, inner.param_groups, inner.state, saved)
        if isinstance(inner, LearnedOptimizer):
            inner.check_groups(matched)
        else:
            self._check_torch_groups(key, optimizer, matched)
        # a parameter has another number where frozen ones were left out
        keys = [number for group in matched for number in group["params"]]
        state = {keys[i]: entries for i, entries in state.items()}
        if isinstance(inner, LearnedOptimizer):
            for i in saved - state.keys():
                state[i] = inner.state_template(params[keys.index(i)])
            self._as_kept(key, state)
            return {"state": state, "param_groups": groups}
        for flat, i, name in self._saved_state(key):
            if name not in state.get(i, {}) and name != MASTER:
                entry = self._empty(flat)
                state.setdefault(i, {})[name] = (
                    wrap_element(name, entry, params[keys.index(i)])
                    if isinstance(entry, Tensor)
                    else entry
                )
        return {"state": state, "param_groups": groups}

    def _as_kept(self, key: str, state: dict[Any, dict[str, Any]]) -> None:
        """What is to be read of state that a learned optimizer keeps in another dtype than it was
        saved in: it is read as it is, and converted where it is loaded (`state` modified in place).
        """
        for flat, i, name in self._saved_state(key):
            own = state.get(i, {}).get(name)
            saved = getattr(getattr(self.entries[flat], "properties", None), "dtype", None)
            if isinstance(own, Tensor) and {own.dtype, saved} == KEPT:
                state[i][name] = aside(own, saved)

    def _saved_state(self, key: str) -> Iterator[tuple[str, int, Any]]:
        """The key of every state entry of an optimizer, the number of its parameter, its name."""
        for flat, path in self.paths.items():
            if path[:2] == (key, "state"):
                if len(path) < 4 or not str(path[2]).isdecimal():
                    raise CheckpointError(
                        f"{self.folder}: {flat!r} is no state of a parameter that has a number"
                    )
                yield flat, int(path[2]), path[3]

    def _check_torch_groups(
        self, key: str, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]
    ) -> None:
        """Raise ValueError for saved groups that are not of such an optimizer."""
        sizes, wanted = (
            [len(group["params"]) for group in g] for g in (groups, optimizer.param_groups)
        )
        if sizes != wanted:
            raise ValueError(
                f"{self.folder} holds groups of {sizes} parameters, the optimizer groups of "
                f"{wanted}"
            )
        check_names(groups, optimizer.param_groups)
        # None and False are what newer versions of torch add
        needed = [
            name
            for name, value in optimizer.defaults.items()
            if value is not None and value is not False
        ]
        for i, group in enumerate(groups):
            lost = [name for name in needed if name not in group]
            if "state_rule" not in group and not lost:
                continue
            what = (
                f"state_rule {group['state_rule']!r}"
                if "state_rule" in group
                else f"no {lost[0]!r}"
            )
            raise ValueError(
                f"{self.folder}: group {i} of {key!r} has {what}; was it saved by another "
                "optimizer?"
            )

    def as_saved(self, prefix: tuple[str, ...], own: Any) -> Any:
        """What to read for all that was saved under a path; containers that are empty in `own`
        leave no trace in a checkpoint.
        """
        tree: Any = type(own)()
        for flat, path in self.paths.items():
            if path[: len(prefix)] == prefix:
                _put(tree, path[len(prefix) :], self._empty(flat))
        for place, entry in own.items() if isinstance(own, Mapping) else enumerate(own):
            if isinstance(own, list) and isinstance(entry, Mapping) and place < len(tree):
                tree[place].update(
                    {k: v for k, v in entry.items() if _is_empty(v) and k not in tree[place]}
                )
            elif isinstance(own, Mapping) and _is_empty(entry):
                tree.setdefault(place, entry)
        return tree

    def _empty(self, flat: str) -> Any:
        size = getattr(self.entries[flat], "size", None)
        return (
            None if size is None else torch.empty(size, dtype=self.entries[flat].properties.dtype)
        )


def with_keys_of(own: Any, read: Any) -> Any:
    """What was read, its keys as in `own`: torch.distributed.checkpoint makes strings of
    numbers.
    """
    if isinstance(read, list):
        pairs = own if isinstance(own, list) and len(own) == len(read) else [None] * len(read)
        return [with_keys_of(mine, entry) for mine, entry in zip(pairs, read, strict=True)]
    if not isinstance(read, Mapping):
        return read
    mine = own if isinstance(own, Mapping) else {}
    numbers = bool(mine) and all(isinstance(key, int) for key in mine)
    keyed: dict[Any, Any] = {}
    for key, entry in read.items():
        as_own = int(key) if numbers and str(key).lstrip("-").isdigit() else key
        entry = with_keys_of(mine.get(as_own), entry)
        keyed[as_own] = (
            {**keyed[as_own], **entry} if isinstance(entry, dict) and as_own in keyed else entry
        )
    return keyed


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What a checkpoint keeps under a key of its own, with its path: as
    torch.distributed.checkpoint flattens.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, (*path, key))
    elif not _is_leaf(value):
        for i, entry in enumerate(value):
            yield from _leaves(entry, (*path, i))
    else:
        yield path, value


def _is_leaf(value: Any) -> bool:
    """A list is one entry unless there is a tensor or a mapping somewhere in it."""
    if isinstance(value, list):
        return not any(
            isinstance(entry, Tensor)
            or (isinstance(entry, list) and not _is_leaf(entry))
            or isinstance(entry, Mapping)
            for entry in value
        )
    return not isinstance(value, Mapping)


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _remove(tree: Any, path: tuple[Any, ...]) -> None:
    for step in path[:-1]:
        tree = tree[step]
    del tree[path[-1]]


def _put(tree: Any, path: Sequence[Any], value: Any) -> None:
    """tree[path] <- value; mappings and lists on the way are made (modified in place)."""
    for step, following in pairwise(path):
        if isinstance(tree, list):
            tree += [None] * (step + 1 - len(tree))
            tree[step] = (
                ([] if isinstance(following, int) else {}) if tree[step] is None else tree[step]
            )
        else:
            tree.setdefault(step, [] if isinstance(following, int) else {})
        tree = tree[step]
    if isinstance(tree, list):
        tree += [None] * (path[-1] + 1 - len(tree))
    tree[path[-1]] = value
