"""Checkpoints: folders with checksums that are published last. Writes the folder it is given, and
what it loads into.

A folder is written by torch.distributed.checkpoint, so any layout on any number of ranks loads what
any other saved.

    folder/                  while it is written: .folder.TOKEN.partial/, renamed in one step when
                             all is on the disk; beside it .folder.TOKEN.lock, held by who writes
        __0_0.distcp ...     torch.distributed.checkpoint's files
        .metadata            its index, a pickle, of which nothing is run
        manifest.json        size and digests of every file, what the caller noted, and a sha256
                             over the manifest itself
"""

from __future__ import annotations

import copy
import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from torch import nn

from .. import comm
from ..optimizer.schedules import check_scheduler_state
from . import manifest, tree
from .files import MISSING, Entry, open_regular, verify_file
from .manifest import MANIFEST, Manifest
from .tree import CheckpointError

Folder = Union[str, "os.PathLike[str]"]
T = TypeVar("T")

_LOCK = re.compile(r"(\..+\.[0-9a-f]{32})\.lock")
_EXISTS = "{} exists already; a checkpoint is written once, choose another name"
STRANGER_S = 86400  # seconds after which a lock of another machine is one that was left


@comm.during("the saving of a checkpoint")
def save(
    folder: Folder,
    state: Mapping[str, Any],
    *,
    meta: Mapping[str, Any] | None = None,
    process_group: Any = None,
) -> None:
    """Write `state` to a new folder: aside, with checksums, published last. All ranks call it
    alike.

    A reader sees the whole folder or none of it. Of two saves of one name at once, one publishes
    its folder and the other is refused. What a killed run leaves behind has another name
    (`.{name}.{token}.partial`), which a later save in the same place clears; one that is still
    being written is left alone. Returns on every rank when the folder is there.

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
        CheckpointError: the folder exists, or some rank could not write its part, or something in
            `state` could not be loaded again; raised on all ranks, nothing is published and nothing
            left behind.
    """
    group, folder = _group(process_group), Path(folder)
    first = comm.rank(group) == 0
    aside = _Aside(folder, uuid.uuid4().hex) if first else None

    def prepare() -> tuple[dict[str, Any], str]:
        if aside is not None:
            if os.path.lexists(folder):
                raise CheckpointError(_EXISTS.format(folder))
            manifest.check_meta(meta or {})
            clear(folder.parent)  # first: it may be what fills the disk
            try:
                aside.make()
            except OSError as error:
                raise CheckpointError(
                    f"{folder} was not written: {folder.parent} cannot be written to "
                    f"({error.strerror})"
                ) from error
        states = {key: tree.state_of(value) for key, value in state.items()}
        return states, "" if aside is None else aside.token

    def enter() -> None:
        # it has a new name, which no cache of a file system can hold anything about
        if not partial.is_dir():
            raise CheckpointError(
                f"{partial}, which rank 0 has made, is not there for this rank: {folder.parent} "
                "must be on a file system that all ranks share"
            )

    def publish() -> None:
        if not first:
            return
        files = {name: entry for part in parts for name, entry in part.items()}
        if lost := {path.name for path in partial.iterdir()} ^ set(files):
            raise CheckpointError(
                f"{partial}: files came or went while they were written: {sorted(lost)}"
            )
        manifest.write(partial, files, meta or {}, torch=torch.__version__, ranks=comm.size(group))
        _sync(partial)
        try:
            partial.rename(folder)  # which no folder with something in it gives way to
        except OSError:
            if os.path.lexists(folder):
                raise CheckpointError(_EXISTS.format(folder)) from None
            raise
        _sync(folder.parent)

    try:
        states, token = _alike(group, prepare)
        told = comm.gather_objects((token, manifest.fastest_digests()), group)
        partial = _partial(folder, told[0][0])
        # of the first rank's the first that all of them can take
        digest = next(name for name in told[0][1] if all(name in others for _, others in told))
        _alike(group, enter)
        written = _alike(group, lambda: _write(partial, states, process_group, folder, digest))
        parts = comm.gather_objects(written, group)
        _alike(group, publish)
    finally:  # Ctrl-C too
        if aside is not None:
            aside.close()


