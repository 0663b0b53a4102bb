"""What single arguments may be: a check for each kind of argument, whose error says the name, what
came and what was wanted. Reads host memory only.

Faces, adapters and DeepSpeed's JSON check with these as they are constructed, so that what cannot
be served is refused before anything has changed. Bounds are far beyond what is of use; they keep
numbers out that a step in float32 could not compute with, and counts that no step would come to the
end of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..core.scalars import with_python_numbers
from ..weights import printable

LARGEST = 1e6  # of factors on a step, and of decays
LARGEST_FLOAT32 = 3e38
SMALLEST_FLOAT32 = 1e-37  # above what becomes 0
LONGEST = 10**12  # steps, or what else is counted
LONGEST_WAIT = 1e7  # seconds
LARGEST_SEED = 2**53 - 1  # float64 holds all up to it, by which ranks compare what their groups say


def shown(value: object) -> str:
    """A value for a message: one line, not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class of the user, or of an int that has too many digits
        text = f"a {type(value).__name__}"
    return printable(text, 80)


def refused(name: str, value: object, wanted: str) -> ValueError:
    """The error for an argument."""
    return ValueError(f"{name}={shown(value)}: wanted {wanted}")


def as_number(value: object) -> float | None:
    """A number of the host as a float, infinite where it is too large; None for what is none."""
    if isinstance(value, Tensor) and (value.dim() or value.is_complex()):
        return None
    if not isinstance(value, (Real, Tensor)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number(
    name: str,
    value: object,
    wanted: str,
    least: float = 0.0,
    most: float = LARGEST,
    above: bool = False,
) -> float:
    """`value` as a float. Raises ValueError unless it is a number of the host between `least` and
    `most`, and not `least` itself where `above`.

    Args:
        wanted: in words, for the error.
    """
    found = None if isinstance(value, Tensor) else as_number(value)
    if found is None or not least <= found <= most or (above and found == least):
        raise refused(name, value, wanted)
    return found


def whole(name: str, value: object, wanted: str, least: int, most: int = LONGEST) -> int:
    """`value` as an int. Raises ValueError unless it is one between `least` and `most`."""
    found = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if found is None or not least <= found <= most:
        raise refused(name, value, f"{wanted} (at most {most})")
    return found


def halves(name: str, value: object) -> bool:
    """Whether a dtype for state, torch's own or its name, is bfloat16 and not float32, which None
    stands for too. Raises ValueError for any other.
    """
    known = isinstance(value, (str, torch.dtype)) or value is None
    found = str(value).removeprefix("torch.") if known else ""
    if found not in ("None", "float32", "bfloat16") or value == "None":
        raise refused(name, value, "'float32' (or None) or 'bfloat16', or these dtypes of torch")
    return found == "bfloat16"


def switch(name: str, value: object) -> bool:
    """`value` itself. Raises ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise refused(name, value, "True or False")
    return value


def choose(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise refused(name, value, f"one of {', '.join(map(repr, choices))}")


def numbers(
    name: str,
    values: object,
    count: int,
    wanted: str = "",
    least: float = -LARGEST,
    below: float = LARGEST,
) -> tuple[float, ...]:
    """`values` as floats. Raises ValueError unless they are `count` numbers, from `least` on and
    below `below`.

    Args:
        wanted: what they are, for the error.
    """
    plural = "s" if count > 1 else ""
    error = refused(name, values, f"{count} {wanted or 'finite number' + plural}")
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise error
    try:
        entries = [as_number(value) for value in values]
    except TypeError:  # a tensor without dims
        raise error from None
    found = tuple(value for value in entries if value is not None and least <= value < below)
    if len(found) != len(entries) or len(found) != count:
        raise error
    return found


def positive_by_name(name: str, values: object) -> dict[str, float]:
    """A copy of a mapping from names to numbers above 0. Raises ValueError for anything else, with
    the entry.
    """
    if not isinstance(values, Mapping):
        raise refused(name, values, "a mapping from names to numbers, or None")
    for key, value in values.items():
        if not isinstance(key, str):
            raise refused(name, values, f"names as keys, not {shown(key)}")
        number(f"{name}[{key!r}]", value, "a finite number > 0", above=True)
    return with_python_numbers(values)


def parameters(params: object, name: str = "params", first: str = "parameters") -> list[Any]:
    """What an optimizer is given as parameters, as a list. Raises TypeError or ValueError for what
    holds none.

    Args:
        first: what is wanted in the first place.
    """
    wanted = f"wanted {first}, named parameters, or a list of groups"
    if isinstance(params, Tensor):
        raise TypeError(f"{name} is one tensor; {wanted}: put it into a list")
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"{name}={shown(params)}: {wanted}")
    entries = list(params)
    if not entries:
        raise ValueError(f"{name}: optimizer got an empty parameter list; {wanted}")
    kinds = {isinstance(entry, dict) for entry in entries}
    for entry in entries:
        if not _is_parameter(entry) and (len(kinds) > 1 or not isinstance(entry, dict)):
            raise TypeError(f"{name} holds {shown(entry)}; {wanted}")
    return entries


def group(given: object) -> dict[str, Any]:
    """A parameter group. Raises TypeError for what is none."""
    wanted = 'wanted a group, such as {"params": parameters, "lr": 0.1}'
    if not isinstance(given, dict):
        raise TypeError(f"param_group={shown(given)}: {wanted}")
    params = given.get("params")
    if isinstance(params, Tensor):
        return given
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"params of a group is {shown(params)}; {wanted}")
    entries = params if isinstance(params, Sequence) else list(params)
    for entry in entries:
        if not _is_parameter(entry):
            raise TypeError(f"params of a group holds {shown(entry)}; {wanted}")
    return {**given, "params": entries}


def _is_parameter(entry: object) -> bool:
    if isinstance(entry, tuple):
        return len(entry) == 2 and isinstance(entry[0], str) and _is_tensor(entry[1])
    return _is_tensor(entry)


def _is_tensor(entry: object) -> bool:
    # `isinstance` asks torch's metaclass
    return type(entry) is nn.Parameter or isinstance(entry, Tensor)
