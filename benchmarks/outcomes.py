"""What may come of a case of campaign.py: it is right, or of a class of faults. Reads and writes
nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RIGHT = "right"
WAITS, BARE, HALF = "unbounded wait", "bare traceback", "half change"
OUTSIDE, GLOBAL = "file outside", "global beyond the list"
WRONG, DIED, GROWS = "wrong value", "process died", "growth"
CLASSES = (WAITS, BARE, HALF, OUTSIDE, GLOBAL, WRONG, DIED, GROWS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: RIGHT or one of CLASSES.
        said: what was done, and what came of it.
        where: what tells one kind of fault from another: the error and the place it came from.
    """

    kind: str
    said: str
    where: str = ""


# of the generator that draws it, in an empty folder of its own
Case = Callable[[random.Random, Path], Outcome]
