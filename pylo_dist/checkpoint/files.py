"""The files of a checkpoint: written with a digest of every block, read with each block compared
before any of it is handed on. Writes the files it is told to.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tree import CheckpointError

BLOCK = 2**20  # bytes of a digest
MISSING = "but the manifest names it"
KNOWN_DIGESTS = ("sha256", "blake2b", "blake3")  # by their names in a manifest, each of 32 bytes
DIGESTS: dict[str, Callable[..., Any]] = {  # those that can be taken here
    "sha256": hashlib.sha256,
    "blake2b": functools.partial(hashlib.blake2b, digest_size=32),
}
try:
    from blake3 import blake3  # one thread, unless it is asked for more
except ImportError:  # then another one is written, and a folder with this one refused
    pass
else:
    DIGESTS["blake3"] = blake3


@dataclass(frozen=True, slots=True)
class Entry:
    """What a manifest says of a file.

    Attributes:
        size: in bytes.
        algorithm: of DIGESTS.
        block: bytes of each digest; None: there is one, of the whole file.
        digests: in hexadecimal digits.
    """

    size: int
    algorithm: str
    block: int | None
    digests: tuple[str, ...]


def open_regular(path: Path, otherwise: str, size: int | None = None) -> io.FileIO:
    """Open a file for reading that is one: a FIFO would be waited for, and a link leads anywhere.

    Args:
        otherwise: what it means that there is none.
        size: in bytes, where that is known.

    Raises:
        CheckpointError: it is missing, of another size, or no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing: {otherwise}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(
                f"{path} is a link, wanted the file itself: copy it there"
            ) from None
        raise CheckpointError(f"{error}") from error
    found = os.fstat(handle)
    file = io.FileIO(handle, "rb") if stat.S_ISREG(found.st_mode) else None
    if file is None:
        os.close(handle)
        raise CheckpointError(f"{path} is no regular file")
    if size is not None and found.st_size != size:
        file.close()
        raise CheckpointError(
            f"{path}: {found.st_size} bytes, wanted {size}; it is truncated or was changed"
        )
    return file


class WrittenFile(io.RawIOBase):
    """A new file whose blocks' digests are taken as they pass.

    Attributes:
        error: what the file system said, however the error comes out of torch.
    """

    def __init__(self, file: io.BufferedWriter, algorithm: str) -> None:
        super().__init__()
        self._file = file
        self._algorithm, self._digests = algorithm, list[str]()
        self._block, self._size = DIGESTS[algorithm](), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        done = 0
        while len(view) - done >= (room := BLOCK - self._size % BLOCK):
            self._block.update(view[done : done + room])
            self._end_block()
            self._size += room
            done += room
        self._block.update(view[done:])
        self._size += len(view) - done
        return len(view)

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block = DIGESTS[self._algorithm]()

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._file.closed:
            try:
                self._file.flush()
            except OSError as error:
                self.error = error
                raise

    def fileno(self) -> int:
        self.flush()  # torch asks for it to have the file on the disk
        return self._file.fileno()

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()  # flushes
            finally:
                self._file.close()

    def entry(self) -> Entry:
        """Of the file, once all is written."""
        if self._size % BLOCK:
            self._end_block()
        return Entry(self._size, self._algorithm, BLOCK, tuple(self._digests))


class VerifiedFile(io.RawIOBase):
    """A file of a checkpoint for reading, or a part of one: each block is compared with its digest
    before anything in it is seen. Of files of format 1, which have one digest alone, that is done
    before.
    """

    def __init__(self, blocks: _Blocks, begin: int, end: int, whole: bool = False) -> None:
        super().__init__()
        self._blocks, self._begin, self._end, self._whole = blocks, begin, end, whole
        self._place = begin

    @property
    def error(self) -> CheckpointError | None:
        """What was wrong with the file, however the error comes out of torch."""
        return self._blocks.error

    def part(self, offset: int, length: int) -> VerifiedFile:
        """A part as a file of its own, which is open as long as the whole is."""
        return VerifiedFile(self._blocks, self._begin + offset, self._begin + offset + length)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place - self._begin

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = (self._begin, self._place, self._end)[whence]
        if base + offset < self._begin:
            raise ValueError(f"place {base + offset - self._begin} is before the beginning")
        self._place = base + offset
        return self._place - self._begin

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._end - self._place))
        self._blocks.read(self._place, view[:count])
        self._place += count
        return count

    def close(self) -> None:
        if self._whole and not self.closed:
            self._blocks.close()
        super().close()


class _Blocks:
    """The blocks of an open file.

    Attributes:
        error: what was wrong with it.
    """

    KEPT = 4  # the ends of what is read, which torch comes back to

    def __init__(self, file: io.FileIO, path: Path, entry: Entry) -> None:
        self.error: CheckpointError | None = None
        self._file, self._path, self._entry = file, path, entry
        self._kept: dict[int, memoryview] = {}

    def read(self, place: int, view: memoryview) -> None:
        """view <- the bytes from a place on, all of which the file has (modified in place)."""
        done = 0
        while done < len(view):
            number, inside = divmod(place + done, BLOCK)
            kept = self._kept.get(number)
            if kept is None:
                length = min(BLOCK, self._entry.size - number * BLOCK)
                if not inside and len(view) - done >= length:  # where it is wanted, without a copy
                    self._fill(number, view[done : done + length])
                    done += length
                    continue
                kept = self._keep(number, length)
            part = kept[inside : inside + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def close(self) -> None:
        self._kept.clear()
        self._file.close()

    def _keep(self, number: int, length: int) -> memoryview:
        # memory that was used before costs no page faults
        old = self._kept.pop(next(iter(self._kept))) if len(self._kept) == self.KEPT else None
        room = memoryview(bytearray(BLOCK)) if old is None else memoryview(old.obj)
        self._fill(number, room[:length])
        self._kept[number] = room[:length]
        return self._kept[number]

    def _fill(self, number: int, part: memoryview) -> None:
        """part <- a block (modified in place). Raises CheckpointError where it is not what was
        written.
        """
        done, entry = 0, self._entry
        self._file.seek(number * BLOCK)
        while done < len(part) and (more := self._file.readinto(part[done:])):
            done += more
        if done < len(part):
            self.error = CheckpointError(f"{self._path}: cut while it was read")
            raise self.error
        if entry.block is None:
            return
        if DIGESTS[entry.algorithm](part).hexdigest() != entry.digests[number]:
            self.error = CheckpointError(
                f"{self._path}: its {entry.algorithm} from byte {number * BLOCK} on is not that of "
                "the manifest; the file was changed or is damaged"
            )
            raise self.error


def open_verified(path: Path, entry: Entry) -> VerifiedFile:
    """A file of a checkpoint. Raises CheckpointError as `open_regular`."""
    blocks = _Blocks(open_regular(path, MISSING, entry.size), path, entry)
    return VerifiedFile(blocks, 0, entry.size, whole=True)


def verify_file(path: Path, entry: Entry) -> None:
    """Compare all of a file with its entry. Raises CheckpointError."""
    if entry.block is not None:
        with open_verified(path, entry) as file:
            buffer = bytearray(BLOCK)
            while file.readinto(buffer):
                pass
        return
    digest = DIGESTS[entry.algorithm]()
    with open_regular(path, MISSING, entry.size) as file:
        while block := file.read(2**22):
            digest.update(block)
    if digest.hexdigest() != entry.digests[0]:
        raise CheckpointError(
            f"{path}: its {entry.algorithm} is not that of the manifest; the file was changed or "
            "is damaged"
        )
