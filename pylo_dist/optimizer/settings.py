"""What a parameter group and a constructor may say: checks of single settings, warnings of odd
ones and of odd habits, and the comparison of all numbers of all groups between ranks. Reads only.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Union

import torch
from torch import Tensor

from ..core.rule import is_capturing
from ..core.scalars import as_python
from .checks import LARGEST, LARGEST_SEED, as_number, refused, shown, whole

REQUIRED: Any = inspect.Parameter.empty  # stands for the default of an argument that has none
REFUSED = ("foreach", "fused", "capturable", "differentiable", "maximize")  # modes of torch's own
# what groups may say at most; an exponent of e is bounded by what float32 reaches
LARGEST_OF = {"lr": LARGEST, "weight_decay": LARGEST, "exp_mult": 10.0, "step_mult": LARGEST}
LOWEST_LR = 0.05  # of faces whose lr is 1 unless said otherwise
LARGEST_DECAY = 0.01  # lr * weight_decay, share of a parameter per step
# folders whose frames are not the caller's
_INSIDE = (
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ""),
    os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), ""),
)


class LearningRateWarning(UserWarning):
    """An lr or a weight decay that looks like AdamW's, with which a learned optimizer stands
    still.
    """


class NoGradientWarning(UserWarning):
    """A step in which no parameter had a gradient, on any rank that shares them."""


class RandomWeightsWarning(UserWarning):
    """A step with the numbers of `random_weights`, which nothing was trained for."""


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a setting that cannot be served, of those that most learned optimizers
    share. Tensors that are not in host memory are not read.
    """
    for key in REFUSED:
        if group.get(key):
            raise ValueError(
                f"{key}=True in a parameter group: learned optimizers have no such mode; leave "
                "it out"
            )
    for key, most in LARGEST_OF.items():
        value = group.get(key, 0.0)
        if _elsewhere(value):
            continue
        number = as_number(value)
        if not (number is not None and 0.0 <= number <= most):
            raise refused(key, value, f"a finite number >= 0, at most {most:g}")
    if "state_seed" in group:
        check_seed(group["state_seed"])
    limit = group.get("max_grad_norm")
    whole = isinstance(limit, int) and limit < 2**63
    if limit is not None and not ((whole or isinstance(limit, float)) and limit > 0):
        raise refused("max_grad_norm", limit, "a number > 0, or None for no clipping")


def check_seed(seed: object) -> int:
    """`seed` as an int. Raises ValueError for what is no seed of the rounding of state."""
    return whole("state_seed", seed, "an int >= 0", 0, LARGEST_SEED)


def check_device_numbers(group: dict[str, Any]) -> None:
    """As `check_group`, of the tensors that are not in host memory; waits for their device."""
    for key, value in group.items():
        if isinstance(value, Tensor) and _elsewhere(value) and value.device.type != "meta":
            check_group({key: value.detach().cpu()})


def check_arguments(
    face: type, given: Mapping[str, Any], group: dict[str, Any], served: Collection[str]
) -> None:
    """Raise ValueError for an argument of the constructor in a new group, where nobody reads it.

    Args:
        given: what the constructor was given. Wrappers that write all of it into every group
            (torch's ZeroRedundancyOptimizer) lose nothing.
        served: keys that a group of this optimizer may have.
    """
    for name in arguments_of(face):
        if name not in group or name in served or _is_same(group[name], given.get(name, REQUIRED)):
            continue
        raise ValueError(
            f"{name}={shown(group[name])} in a parameter group: it holds for all parameters of an "
            f"optimizer; give it to {face.__name__}(...), and parameters that want another to an "
            "optimizer of their own"
        )


def _is_same(one: object, other: object) -> bool:
    plain = isinstance(one, (bool, int, float, str, tuple, type(None), torch.dtype))
    return one is other or (plain and one == other)


