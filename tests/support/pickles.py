"""What a test puts into a pickle that must not be read."""

from __future__ import annotations

from typing import Any


class Loud:
    """Says so when it is unpickled."""

    read = False

    def __reduce__(self) -> Any:
        return (Loud.was_read, ())

    @staticmethod
    def was_read() -> None:
        Loud.read = True
