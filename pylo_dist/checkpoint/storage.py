"""What torch.distributed.checkpoint reads and writes through: its own readers, writers and planners
over files with digests, and without any unpickling of what is not on a list. Writes a folder, and
fills what is read into.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.futures import Future

from . import archive, index
from .files import Entry, VerifiedFile, WrittenFile, open_verified
from .manifest import INDEX, Manifest
from .tree import CheckpointError

_PLAIN = {type(None), bool, int, float, complex, str, bytes}
_CONTAINERS = {list, tuple, set}
_REMEDY = (
    "keep numbers, texts, tensors and nested lists and dicts of them, or, if you trust whoever "
    "wrote the folder, name the classes to torch.serialization.add_safe_globals"
)


class _Files(FileSystem):
    """The files of one folder.

    Attributes:
        entries: by name; those of `algorithm` grow as files are written.
        error: what was wrong with a file, which torch may tell in other words.
    """

    def __init__(self, entries: Mapping[str, Entry], algorithm: str = "") -> None:
        super().__init__()
        self.entries, self._algorithm = dict(entries), algorithm
        self.error: Exception | None = None

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        path = Path(path)
        stream: WrittenFile | VerifiedFile
        if mode == "wb":
            stream = WrittenFile(path.open("xb"), self._algorithm)
        else:
            stream = open_verified(path, self.entries[path.name])
        try:
            with stream:
                yield stream
        finally:
            self.error = self.error or stream.error
        if isinstance(stream, WrittenFile):
            self.entries[path.name] = stream.entry()

    @contextlib.contextmanager
    def own_errors(self) -> Iterator[None]:
        """What was wrong with a file, whatever torch makes of it."""
        try:
            yield
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


# ---------------------------------------------------------------------------------------- writing


class _Saving(DefaultSavePlanner):
    """Refuses what could not be loaded again."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        data = super().transform_object(write_item, object)
        if isinstance(data, io.BytesIO) and not _is_plain(object):
            data.seek(0)
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(data):
                raise CheckpointError(
                    f"{write_item.index.fqn!r} holds {', '.join(sorted(names))}, which no "
                    f"checkpoint gives back: {_REMEDY}"
                )
        return data


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(type(key) in _PLAIN and _is_plain(entry) for key, entry in value.items())
    return kind in _PLAIN or (kind in _CONTAINERS and all(map(_is_plain, value)))


class _Writer(FileSystemWriter):
    """Writes files that no one else has, with a digest of every block."""

    def __init__(self, folder: Path, algorithm: str) -> None:
        super().__init__(folder)
        self.fs = self.files = _Files({}, algorithm)

    def write_data(self, *args: Any) -> Any:
        with self.files.own_errors(), _no_crc32:
            return super().write_data(*args)


class _NoCRC32:
    """Has torch.save leave out the CRC32 of every record, which no reader of torch's compares: the
    digests say more. A setting of the process, so other threads' files lack theirs meanwhile; the
    last save to end gives it back.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._before = torch.serialization.get_crc32_options()
                torch.serialization.set_crc32_options(False)
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                torch.serialization.set_crc32_options(self._before)


_no_crc32 = _NoCRC32()


def write(
    folder: Path,
    state: dict[str, Any],
    process_group: Any,
    no_dist: bool,
    *,
    name: Path,
    algorithm: str,
) -> dict[str, Entry]:
    """Write this rank's part of `state`, and on the first rank the index: the files of this rank.
    All ranks call it alike.

    Args:
        name: what the folder will be called, for messages.

    Raises:
        CheckpointError: a rank could not write its part; on all ranks.
    """
    writer = _Writer(folder, algorithm)
    with _as_checkpoint_error(name):
        write_shards(
            state,
            storage_writer=writer,
            planner=_Saving(),
            process_group=process_group or None,
            no_dist=no_dist,
        )
    return writer.files.entries


# ---------------------------------------------------------------------------------------- reading


class Reader(FileSystemReader):
    """Reads the files of a manifest, each block compared with its digest, in the order they lie in.

    Attributes:
        metadata: torch's, of every entry.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Raises CheckpointError for an index that is damaged or no index."""
        folder = manifest.path.parent
        super().__init__(folder)
        self.fs = self.files = _Files(manifest.files)
        with self.files.create_stream(folder / INDEX, "rb") as stream:
            data = stream.read()
        self._manifest = manifest
        with manifest.of_another_torch():
            self.metadata: Metadata = index.parse(data, folder / INDEX, manifest.files)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        with self.files.own_errors():
            for name, items in by_file.items():
                with self.files.create_stream(Path(self.path) / name, "rb") as stream:
                    for item in sorted(items, key=self._start):
                        stored = self.storage_data[item.storage_index]
                        planner.take(item, stream.part(stored.offset, stored.length))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _start(self, item: Any) -> int:
        return int(self.storage_data[item.storage_index].offset)

    def read(self, into: dict[str, Any], process_group: Any, no_dist: bool) -> None:
        """Read what `into` has keys for (modified in place).

        Raises:
            CheckpointError: on all ranks.
        """
        with self._manifest.of_another_torch(), _as_checkpoint_error(Path(self.path)):
            read_shards(
                into,
                storage_reader=self,
                planner=_Loading(),
                process_group=process_group or None,
                no_dist=no_dist,
            )


