"""Saved states of learning rate schedulers, compared with what a scheduler holds before it takes
them: torch's write whatever they are given into their attributes. Changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checks import shown


def check_scheduler_state(scheduler: Any, own: Any, saved: Any) -> None:
    """Raise ValueError, with the key, for a state that belongs to another kind of scheduler or
    holds other things than numbers where numbers are.

    Values may be any, as another length of the run. Entries that begin with `_` may be missing:
    versions of torch differ in them.

    Args:
        own: what `scheduler.state_dict()` gives.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"the state of a scheduler is {shown(saved)}, wanted a dict")
    kind = type(scheduler)
    for key in saved.keys() - own.keys():
        if not str(key).startswith("_") or hasattr(kind, str(key)):
            raise ValueError(
                f"{key!r} is nothing that a {kind.__name__} saves; is it of another scheduler?"
            )
    _compare(own, saved, kind.__name__, "")


def _compare(own: Any, saved: Any, kind: str, path: str) -> None:
    """Recursively; `path` is the key so far."""
    if own is None or (saved is None and not _is_number(own)):  # a function has no state
        return
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        # one that counts steps is of a scheduler; others hold what users have put there
        complete = not path or "last_epoch" in own
        for key in own:
            if key in saved:
                _compare(own[key], saved[key], kind, f"{path}.{key}" if path else str(key))
            elif complete and not str(key).startswith("_"):
                raise ValueError(
                    f"{f'{path}.{key}' if path else key!r} is missing, which a {kind} saves; is it "
                    "of another scheduler?"
                )
    elif isinstance(own, (list, tuple)) and isinstance(saved, (list, tuple)):
        if len(own) != len(saved):
            raise ValueError(f"{path!r} has {len(saved)} entries, the {kind} here has {len(own)}")
        for i, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
            _compare(mine, theirs, kind, f"{path}.{i}")
    elif _is_number(own) and _is_number(saved):
        if type(own) is int and not (isinstance(saved, Tensor) or _is_finite(saved)):
            raise ValueError(f"{path!r} is {shown(saved)}, wanted a finite number")
    elif type(own) is not type(saved):
        raise ValueError(
            f"{path!r} is {shown(saved)}, the {kind} here has {shown(own)}: wanted the same kind"
        )


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond floats
        return False
