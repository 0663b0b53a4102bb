"""The objects of this process by their class, for what no reference leads to. Changes none."""

from __future__ import annotations

import gc
from typing import Any


def living(kinds: tuple[type, ...]) -> list[Any]:
    """All objects of these classes that there are in the process: takes tens of milliseconds."""
    objects = gc.get_objects()
    # a proxy would answer isinstance
    found = {kind for kind in set(map(type, objects)) if issubclass(kind, kinds)}
    return [thing for thing in objects if type(thing) in found] if found else []
