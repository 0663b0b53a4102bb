"""Permission bits that hold for root too: without the capabilities that pass over them."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_OVERRIDES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def permission_bits_hold() -> Iterator[None]:
    """In this thread, and not in programs that it starts. Skips the test where that cannot be."""
    kernel, header, sets = ctypes.CDLL(None), _Header(_VERSION_3, 0), (_Sets * 2)()
    kernel.capget(ctypes.byref(header), sets)
    before = sets[0].effective
    sets[0].effective &= ~sum(1 << number for number in _OVERRIDES)
    kernel.capset(ctypes.byref(header), sets)
    try:
        if not _hold():
            pytest.skip("permission bits mean nothing to this user here")
        yield
    finally:
        sets[0].effective = before
        kernel.capset(ctypes.byref(header), sets)


def with_permission_bits(work: Callable[[], None]) -> None:
    """`work()` where they hold in programs that it starts, too. It has a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            if os.geteuid() == 0:
                for number in _OVERRIDES:  # of this thread, which has it back no more
                    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
            with permission_bits_hold():
                work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _hold() -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        try:
            (folder / "a").touch()
        except PermissionError:
            return True
        return False