@comm.during("the loading of a checkpoint")
def load(
    folder: Folder,
    state: Mapping[str, Any],
    *,
    optional: Sequence[str] = (),
    process_group: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load what `save` wrote, on any number of ranks and any layout. All ranks call it alike.

    First the ranks compare which checkpoint they see, then keys, shapes and dtypes are compared,
    then all is read aside, each block verified as it is read, and each optimizer and scheduler is
    compared with what it would load; only then does anything change. Other objects, of which it is
    not known what they take, load before models and optimizers do; where one raises, on whichever
    rank, all get back the state they had. Nothing in the folder is run: of what is no tensor only
    what torch.load reads with `weights_only` is read.

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
            missing or does not fit, by name; an object that raises in its load_state_dict; ranks
            that see different checkpoints; on all ranks. Nothing has been changed then.
        ValueError: what the load_state_dict of an optimizer refuses (another model, rule, weights
            or format), on all ranks.
    """
    group, folder = _group(process_group), Path(folder)
    found = _agreed(folder, group)
    if found.format == 1:  # its digests are of whole files
        _verify_share(found, group)

    def open_folder() -> Any:
        from .storage import Reader

        for name, entry in _share(found, group).items():
            open_regular(folder / name, MISSING, entry.size).close()
        own.update({key: tree.state_of(value) for key, value in state.items()})
        return Reader(found)

    @_fitting(folder)
    def template() -> dict[str, Any]:
        index = tree.Index(
            folder, reader.metadata.state_dict_metadata, reader.metadata.planner_data
        )
        aside = {key: tree.aside(value) for key, value in own.items()}
        for key, value in state.items():
            if isinstance(value, torch.optim.Optimizer):
                groups = index.as_saved((key, "param_groups"), aside[key]["param_groups"])
                reader.read({key: {"param_groups": groups}}, None, no_dist=True)
                aside[key] = index.optimizer_template(key, value, aside[key], groups)
            elif tree.is_stateful(value) and not isinstance(value, nn.Module):
                # a scheduler's numbers may have become tensors
                aside[key] = index.as_saved((key,), aside[key])
        index.check(
            aside, optional, [key for key, value in state.items() if tree.is_stateful(value)]
        )
        return aside

    def read() -> None:
        reader.read(loaded, process_group, no_dist=group is None)

    @_fitting(folder)
    def check() -> None:
        for key, value in state.items():
            if hasattr(value, "check_state_dict"):
                value.check_state_dict(loaded[key])
            elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
                try:
                    check_scheduler_state(value, own[key], loaded[key])
                except ValueError as error:
                    raise CheckpointError(f"{folder}: {key!r}: {error}") from None

    def load_others() -> None:
        for key, value in state.items():
            if tree.is_stateful(value) and not _is_checked(value):
                before.append((value, copy.deepcopy(own[key])))
                try:
                    value.load_state_dict(loaded[key])
                except Exception as error:
                    raise CheckpointError(
                        f"{folder}: {key!r}: {type(value).__name__}.load_state_dict raised "
                        f"{type(error).__name__}: {error}"
                    ) from error

    own: dict[str, Any] = {}
    reader = _alike(group, open_folder)
    loaded = _alike(group, template)
    _alike(group, read)
    loaded = {key: tree.with_keys_of(own[key], loaded[key]) for key in state}
    _alike(group, check)
    before: list[tuple[Any, Any]] = []
    try:
        _alike(group, load_others)
    except BaseException:
        for value, was in reversed(before):
            with suppress(Exception):  # of one that does not take what it gave, too
                value.load_state_dict(was)
        raise
    for key, value in state.items():
        if tree.is_stateful(value) and _is_checked(value):
            tree.load_into(value, loaded[key])
    return {key: loaded[key] for key, value in state.items() if not tree.is_stateful(value)}, dict(
        found.meta
    )


@comm.during("the verification of a checkpoint")
def verify(folder: Folder, *, process_group: Any = None) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest, without torch reading any of them;
    return its `meta`.

    The ranks of the process group share the work; call it alike on all of them.

    Raises:
        CheckpointError: as `load`.
    """
    group = _group(process_group)
    found = _agreed(Path(folder), group)
    _verify_share(found, group)
    return found.meta


def read_meta(folder: Folder) -> dict[str, Any]:
    """The `meta` of a published checkpoint, checked against the manifest's own checksum alone;
    `load` verifies the files.

    Raises:
        CheckpointError: no manifest, or a damaged one.
    """
    return Manifest.read(Path(folder)).meta


def published(parent: Folder) -> list[Path]:
    """The published checkpoints in `parent`, sorted by name ("step-000100" < "step-000200"); []
    where there is none.

    Looks for manifests only; `load` verifies.

    Raises:
        OSError: a folder that this process may not look into, of which nobody can say.
    """
    if not Path(parent).is_dir():
        return []
    names = [path for path in Path(parent).iterdir() if not path.name.startswith(".")]
    return sorted(path for path in names if (path / MANIFEST).exists())


def clear(parent: Folder) -> None:
    """Delete what killed saves have left in `parent`, as the next `save` there does; what another
    process is still writing stays.
    """
    # whoever writes holds a lock, which ends with the process
    for lock in [path for path in Path(parent).glob(".*.lock") if _LOCK.fullmatch(path.name)]:
        with suppress(OSError):
            handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = os.fstat(handle)
                # locks may hold on one machine alone
                ours = os.read(handle, 256).decode(errors="replace") == _machine()
                if ours or time.time() - found.st_mtime > STRANGER_S:
                    shutil.rmtree(lock.with_suffix(".partial"), ignore_errors=True)
                    lock.unlink()
            finally:
                os.close(handle)


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


def _agreed(folder: Path, group: Any) -> Manifest:
    """The manifest, which is the same on all ranks; or CheckpointError on all of them."""
    found = _alike(group, lambda: Manifest.read(folder))
    seen = comm.gather_objects((found.digest, found.seen()), group)
    for rank, (digest, what) in enumerate(seen):
        if digest != seen[0][0]:
            raise CheckpointError(
                f"{folder}: the ranks see different checkpoints, rank 0 {seen[0][1]}, rank {rank} "
                f"{what}; it must be on a file system that all ranks share, and the same name on "
                "all of them (a cache may show what was there before)"
            )
    return found


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Around comparisons with what is in a checkpoint, in which everything may be of another kind
    than what was saved: hyperparameters without a list of parameters, a text for a number.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} holds entries that these objects do not save "
            f"({type(error).__name__}: {error})"
        ) from error


