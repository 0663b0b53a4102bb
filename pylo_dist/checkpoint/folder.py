"""Checkpoints: folders with checksums that are published last. Writes the folder it is given, and
what it loads into.

A folder is written by torch.distributed.checkpoint, so any layout on any number of ranks loads what
any other saved.

    folder/                  while it is written: .folder.partial/, renamed in one step when all
                             is on the disk
        __0_0.distcp ...     torch.distributed.checkpoint's files
        .metadata            its index, a pickle: unpickled only after its checksum matched
        manifest.json        size and sha256 of every file, what the caller noted, and a sha256 over
                             the manifest itself
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from torch import nn

from .. import comm
from .._version import __version__
from . import tree
from .tree import CheckpointError

Folder = Union[str, "os.PathLike[str]"]
T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; that of the state is in its parameter groups


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
        return {key: tree.state_of(value) for key, value in state.items()}

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
        index = _index(folder)
        own.update({key: tree.state_of(value) for key, value in state.items()})
        aside = {key: tree.aside(value) for key, value in own.items()}
        for key, value in state.items():
            if isinstance(value, torch.optim.Optimizer):
                groups = index.as_saved((key, "param_groups"), aside[key]["param_groups"])
                _read(folder, {key: {"param_groups": groups}}, None, no_dist=True)
                aside[key] = index.optimizer_template(key, value, aside[key], groups)
            elif tree.is_stateful(value) and not isinstance(value, nn.Module):
                # a scheduler's numbers may have become tensors
                aside[key] = index.as_saved((key,), aside[key])
        index.check(
            aside, optional, [key for key, value in state.items() if tree.is_stateful(value)]
        )
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
    loaded = {key: tree.with_keys_of(own[key], loaded[key]) for key in state}
    _alike(group, check)
    for key, value in state.items():
        if tree.is_stateful(value):
            tree.unwrapped(value).load_state_dict(loaded[key])
    return {key: loaded[key] for key, value in state.items() if not tree.is_stateful(value)}, meta


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


def _index(folder: Path) -> tree.Index:
    """What a verified checkpoint holds; unpickles its metadata."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    metadata = FileSystemReader(folder).read_metadata()
    return tree.Index(folder, metadata.state_dict_metadata, metadata.planner_data)


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