@cache
def arguments_of(face: type) -> dict[str, Any]:
    """What a face takes by name after `params`, also what it hands on to the classes it derives
    from, with the defaults; REQUIRED for those without.
    """
    found: dict[str, Any] = {}
    for cls in face.__mro__:
        constructor = vars(cls).get("__init__")
        if constructor is None:
            continue
        parameters = list(inspect.signature(constructor).parameters.values())
        named = parameters[2:] if not found else []  # without self and params
        named += [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        for p in named:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


# --------------------------------------------------------------------------------------- warnings


class Habits:
    """Warns of what a user says or does and hardly means, of each kind once per optimizer."""

    def __init__(self) -> None:
        self._said: set[type[Warning]] = set()

    def look(self, face: type, groups: Sequence[dict[str, Any]]) -> None:
        """Look at the last of these groups, which is new."""
        habit = _adamw_habit(face, groups[-1])
        if habit is not None:
            self._say(habit, LearningRateWarning)
        if _shares_lr_tensor(groups):
            self._say(
                "several parameter groups share one lr tensor: schedulers write into it in place, "
                "so that all groups follow the schedule of the last; give every group its own "
                "(lr.clone())",
                UserWarning,
            )

    def idle(self, kind: str) -> None:
        """A step of an optimizer of this kind had no gradient at all."""
        self._say(
            f"a step of {kind} found no gradient of any parameter, on this rank or those it shares "
            "them with: none was moved, and the step counts; call backward() before step() and "
            "zero_grad() after it, and under FSDP2 with manual finalization finalize_backward() "
            "between the two; warnings.simplefilter('ignore', pylo_dist.NoGradientWarning) "
            "silences this",
            NoGradientWarning,
        )

    def untrained(self, kind: str) -> None:
        """A step of an optimizer of this kind, on random weights."""
        self._say(
            f"the weights of {kind} are random numbers (pylo_dist.random_weights): it moves "
            "parameters, and does not train them; warnings.simplefilter('ignore', "
            "pylo_dist.RandomWeightsWarning) silences this",
            RandomWeightsWarning,
        )

    def _say(self, message: str, category: type[Warning]) -> None:
        """Warn at the line that called the package, through torch's own frames and ours."""
        if category in self._said:
            return
        self._said.add(category)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
            frame, level = frame.f_back, level + 1
        warnings.warn(message, category, stacklevel=level)


def _adamw_habit(face: type, group: dict[str, Any]) -> str | None:
    # schedulers note what they began with
    lr = _value(group.get("initial_lr", group.get("lr")))
    decay = _value(group.get("weight_decay"))
    if lr is None:
        return None
    advice = (
        "; docs/coming-from-adamw.md says more, and "
        "warnings.simplefilter('ignore', pylo_dist.LearningRateWarning) silences this"
    )
    if lr < LOWEST_LR and arguments_of(face).get("lr") == 1.0:
        return (
            f"lr={lr:g}: the lr of {face.__name__} multiplies a learned step and belongs around 1, "
            "with such a value as AdamW takes training stands still; leave it out, and let "
            f"schedules go up to 1{advice}"
        )
    if decay is not None and lr * decay > LARGEST_DECAY * (1 + 1e-9):
        return (
            f"weight_decay={decay:g} at lr={lr:g} takes {lr * decay:.2g} of every parameter away "
            f"in every step, more than {LARGEST_DECAY:g}: AdamW's decay is multiplied by its small "
            f"lr, so give {face.__name__} the product of the two (0.1 at 6e-4 is 6e-5){advice}"
        )
    return None


def _shares_lr_tensor(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether the last group has the lr tensor of another one."""
    lr = groups[-1].get("lr")
    return isinstance(lr, Tensor) and any(group.get("lr") is lr for group in groups[:-1])


# ------------------------------------------------------------------------------- between the ranks

_NONE = -sys.float_info.max  # stands for None in tables of numbers
_DIGIT_BITS = 13
_DIGITS = 5  # 5 * 13 >= 64
_PRIME = 8209  # the first above 2 ** 13
_Seen = Union[bool, int, float, str, None, tuple[str, int]]


class GroupNumbers:
    """The numbers of all parameter groups as they are in the coming step, checked and compared
    between ranks.

    What the host knows it checks itself, when it has changed; what is a tensor on another device is
    checked there. Ranks compare by sums alone: the 64 bits of a number are cut into 5 digits d of
    13 bits, and n ranks have the same digit if and only if n sum(d^2) = (sum d)^2, which float64
    says exactly for up to 8192 ranks.

    Args:
        face: the class of the optimizer; what is None in its signature may be None.
        defaults: those of torch.optim.Optimizer. They also stand in for an entry that cannot be
            served before there was a good one.
        further: entries of a group beside these that count.
        check: raises ValueError for a group that cannot be served, without waiting for a device.
    """

    def __init__(
        self,
        face: type,
        defaults: Mapping[str, Any],
        further: Sequence[str],
        check: Callable[[dict[str, Any]], None],
    ) -> None:
        self._keys = (*(key for key in defaults if key not in REFUSED), *further)
        self._defaults, self._check = defaults, check
        self._optional = {
            key for key in self._keys if arguments_of(face).get(key, REQUIRED) is None
        }
        self._optional.add("max_grad_norm")
        self._groups: Sequence[dict[str, Any]] = ()
        self._seen: list[list[_Seen] | None] = []  # per group; None: not good
        self._good: list[dict[str, Any]] = []  # per group, the last that could be served
        self._changed = True
        self._filled: list[float] = []  # what is in the table, NaN where a tensor is
        self._table = torch.empty(0)  # float64 (groups, keys)
        self._own: dict[tuple[torch.device, bool], Tensor] = {}  # unsummed buffers
        self._held: list[Tensor] = []  # tables that CUDA graphs read at every replay
        self._flags = torch.empty(0)  # bool (2, groups, keys): no good here, unlike

    def read(self, groups: Sequence[dict[str, Any]], problem: Exception | None) -> Exception | None:
        """Look at the groups, in which numbers of other libraries become Python's (modified in
        place). Returns the problem, or the first that is found here.
        """
        for group in groups:
            for key in self._keys:
                if key in group:
                    group[key] = as_python(group[key])
        seen = [[_seen(group.get(key)) for key in self._keys] for group in groups]
        self._groups = groups
        if seen == self._seen:
            return problem
        self._changed, before = True, self._seen
        good = [*self._good[: len(groups)], *({} for _ in groups[len(self._good) :])]
        now: list[list[_Seen] | None] = []
        for i, (group, entries) in enumerate(zip(groups, seen, strict=True)):
            try:
                if i >= len(before) or before[i] != entries:
                    self._check_all(group)
                good[i] = {key: group.get(key) for key in self._keys}
                now.append(list(entries))
            except (TypeError, ValueError, OverflowError) as error:
                problem = problem or ValueError(
                    f"parameter group {i}: {error}; the step was not taken"
                )
                now.append(None)
        self._seen, self._good = now, good
        return problem

    def _check_all(self, group: dict[str, Any]) -> None:
        self._check(group)
        for key in self._keys:
            value, default = group.get(key), self._defaults.get(key)
            if isinstance(default, bool) or not isinstance(default, (int, float, Tensor)):
                continue
            if (value is None and key in self._optional) or _seen(value) == _seen(default):
                continue
            number = 0.0 if _elsewhere(value) else as_number(value)
            if number is None or not (math.isfinite(number) or key == "max_grad_norm"):
                raise refused(key, value, "a finite number")

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While a step is refused: groups that cannot be served hold the last numbers that could,
        so that it can go through its collectives.
        """
        held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for i, group in enumerate(self._groups):
            if self._seen[i] is None:
                held.append((group, {key: group[key] for key in self._keys if key in group}))
                group.update(self._good[i] or {key: self._defaults.get(key) for key in self._keys})
        try:
            yield
        finally:
            for group, numbers in held:
                group.update(numbers)

    # ------------------------------------------------------------------------------------- tables

    def buffer(self, device: torch.device, by_group: bool) -> Tensor:
        """A new buffer to be added over ranks, float64 (1 + 2 * numbers * digits,): 1, the digits,
        and their squares.

        Args:
            by_group: one number for every entry of every group; False: one for all groups
                together, for ranks that may have other groups.
        """
        self._fill(device)
        capturing = is_capturing(device)
        own = None if capturing else self._own.get((device, by_group))
        if own is None:
            bits = self._table.view(torch.int64).unsqueeze(-1)
            shifts = torch.arange(0, _DIGITS * _DIGIT_BITS, _DIGIT_BITS, device=device)
            digits = (bits >> shifts) & (2**_DIGIT_BITS - 1)
            if not by_group:
                weights = torch.arange(1, len(self._groups) + 1, device=device).view(-1, 1, 1)
                digits = (digits * weights).sum(0) % _PRIME
            flat = digits.to(torch.float64).flatten()
            one = torch.ones(1, dtype=torch.float64, device=device)
            own = torch.cat([one, flat, flat * flat])
            if capturing:  # replays read the table wherever the next one lies
                self._held.append(self._table)
            else:
                self._own[device, by_group] = own
        return own.clone()

    def _fill(self, device: torch.device) -> None:
        """Bring the table up to date, without a copy from host memory."""
        shape = (len(self._groups), len(self._keys))
        if self._table.shape != shape or self._table.device != device:
            self._table = torch.zeros(shape, dtype=torch.float64, device=device)
            self._filled, self._changed = [0.0] * self._table.numel(), True
        tensors = self._device_tensors()
        if not self._changed and not tensors:
            return
        self._own.clear()
        places = self._table.view(-1).unbind()
        if self._changed:
            entries = [_entry(group.get(key)) for group in self._groups for key in self._keys]
            for k, number in enumerate(entries):
                if number != self._filled[k] and not math.isnan(number):
                    places[k].fill_(number)
                self._filled[k] = number
            self._changed = False
        for k, tensor in tensors:
            places[k].copy_(tensor)
        if is_capturing(device):  # nothing has been written yet
            self._filled, self._changed = [math.nan] * len(places), True

    def _device_tensors(self) -> list[tuple[int, Tensor]]:
        return [
            (i * len(self._keys) + j, group[key])
            for i, group in enumerate(self._groups)
            for j, key in enumerate(self._keys)
            if _elsewhere(group.get(key))
        ]

    # ------------------------------------------------------------------------------------ verdict

    def judge(self, summed: Sequence[Tensor], device: torch.device) -> Tensor | None:
        """From summed buffers: whether the numbers forbid the step, bool 0-d on `device`; None
        where only the host has to say something. Remembers what is wrong until `forget`.
        """
        tensors = self._device_tensors()
        if not summed and not tensors:
            return None
        shape = (2, len(self._groups), len(self._keys))
        if self._flags.shape != shape or self._flags.device != device:
            self._flags = torch.zeros(shape, dtype=torch.bool, device=device)
        now = torch.zeros_like(self._flags)
        for buffer in summed:
            sums, squares = buffer[1:].view(2, -1)
            unlike = (buffer[0] * squares != sums * sums).view(-1, len(self._keys), _DIGITS).any(-1)
            now[1].logical_or_(unlike.to(device))
        bad = now[0].view(-1).unbind()
        for k, tensor in tensors:
            wrong = ~tensor.isfinite() | (tensor < 0.0)
            bad[k].logical_or_(wrong.reshape(()).to(device))
        self._flags.logical_or_(now)
        return now.any()

    def error(self) -> ValueError:
        """What `judge` has found; waits for the device."""
        i, j = divmod(int(self._flags.any(0).view(-1).nonzero()[0]), len(self._keys))
        key = self._keys[j]
        value, several = self._groups[i].get(key), bool(self._flags[1, :, j].all())
        what = f"{key}={value.item() if isinstance(value, Tensor) else value!r}"
        if self._flags[0, i, j]:
            return ValueError(
                f"parameter group {i}: {what}: wanted a finite number >= 0; the step was not taken"
            )
        of = "the parameter groups" if several and len(self._groups) > 1 else f"parameter group {i}"
        return ValueError(
            f"{key!r} of {of} is not the same on all ranks (here {what}): change settings "
            "alike on every rank; the step was not taken on any"
        )

    def forget(self) -> None:
        """Forget what was wrong."""
        self._flags.zero_()


def _elsewhere(value: object) -> bool:
    """Whether it is a number in the memory of a device, which the host does not read."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.device.type != "cpu"


def _value(value: object) -> float | None:
    """As `as_number`, waiting for a device where it has to."""
    if isinstance(value, Tensor) and value.device.type == "meta":
        return None
    return as_number(value)


def _seen(value: object) -> _Seen:
    """By what a change of an entry is noticed; never waits for a device."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return as_number(value) if value.device.type == "cpu" else ("tensor", id(value))
    return type(value).__name__, _checksum(value)


def _entry(value: object) -> float:
    """An entry in the table; NaN for a tensor that the device fills in."""
    if value is None:
        return _NONE
    if _elsewhere(value):
        return math.nan
    number = as_number(value)
    return float(_checksum(value)) if number is None else number


def _checksum(value: object) -> int:
    """Alike on all ranks, of what is made of numbers, texts, tuples and mappings."""
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=repr)
    if not isinstance(value, (str, tuple, list)):
        value = type(value).__name__
    return zlib.crc32(repr(value).encode())
