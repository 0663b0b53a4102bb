"""Optimizers by name: those that are registered with pylo_dist, those of --plugin, and AdamW, which
is PyTorch's.

Imports pylo_dist, and with it PyTorch, when it is asked for one and not before: resume_loop.sh
reads a command without.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ADAMW = "adamw"
MISSING = inspect.Parameter.empty  # stands for the default of an argument that has none


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What a run asks about an optimizer.

    Attributes:
        entry: the `pylo_dist.Registration` of a learned one, else None.
        arguments: what its class takes by name after the parameters, with the defaults, or MISSING.
    """

    name: str
    entry: Any
    arguments: Mapping[str, Any]

    def takes(self, argument: str) -> bool:
        """Whether its class has an argument of that name."""
        return argument in self.arguments

    def default(self, argument: str) -> Any:
        """Its default; None where there is none."""
        value = self.arguments.get(argument)
        return None if value is MISSING else value

    @property
    def max_grad_norm(self) -> float | None:
        """The bound on the norm of all gradients that it has by default."""
        clips = self.default("clip_grad")
        bound: float | None = self.default("clip_norm" if clips else "max_grad_norm")
        return bound


# None: the preset's
_ADAMW = Optimizer(ADAMW, None, {"lr": None, "weight_decay": 0.1, "max_grad_norm": None})


@functools.cache
def find(name: str, plugin: str | None = None) -> Optimizer:
    """The optimizer of that name; AdamW is there without pylo_dist.

    Args:
        plugin: a module or a file that registers optimizers, imported first.

    Raises:
        ValueError: there is none, or pylo_dist or the plugin cannot be imported.
    """
    if name == ADAMW and plugin is None:
        return _ADAMW
    known = every(plugin)
    if name not in known:
        raise ValueError(
            f"argument --optimizer: invalid choice: {name!r} (choose from {', '.join(known)}; one "
            "of your own: --plugin); see --help."
        )
    return known[name]


def every(plugin: str | None = None) -> dict[str, Optimizer]:
    """All optimizers by name. Raises ValueError where pylo_dist or `plugin` cannot be imported."""
    try:
        import pylo_dist
    except ImportError as error:
        raise ValueError(
            f"pylo_dist cannot be imported ({error}); install it: pip install ."
        ) from None
    if plugin is not None:
        pylo_dist.load_plugin(plugin)
    entries = pylo_dist.registered_optimizers()
    if ADAMW in entries:
        raise ValueError(f"{ADAMW!r} is PyTorch's here; register yours under another name")
    found = {name: Optimizer(name, entry, entry.arguments) for name, entry in entries.items()}
    return {**found, ADAMW: _ADAMW}


def taking(argument: str, plugin: str | None = None) -> list[str]:
    """The names of those whose class has the argument. Raises ValueError as `every`."""
    return [name for name, optimizer in every(plugin).items() if optimizer.takes(argument)]


def in_words(plugin: str | None = None) -> dict[str, str]:
    """What --help says of them, by flag: names, defaults, and who takes what. Nothing without
    pylo_dist; raises ValueError for a plugin that cannot be imported.
    """
    try:
        known = every(plugin)
    except ValueError:
        if plugin is not None:
            raise
        return {}

    def defaults(value_of: Callable[[Optimizer], float | None], none: str) -> str:
        by_text: dict[str, list[str]] = {}
        for name, optimizer in known.items():
            value = value_of(optimizer)
            by_text.setdefault(none if value is None else f"{value:g}", []).append(name)
        most = next((t for t, names in by_text.items() if 2 * len(names) > len(known)), None)
        found = [f"{text} for {listed(names)}" for text, names in by_text.items() if text != most]
        return ", ".join([*found, *([f"{most} for others"] if most is not None else [])])

    return {
        "optimizer": listed(list(known), "or"),
        "lr": defaults(lambda optimizer: optimizer.default("lr"), "the preset's"),
        "weight_decay": defaults(lambda optimizer: optimizer.default("weight_decay"), "none"),
        "max_grad_norm": defaults(lambda optimizer: optimizer.max_grad_norm, "no clipping"),
        "num_steps": listed(taking("num_steps", plugin)),
        "mup": listed(taking("width_mults", plugin)),
    }


def listed(names: Sequence[str], last: str = "and") -> str:
    """a, b and c"""
    return f" {last} ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])
