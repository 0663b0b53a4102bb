"""Learned optimizers by name: one entry each for all that belongs to it.

Writes its own table, and with each entry those of weights/registry.py. Commands, DeepSpeed's JSON
and model cards read it; an optimizer of the package and one of a user's own are the same to them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..weights import Architecture, Registered, register_architecture
from .learned import LearnedOptimizer
from .settings import REQUIRED, arguments_of

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Registration:
    """A learned optimizer, and what belongs to it. Raises ValueError for entries that cannot be.

    What else a command needs to know, such as the default learning rate or whether the length of
    the run is asked for, the face's own arguments say.

    Attributes:
        name: on the command line of launch/gpt2.py, in small letters.
        face: the class that users construct.
        architecture: of its meta-network.
        weights: names that `weights=` of the face understands.
        deepspeed: the "type" in DeepSpeed's JSON; "": the name of the face.
    """

    name: str
    face: type[LearnedOptimizer]
    architecture: Architecture
    weights: Mapping[str, Registered] = field(default_factory=dict)
    deepspeed: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"optimizer name {self.name!r}: wanted small letters, digits, '-' and '_'"
            )
        if not (isinstance(self.face, type) and issubclass(self.face, LearnedOptimizer)):
            raise ValueError(
                f"optimizer {self.name!r}: its face is {self.face!r}; wanted a class derived from "
                "pylo_dist.LearnedOptimizer"
            )
        for name, entry in self.weights.items():
            if entry.architecture != self.architecture.name:
                raise ValueError(
                    f"optimizer {self.name!r}: weights {name!r} are for {entry.architecture}, it "
                    f"needs {self.architecture.name}"
                )
        object.__setattr__(self, "deepspeed", self.deepspeed or self.face.__name__)
        if not self.deepspeed.isidentifier():
            raise ValueError(
                f"optimizer {self.name!r}: deepspeed={self.deepspeed!r}; wanted a name such as "
                f"{self.face.__name__!r}"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the face, see `arguments_of`."""
        return dict(arguments_of(self.face))

    def example(self) -> str:
        """Code that builds the optimizer on weights, for their model card."""
        needed = [name for name, default in self.arguments.items() if default is REQUIRED]
        arguments = [
            "model.parameters()",
            'weights="THIS REPOSITORY OR FOLDER"',
            *(f"{name}=..." for name in needed if name != "weights"),
        ]
        package, module, face = __name__.partition(".")[0], self.face.__module__, self.face.__name__
        if module.partition(".")[0] == package:
            head, call = f"import {package}", f"{package}.{face}"
        else:
            head, call = f"from {module} import {face}", face
        return f"{head}\noptimizer = {call}({', '.join(arguments)})"


_ENTRIES: dict[str, Registration] = {}


def register_optimizer(entry: Registration) -> None:
    """Make an optimizer known by its names, with its architecture and weights; all or nothing.

    The same entry again does nothing, and a class whose definition was run again (a notebook's
    cell, a reloaded module) takes the place of its former self.

    Raises:
        ValueError: one of the names is taken by something else.
    """
    for other in _ENTRIES.values():
        if other == entry or _is_redefined(other, entry):
            continue
        for what, taken, name in (
            ("optimizer name", other.name, entry.name),
            ('DeepSpeed "type"', other.deepspeed, entry.deepspeed),
        ):
            if taken == name:
                raise ValueError(
                    f"{what} {name!r} is taken by {other.face.__module__}."
                    f"{other.face.__qualname__}; register under another name"
                )
    register_architecture(entry.architecture, entry.weights, entry.example())
    _ENTRIES[entry.name] = entry


def _is_redefined(old: Registration, new: Registration) -> bool:
    places = [(entry.face.__module__, entry.face.__qualname__) for entry in (old, new)]
    return places[0] == places[1] and replace(old, face=new.face) == new


def registered_optimizers() -> dict[str, Registration]:
    """All registered optimizers by name."""
    return dict(_ENTRIES)


def load_plugin(where: str) -> None:
    """Import a module, or run a Python file as one, that registers optimizers; once.

    Args:
        where: "package.module", or a path that ends in .py; the file's module has its name.

    Raises:
        ValueError: it cannot be imported, or registers a name that is taken.
    """
    try:
        if where.endswith(".py"):
            _import_file(Path(where))
        else:
            importlib.import_module(where)
    except Exception as error:  # whatever the code of a user raises
        raise ValueError(
            f"plugin {where} cannot be imported ({type(error).__name__}: {error}); wanted a module "
            "or a .py file that calls pylo_dist.register_optimizer"
        ) from error


def _import_file(path: Path) -> None:
    name, path = path.stem, path.resolve()
    loaded = sys.modules.get(name)
    if loaded is not None:
        if Path(getattr(loaded, "__file__", None) or ".").resolve() != path:
            raise ValueError(f"there is a module {name!r} already: give the file another name")
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # pickles find it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
