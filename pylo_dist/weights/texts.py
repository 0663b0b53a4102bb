"""Small files that others wrote, bytes, text and JSON, read within bounds; reads only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 1 << 20  # bytes


def read_bytes(path: Path, most: int) -> bytes:
    """A regular file's bytes. A pipe or a device, whose end may never come, is not waited for.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file, or larger than `most` bytes.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file")
        # room is made for all that is asked for
        content = file.read(min(status.st_size, most) + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return content


def read_text(path: Path, most: int = LARGEST) -> str:
    """A file's text. Raises OSError and ValueError as `read_bytes`, and ValueError for no UTF-8."""
    return read_bytes(path, most).decode()


def parse_json(text: str) -> Any:
    """What JSON stands for. Raises ValueError for none, for NaN and Infinity, which it has not, and
    for what is nested more deeply than Python can follow.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, most: int = LARGEST) -> Any:
    """What a file of JSON stands for. Raises OSError and ValueError, see `read_text`."""
    return parse_json(read_text(path, most))
