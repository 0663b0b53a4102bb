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
# by their names in a manifest, each of 32 bytes
DIGESTS: dict[str, Callable[..., Any]] = {
    "sha256": hashlib.sha256,
    "blake2b": functools.partial(hashlib.blake2b, digest_size=32),
}


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
        while done < len(view):
            part = view[done : done + BLOCK - self._size % BLOCK]
            self._block.update(part)
            self._size += len(part)
            done += len(part)
            if self._size % BLOCK == 0:
                self._end_block()
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
    """A file of a checkpoint for reading: each of its blocks is compared with its digest before
    anything in it is seen. Of files of format 1, which have one digest alone, that is done before.

    Attributes:
        error: what was wrong with it, however the error comes out of torch.
    """

    KEPT = 4  # blocks: the ends of what is read, which torch comes back to

    def __init__(self, file: io.FileIO, path: Path, entry: Entry) -> None:
        super().__init__()
        self.error: CheckpointError | None = None
        self._file, self._path, self._entry, self._place = file, path, entry, 0
        self._kept: dict[int, bytearray] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._entry.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._path}: place {base + offset} is before its beginning")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._entry.size - self._place)]
        done = 0
        while done < len(view):
            number, inside = divmod(self._place, BLOCK)
            length = self._length(number)
            if not inside and len(view) - done >= length and number not in self._kept:
                part = view[done : done + length]
                self._fill(number, part)  # where it is wanted, without a copy
            else:
                kept = self._block(number)
                part = view[done : done + length - inside]
                part[:] = kept[inside : inside + len(part)]
            done += len(part)
            self._place += len(part)
        return done

    def _length(self, number: int) -> int:
        return min(BLOCK, self._entry.size - number * BLOCK)

    def _block(self, number: int) -> bytearray:
        if number not in self._kept:
            data = bytearray(self._length(number))
            self._fill(number, memoryview(data))
            while len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = data
        return self._kept[number]

    def _fill(self, number: int, part: memoryview) -> None:
        """part <- a block (modified in place). Raises CheckpointError where it is not what was
        written.
        """
        self._file.seek(number * BLOCK)
        done = 0
        while done < len(part) and (more := self._file.readinto(part[done:])):
            done += more
        entry = self._entry
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

    def close(self) -> None:
        if not self.closed:
            self._kept.clear()
            self._file.close()
            super().close()


def open_verified(path: Path, entry: Entry) -> VerifiedFile:
    """A file of a checkpoint. Raises CheckpointError as `open_regular`."""
    return VerifiedFile(open_regular(path, MISSING, entry.size), path, entry)


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