class _Loading(DefaultLoadPlanner):
    """Reads entries as torch.load does with `weights_only`."""

    def take(self, item: Any, stored: VerifiedFile) -> None:
        """Read one item from the file `stored` to where it belongs."""
        fqn = item.dest_index.fqn
        if item.type == LoadItemType.BYTE_IO:
            data = io.BytesIO(stored.read(-1))
            try:
                self._put(fqn, torch.load(data, weights_only=True))
            except pickle.UnpicklingError as error:
                data.seek(0)
                names = torch.serialization.get_unsafe_globals_in_checkpoint(data)
                what = f"names {', '.join(sorted(names))}" if names else f"cannot be read ({error})"
                raise CheckpointError(f"{fqn!r} {what}, which is never run: {_REMEDY}") from None
            return
        target = self.resolve_tensor(item).detach()
        if target.is_cpu and target.is_contiguous() and not any(item.storage_offsets):
            start = archive.elements(stored, target.dtype, target.shape)
            if start is not None:
                stored.seek(start)
                stored.readinto(target.view(-1).view(torch.uint8).numpy())
                return
            stored.seek(0)
        part = torch.load(cast("IO[bytes]", stored), map_location="cpu", weights_only=True)
        for dim, (start, count) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, count)
        if (part.shape, part.dtype) != (target.shape, target.dtype):
            raise CheckpointError(
                f"a part of {fqn!r} is {part.dtype} of {tuple(part.shape)}, the index says "
                f"{target.dtype} of {tuple(target.shape)}"
            )
        target.copy_(part)

    def _put(self, fqn: str, value: Any) -> None:
        place: Any = self.original_state_dict
        *way, last = self.mappings[fqn]
        for step in way:
            place = place[_key(place, step)]
        place[_key(place, last)] = value


def _key(place: Any, step: Any) -> Any:
    """The key in a container that a path of torch's means, in which numbers are texts."""
    if not isinstance(place, dict) or step in place:
        return step
    number = int(step) if step.lstrip("-").isdecimal() else None
    return number if number in place else next(key for key in place if str(key) == step)


@contextlib.contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    """torch's CheckpointException is no Exception; and it warns about a single process, which is no
    mistake here.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to")
            yield
    except CheckpointException as error:
        for rank, (cause, _) in error.failures.items():
            if not isinstance(cause, Exception):  # Ctrl-C, which is no fault of the checkpoint
                raise type(cause)(f"rank {rank}: {cause}") from None
        rank, (cause, _) = next(iter(error.failures.items()))
        text = str(cause)
        if not isinstance(cause, CheckpointError):
            text = f"{type(cause).__name__}: {text}"
        where = "" if str(folder) in text else f"{folder}: "
        raise CheckpointError(f"rank {rank}: {where}{text}") from error