def _is_checked(value: Any) -> bool:
    """Whether all that it may load has been looked at before."""
    return isinstance(value, (nn.Module, torch.optim.Optimizer)) or hasattr(
        value, "check_state_dict"
    )


def _share(found: Manifest, group: Any) -> dict[str, Entry]:
    """Of the files of a checkpoint those that this rank looks at."""
    names = sorted(found.files)[comm.rank(group) :: comm.size(group)]
    return {name: found.files[name] for name in names}


def _verify_share(found: Manifest, group: Any) -> None:
    def check() -> None:
        for name, entry in _share(found, group).items():
            verify_file(found.path.with_name(name), entry)

    _alike(group, check)


# -------------------------------------------------------------------------------------------- files


def _write(
    partial: Path, states: dict[str, Any], process_group: Any, folder: Path, algorithm: str
) -> dict[str, Entry]:
    from .storage import write

    no_dist = _group(process_group) is None
    return write(partial, states, process_group, no_dist, name=folder, algorithm=algorithm)


def _partial(folder: Path, token: str) -> Path:
    return folder.with_name(f".{folder.name}.{token}.partial")


def _machine() -> str:
    """A name for the kernel whose locks this process sees; containers may share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return f"{socket.gethostname()} {boot.read_text().strip()}"
    return socket.gethostname()


class _Aside:
    """A folder that is being written, and a lock that is held as long as this process lives.

    Attributes:
        token: in its name, so that no other save writes to it.
    """

    def __init__(self, folder: Path, token: str) -> None:
        self.token = token
        self._partial = _partial(folder, token)
        self._lock = self._partial.with_suffix(".lock")
        self._handle: int | None = None

    def make(self) -> None:
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(
            self._lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644
        )
        with suppress(OSError):  # file systems without locks: then nothing is ever cleared
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        # last: whoever finds it unlocked before takes it for a young one of another machine
        os.write(self._handle, _machine().encode())
        self._partial.mkdir()

    def close(self) -> None:
        """Leave nothing behind; what has been published has another name."""
        if self._handle is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            with suppress(OSError):
                self._lock.unlink()
            os.close(self._handle)
            self._handle = None


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
