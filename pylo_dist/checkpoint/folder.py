"""Checkpoints: folders with checksums that are published last. Writes the folder it is given, and
what it loads into.

A folder is written by torch.distributed.checkpoint, so any layout on any number of ranks loads what
any other saved.

    folder/                  while it is written: .folder.partial/, renamed in one step when everything is on the disk
        __0_0.distcp ...     torch.distributed.checkpoint's files
        .metadata            its index, a pickle of torch's: unpickled only after its checksum matched
        manifest.json        size and sha256 of every file, what the caller noted, and a sha256 over the manifest itself
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from torch import Tensor, nn

from .. import comm
from .._version import __version__
from ..layouts.plain import is_dtensor
from ..optimizer import LearnedOptimizer
from ..optimizer.sharded_state import MASTER, wrap_element

Folder = Union[str, "os.PathLike[str]"]
T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; that of the state is in its parameter groups


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that may not be loaded; the message names the file or
    the key.
    """


def save(
    folder: Folder,
    state: Mapping[str, Any],
    *,
    meta: Mapping[str, Any] | None = None,
    process_group: Any = None,
) -> None:
    """Write `state` to a new folder: aside, with checksums, published last. All ranks call it
    alike.

    A reader sees the whole folder or none of it: what a killed run leaves behind has another name
    (`.{name}.partial`, cleared by the next save of the same name). Returns on every rank when the
    folder is there.

    Args:
        folder: must not exist; on a file system that all ranks share.
        state: by key, a model, optimizer or scheduler (anything with `state_dict` and
            `load_state_dict`), or nested dicts of tensors, numbers and strings. DDP and
            torch.compile wrappers are taken off, so that names do not depend on them. What differs
            between ranks needs a key of its own on each rank, e.g. {"rng": {str(rank): ...}}.
        meta: kept in the manifest as JSON, e.g. {"step": 100}; rank 0's counts.
        process_group: the ranks that take part; None: the world, or this process alone without
            torch.distributed.

    Raises:
        CheckpointError: the folder exists, or some rank could not write its part; raised on all
            ranks, nothing is published.
    """
    group, folder = _group(process_group), Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    first = comm.rank(group) == 0

    def prepare() -> dict[str, Any]:
        if first:
            if folder.exists():
                raise CheckpointError(
                    f"{folder} exists already; a checkpoint is written once, choose another name"
                )
            json.dumps(dict(meta or {}))
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return {key: _state_of(value) for key, value in state.items()}

    def write() -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save as write_shards

        with _as_checkpoint_error():
            writer = FileSystemWriter(partial)
            write_shards(
                states,
                storage_writer=writer,
                process_group=process_group or None,
                no_dist=group is None,
            )

    def publish() -> None:
        if not first:
            return
        files = {name: entry for part in parts for name, entry in part.items()}
        if lost := {path.name for path in partial.iterdir()} ^ set(files):
            raise CheckpointError(
                f"{partial}: files came or went while they were written: {sorted(lost)}"
            )
        content = {
            "format": FORMAT,
            "pylo_dist": __version__,
            "torch": torch.__version__,
            "ranks": comm.size(group),
            "meta": dict(meta or {}),
            "files": files,
        }
        with (partial / MANIFEST).open("w") as file:
            json.dump({**content, "sha256": _digest_of(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)

    states = _alike(group, prepare)
    _alike(group, write)
    # every rank reads back a share of all files, whoever wrote them
    parts = comm.gather_objects(
        _alike(
            group, lambda: _hash_share(sorted(p.name for p in partial.iterdir()), partial, group)
        ),
        group,
    )
    _alike(group, publish)


def load(
    folder: Folder,
    state: Mapping[str, Any],
    *,
    optional: Sequence[str] = (),
    process_group: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load what `save` wrote, on any number of ranks and any layout. All ranks call it alike.

    First every checksum is verified, then keys, shapes and dtypes are compared, then all is read
    aside, and each optimizer checks what it would load; only then does anything change.

    Args:
        folder: a published checkpoint.
        state: as for `save`: objects are loaded through their `load_state_dict`; nested dicts are
            the template of what is read (their tensors say shape, dtype and device; they are not
            written).
        optional: keys of `state` of which entries may be missing in the checkpoint, e.g. ("rng",)
            on another number of ranks; such entries are left out of the result.

    Returns:
        The loaded entries of those keys of `state` that are no objects, and the `meta` of `save`.

    Raises:
        CheckpointError: a file that is missing, truncated or changed, by name; a key that is
            missing or does not fit, by name; on all ranks. Nothing has been changed then.
        ValueError: what the load_state_dict of an optimizer refuses (another model, rule, weights
            or format), on all ranks.
    """
    group, folder = _group(process_group), Path(folder)
    meta = verify(folder, process_group=process_group)

    def template() -> dict[str, Any]:
        index = _Index(folder)
        own.update({key: _state_of(value) for key, value in state.items()})
        aside = {key: _aside(value) for key, value in own.items()}
        for key, value in state.items():
            if isinstance(value, torch.optim.Optimizer):
                aside[key] = index.optimizer_template(key, value, aside[key])
            elif _is_stateful(value) and not isinstance(value, nn.Module):
                # a scheduler's numbers may have become tensors
                aside[key] = index.as_saved((key,), aside[key])
        index.check(aside, optional, [key for key, value in state.items() if _is_stateful(value)])
        return aside

    def read() -> None:
        _read(folder, loaded, process_group, no_dist=group is None)

    def check() -> None:
        for key, value in state.items():
            if hasattr(value, "check_state_dict"):
                value.check_state_dict(loaded[key])

    own: dict[str, Any] = {}
    loaded = _alike(group, template)
    _alike(group, read)
    loaded = {key: _with_keys_of(own[key], loaded[key]) for key in state}
    _alike(group, check)
    for key, value in state.items():
        if _is_stateful(value):
            _unwrapped(value).load_state_dict(loaded[key])
    return {key: loaded[key] for key, value in state.items() if not _is_stateful(value)}, meta


def verify(folder: Folder, *, process_group: Any = None) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest, without torch reading any of them;
    return its `meta`.

    The ranks of the process group share the work; call it alike on all of them.

    Raises:
        CheckpointError: as `load`.
    """
    group, folder = _group(process_group), Path(folder)

    def check() -> dict[str, Any]:
        content = _manifest(folder)
        files: dict[str, Any] = content["files"]
        for name, found in _hash_share(sorted(files), folder, group).items():
            if found["bytes"] != files[name]["bytes"]:
                raise CheckpointError(
                    f"{folder / name}: {found['bytes']} bytes, wanted {files[name]['bytes']}; it "
                    "is truncated or was changed"
                )
            if found["sha256"] != files[name]["sha256"]:
                raise CheckpointError(
                    f"{folder / name}: its sha256 is not that of the manifest; the file was "
                    "changed or is damaged"
                )
        meta: dict[str, Any] = content["meta"]
        return meta

    return _alike(group, check)


def read_meta(folder: Folder) -> dict[str, Any]:
    """The `meta` of a published checkpoint, checked against the manifest's own checksum alone;
    `load` verifies the files.

    Raises:
        CheckpointError: no manifest, or a damaged one.
    """
    meta: dict[str, Any] = _manifest(Path(folder))["meta"]
    return meta


def published(parent: Folder) -> list[Path]:
    """The published checkpoints in `parent`, sorted by name ("step-000100" < "step-000200"); []
    where there is none.

    Looks for manifests only; `load` verifies.
    """
    return sorted(
        path.parent
        for path in Path(parent).glob(f"*/{MANIFEST}")
        if not path.parent.name.startswith(".")
    )


# -------------------------------------------------------------------------------------------- ranks


def _group(process_group: Any) -> Any:
    group = comm.default_group() if process_group is None else (process_group or None)
    return group if comm.size(group) > 1 else None


def _alike(group: Any, action: Callable[[], T]) -> T:
    """Run `action` on every rank; where it fails on one, all raise, so that none waits for it in a
    later collective.
    """

    def act() -> T:
        try:
            return action()
        except OSError as error:
            raise CheckpointError(f"{error}") from error

    return comm.together(act, group, CheckpointError)


@contextlib.contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    """torch's CheckpointException is no Exception; and it warns about a single process, which is no
    mistake here.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


# -------------------------------------------------------------------------------------------- files


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is no published checkpoint") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); the file was changed or is damaged"
        ) from None
    if claimed != _digest_of(content):
        raise CheckpointError(
            f"{path}: its sha256 is not the one in it; the file was changed or is damaged"
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {content['format']}, wanted {FORMAT}; it is of pylo_dist "
            f"{content['pylo_dist']}"
        )
    return content


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_share(names: Sequence[str], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
    """Size and sha256 of this rank's share of the files."""
    return {name: _hash(folder / name) for name in names[comm.rank(group) :: comm.size(group)]}


def _hash(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
            return {"bytes": file.tell(), "sha256": digest.hexdigest()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, but the manifest names it") from None


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------- states


def _is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _unwrapped(value: Any) -> Any:
    """A model without the wrappers that change the names of its parameters."""
    while isinstance(value, nn.Module):
        inner = (
            value.module
            if isinstance(value, nn.parallel.DistributedDataParallel)
            else getattr(value, "_orig_mod", None)
        )
        if inner is None:
            break
        value = inner
    return value


def _state_of(value: Any) -> Any:
    return _unwrapped(value).state_dict() if _is_stateful(value) else value


def _aside(value: Any) -> Any:
    """The same nested containers with new tensors, which are not filled."""
    if isinstance(value, Tensor):
        return (
            torch.empty_like(value.detach())
            if is_dtensor(value)
            else value.detach().new_empty(value.shape)
        )
    if isinstance(value, Mapping):
        return {key: _aside(entry) for key, entry in value.items()}
    return [_aside(entry) for entry in value] if isinstance(value, list) else value


def _read(folder: Path, into: dict[str, Any], process_group: Any, no_dist: bool) -> None:
    """Read what `into` has keys for (modified in place)."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as read_shards

    with _as_checkpoint_error():
        read_shards(
            into,
            storage_reader=FileSystemReader(folder),
            process_group=process_group or None,
            no_dist=no_dist,
        )


class _Index:
    """What a verified checkpoint holds, by key.

    Attributes:
        entries: torch's metadata of every flat key: of tensors their `size` and `properties.dtype`,
        of other things nothing. paths: the path of every flat key through dicts (strings) and lists
        (numbers).
    """

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        metadata = FileSystemReader(folder).read_metadata()
        self.folder = folder
        self.entries: dict[str, Any] = metadata.state_dict_metadata
        self.paths: dict[str, tuple[Any, ...]] = metadata.planner_data

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
                if found != (tuple(value.shape), value.dtype):
                    raise CheckpointError(
                        f"{self.folder}: {key!r} is {found[1]} of shape {found[0]}, wanted "
                        f"{value.dtype} of {tuple(value.shape)}"
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
        self, key: str, optimizer: torch.optim.Optimizer, own: dict[str, Any]
    ) -> dict[str, Any]:
        """What to read for an optimizer: its groups as they were saved, and its state.

        State that was saved of parameters that have none here is made as it was saved: torch's
        optimizers make theirs in the first step, and frozen parameters have none.

        Raises:
            ValueError: groups that do not fit.
        """
        groups: list[dict[str, Any]] = self.as_saved((key, "param_groups"), own["param_groups"])
        _read(self.folder, {key: {"param_groups": groups}}, None, no_dist=True)
        learned = getattr(optimizer, "inner", optimizer)
        if isinstance(learned, LearnedOptimizer):
            learned.check_groups(groups)
        sizes, wanted = (
            [len(group["params"]) for group in g] for g in (groups, optimizer.param_groups)
        )
        if sizes != wanted:
            raise ValueError(
                f"{self.folder} holds groups of {sizes} parameters, the optimizer groups of "
                f"{wanted}"
            )
        if not isinstance(learned, LearnedOptimizer):
            flags = (None, False)  # what newer versions of torch add
            needed = [
                name
                for name, value in optimizer.defaults.items()
                if not any(value is flag for flag in flags)
            ]
            for i, group in enumerate(groups):
                if "state_rule" in group or (
                    lost := [name for name in needed if name not in group]
                ):
                    what = (
                        f"state_rule {group['state_rule']!r}"
                        if "state_rule" in group
                        else f"no {lost[0]!r}"
                    )
                    raise ValueError(
                        f"{self.folder}: group {i} of {key!r} has {what}; was it saved by another "
                        "optimizer?"
                    )
        state = {i: dict(entries) for i, entries in own["state"].items()}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for flat, path in self.paths.items():
            if path[:2] != (key, "state"):
                continue
            i, name = int(path[2]), path[3]
            if isinstance(learned, LearnedOptimizer):
                if i not in state:
                    state[i] = learned.state_template(params[i])
            elif name not in state.get(i, {}) and name != MASTER:
                entry = self._empty(flat)
                state.setdefault(i, {})[name] = (
                    wrap_element(name, entry, params[i]) if isinstance(entry, Tensor) else entry
                )
        return {"state": state, "param_groups": groups}

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


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _with_keys_of(own: Any, read: Any) -> Any:
    """What was read, its keys as in `own`: torch.distributed.checkpoint makes strings of numbers."""
    if isinstance(read, list):
        pairs = own if isinstance(own, list) and len(own) == len(read) else [None] * len(read)
        return [_with_keys_of(mine, entry) for mine, entry in zip(pairs, read, strict=True)]
    if not isinstance(read, Mapping):
        return read
    mine = own if isinstance(own, Mapping) else {}
    numbers = bool(mine) and all(isinstance(key, int) for key in mine)
    keyed: dict[Any, Any] = {}
    for key, entry in read.items():
        as_own = int(key) if numbers and str(key).lstrip("-").isdigit() else key
        entry = _with_keys_of(mine.get(as_own), entry)
        keyed[as_own] = (
            {**keyed[as_own], **entry} if isinstance(entry, dict) and as_own in keyed else entry
        )
    return keyed


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
