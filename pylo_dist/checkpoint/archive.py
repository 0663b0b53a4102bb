"""Where the elements of a tensor lie in what torch.save wrote of it, so that they are read to where
they belong: torch.load would make memory for them first. Nothing is run, and whatever is not as
expected is left to torch.load. Reads the file it is given.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .files import VerifiedFile

_END = struct.Struct("<4s4x2H2IH")  # of a zip file: what to expect, entries, size and place of list
_ENTRY = struct.Struct("<4s6xH8x2I3H8xI")  # of its list: packed how, sizes, lengths, place
_HEAD = struct.Struct("<4s22x2H")  # in front of a record: lengths
_LISTED = 2048  # bytes at the end that hold the whole list: torch.save writes seven records
_MOST = 4096  # bytes of a pickle
_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}


def elements(file: VerifiedFile, dtype: torch.dtype, shape: Sequence[int]) -> int | None:
    """The place in `file` from which on the elements of one contiguous tensor lie, as this machine
    holds them.

    Args:
        file: what torch.save wrote of it; its place moves.

    Returns:
        None where it is anything else: torch.load says what.

    Raises:
        CheckpointError: what is looked at is damaged.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _LISTED))
    listed = dict(_records(file.read(), end))
    places = {name.partition("/")[2]: place for name, place in listed.items()}
    wanted = math.prod(shape) * dtype.itemsize
    if not {"data.pkl", "byteorder", "data/0"} <= places.keys():
        return None
    if places["data.pkl"][1] > _MOST or places["data/0"][1] != wanted:
        return None
    if _record(file, places["byteorder"]) != sys.byteorder.encode():
        return None
    if _described(_record(file, places["data.pkl"])) != _plain(dtype, shape):
        return None
    start = _start(file, places["data/0"])
    return start if start is not None and start + wanted <= end else None


def _records(tail: bytes, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, place of the head and size of the records that a zip file of `end` bytes lists, if all
    are as they are; `tail`: its last bytes.
    """
    if len(tail) < _END.size:
        return
    sign, _, count, size, begin, comment = _END.unpack_from(tail, len(tail) - _END.size)
    at = begin - (end - len(tail))
    if sign != b"PK\5\6" or comment or at < 0:
        return
    for _ in range(count):
        if at + _ENTRY.size > len(tail):
            return
        sign, packed, stored, size, name, extra, more, place = _ENTRY.unpack_from(tail, at)
        at += _ENTRY.size
        if sign != b"PK\1\2" or packed or stored != size:
            return
        yield tail[at : at + name].decode(errors="replace"), (place, size)
        at += name + extra + more


def _start(file: VerifiedFile, place: tuple[int, int]) -> int | None:
    """Where a record begins, behind its head."""
    file.seek(place[0])
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:4] != b"PK\3\4":
        return None
    lengths: tuple[int, ...] = _HEAD.unpack(head)[1:]
    return place[0] + _HEAD.size + sum(lengths)


def _record(file: VerifiedFile, place: tuple[int, int]) -> bytes:
    start = _start(file, place)
    if start is None:
        return b""
    file.seek(start)
    return file.read(place[1])


# ------------------------------------------------------------------------------------- the pickle


class _Description(pickle.Unpickler):
    """What a pickle says of a tensor, in plain tuples; any name but those of a plain one is an
    error.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _arguments
        if (module, name) == ("collections", "OrderedDict"):
            return _arguments
        if module == "torch" and name in _STORAGES.values():
            return name
        raise pickle.UnpicklingError

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _arguments(*values: Any) -> Any:
    return values


def _described(pickled: bytes) -> Any:
    try:
        return _Description(io.BytesIO(pickled)).load()
    except Exception:  # there is nothing that hostile bytes do not raise
        return None


def _plain(dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """What is said of a contiguous tensor that has its storage for itself."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    storage = ("storage", _STORAGES.get(dtype), "0", "cpu", math.prod(shape))
    return storage, 0, tuple(shape), tuple(reversed(strides)), False, ()
