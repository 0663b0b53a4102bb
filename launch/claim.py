"""A run's folder is its own: a lock in it, which ends with the process that holds it. Rank 0 only.

Promised where the file system has locks (flock), on one machine, and between machines where it
carries locks between them, as NFS does; elsewhere runs do not see each other.
"""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from options import WrongInput

NAME = ".running"
TRIES = 100  # of a folder that others make and remove


class InUse(Exception):
    """Another run is in the folder of --out. It may be one that is about to end."""


class Claim:
    """The claim on one folder, as a context: what it left behind is gone with the block."""

    def __init__(self) -> None:
        self._held: tuple[Path, int] | None = None
        self._made: Path | None = None

    def __enter__(self) -> Claim:
        return self

    def take(self, folder: Path) -> str | None:
        """Claim `folder`, which is made where it is missing; or say who has it. Raises WrongInput
        where it cannot be written.
        """
        try:
            for tries in range(TRIES):
                self._make(folder)
                if not folder.is_dir():
                    return None  # whoever opens it says so
                try:
                    holder = self._try(folder / NAME)
                except FileNotFoundError:  # whoever had it has removed it, and the folder
                    if tries == TRIES - 1:
                        raise
                    continue
                if self._held is not None:
                    return None
                if holder is not None:
                    return holder
        except OSError as error:
            raise WrongInput(
                f"--out {folder} cannot be written ({error.strerror}); choose another folder."
            ) from None
        return "several that come and go"

    def _make(self, folder: Path) -> None:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            self._made = folder

    def _try(self, path: Path) -> str | None:
        """Hold the lock, or say who does; neither where it was removed meanwhile."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path, flags, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 200).decode(errors="replace")
                return "".join(c if c.isprintable() else "?" for c in holder) or "starting"
            except OSError:
                pass  # a file system without locks
            if is_at(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                self._held = path, handle
            return None
        finally:
            if self._held is None:
                os.close(handle)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            if self._held is not None and is_at(*self._held):  # else that of another run
                self._held[0].unlink()
        if self._held is not None:
            os.close(self._held[1])
        with suppress(OSError):  # with something in it, it stays
            if self._made is not None:
                self._made.rmdir()


def is_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one that has this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False
