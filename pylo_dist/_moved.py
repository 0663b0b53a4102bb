"""Old module paths and names, for one version: what moved where. Nothing in the package imports
this but `__init__`.

from pylo_dist.reference import commit      # still works, and warns: pylo_dist.maths.reference
from pylo_dist.weights import VELO          # and warns: pylo_dist.weights.architectures()["velo"]
batch.keep[i]                               # in a rule, and warns: batch.moves
torch.load("pickled_optimizer.pt", weights_only=False)    # of the version before
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from . import checkpoint, weights
from .checkpoint import folder
from .core.rule import Batch
from .maths.factored import ThreePassRule
from .optimizer.learned import LearnedOptimizer
from .optimizer.parameters import Parameters

MODULES: dict[str, tuple[str, ...]] = {
    "shards": ("core.shards", "core.pieces"),
    "state": ("core.state",),
    "optim.base": ("core.rule", "core.requests"),
    "reference": ("maths.reference",),
    "ops": ("maths.compiled",),
    "optim.factored": ("maths.factored",),
    "optim.stacks": ("maths.stacks",),
    "optim.orthogonal": ("maths.orthogonal",),
    "optim.gram": ("maths.gram",),
    "optim.owners": ("maths.owners",),
    "hub": ("weights.hub",),
    "publish": ("weights.publish",),
    "adapters.plain": ("layouts.plain",),
    "adapters.dtensor": ("layouts.dtensor", "layouts.describe"),
    "adapters.gradients": ("layouts.gradients",),
    "adapters.construction": ("layouts.construction",),
    "engine": ("optimizer.engine",),
    "sharded_state": ("optimizer.sharded_state", "optimizer.loading"),
    "clip": ("optimizer.clip",),
    "report": ("optimizer.report",),
    "gather": ("checkpoint.full_state",),
    "adapters.buckets": ("adapters.zero.buckets",),
    "adapters.reduction": ("adapters.zero.reduction",),
    "adapters.gathering": ("adapters.zero.gathering",),
    "adapters.deepspeed_checkpoint": ("adapters.deepspeed.checkpoint",),
}
# names that are others where their module is now
RENAMED = {"optim.stacks": {"gather": "stacked", "scatter": "put_back"}}
# names that moved out of modules which are still there
NAMES = {
    "optim.velo": {
        **dict.fromkeys(("FRACTIONS", "NUM_LOSS_MEANS", "LossBuffer"), "maths.lstm"),
        "NETWORK": "maths.mixed",
    },
    "optim.arguments": {"wide": "maths.reference"},
}
# constants of weights, by the architecture they are
ARCHITECTURES = {"SMALL_FC": "small_fc", "ELO": "elo", "CELO2": "celo2", "VELO": "velo"}
# attributes and methods of Batch, which rules of users read
BATCH = {
    "keep": "moves",
    "go": "taken",
    "kept": "cache",
    "kept_sum": "reused_sum",
    "moving": "candidates",
    "gathered": "summed",
}
# methods of classes
METHODS: dict[type, dict[str, str]] = {
    LearnedOptimizer: {"gradients_arrived": "early.arrived", "forget_gradients": "early.forget"},
    ThreePassRule: {"gather": "step_tensors"},
}


class _Moved(ModuleType):
    """An old module: looks every name up where it is now."""

    def __init__(self, name: str, targets: Sequence[str]) -> None:
        super().__init__(name, f"Moved to {' and '.join(targets)}.")
        self._targets = targets

    def __getattr__(self, name: str) -> Any:
        name = RENAMED.get(self.__name__.partition(".")[2], {}).get(name, name)
        if not name.startswith("__"):
            for target in self._targets:
                module = importlib.import_module(target)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}; it moved to "
            f"{' and '.join(self._targets)}"
        )

    def __dir__(self) -> list[str]:
        return sorted(
            {name for target in self._targets for name in dir(importlib.import_module(target))}
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old names of modules."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != __package__ or old not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _module(spec.name.partition(".")[2])

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def _module(old: str) -> _Moved:
    """A moved module, with a warning to the caller's caller."""
    targets = [f"{__package__}.{new}" for new in MODULES[old]]
    path = f"{__package__}.{old}"
    _warn(path, " and ".join(targets), "path", stacklevel=4)
    return _Moved(path, targets)


def _warn(old: str, new: str, what: str = "name", stacklevel: int = 3) -> None:
    """Of whoever wrote the old name: frames of importlib between are passed over by warnings."""
    warnings.warn(
        f"{old} is {new} now; the old {what} goes with the next version",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def _of_weights(name: str) -> Any:
    """`__getattr__` of the weights package."""
    module = weights.__name__
    if name == "ARCHITECTURES":
        _warn(f"{module}.{name}", f"{module}.architectures()")
        return weights.architectures()
    if name in ARCHITECTURES:
        _warn(f"{module}.{name}", f"{module}.architectures()[{ARCHITECTURES[name]!r}]")
        return weights.architectures()[ARCHITECTURES[name]]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _of_checkpoint(name: str) -> Any:
    """`__getattr__` of the checkpoint package."""
    if name != "Folder":
        raise AttributeError(f"module {checkpoint.__name__!r} has no attribute {name!r}")
    _warn(f"{checkpoint.__name__}.{name}", f"{folder.__name__}.{name}")
    return folder.Folder


def _of_package(package: str) -> Callable[[str], Any]:
    """`__getattr__` of a package whose modules moved: they were its attributes as soon as it was
    imported.
    """

    def find(name: str) -> Any:
        path = f"{package}.{name}"
        old = path.partition(".")[2]
        if old not in MODULES:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if path not in sys.modules:
            sys.modules[path] = _module(old)
        return sys.modules[path]

    return find


def _of_module(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """`__getattr__` of a module that names moved out of."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = f"{__package__}.{names[name]}"
        _warn(f"{module}.{name}", f"{new}.{name}")
        return getattr(importlib.import_module(new), name)

    return find


def _of_batch(old: str, new: str) -> property:
    def read(batch: Batch) -> Any:
        _warn(f"Batch.{old}", f"Batch.{new}")
        return getattr(batch, new)

    return property(read, doc=f"`{new}`, by its old name.")


def _of_class(kind: type, old: str, new: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn(f"{kind.__name__}.{old}", f"{kind.__name__}.{new}")
        return operator.attrgetter(new)(self)(*args, **kwargs)

    call.__name__, call.__doc__ = old, f"`{new}`, by its old name."
    return call


def _of_pickles(set_state: Callable[[Any, dict[str, Any]], None]) -> Callable[..., None]:
    """`__setstate__` of optimizers that takes pickles of the version before, too."""

    def __setstate__(self: LearnedOptimizer, state: dict[str, Any]) -> None:
        if "_bindings" in state:
            state = dict(state)
            parameters = Parameters(state["rule"], type(self).__name__)
            parameters.bindings, parameters.fields = state.pop("_bindings"), state.pop("_fields")
            state["_params"] = parameters
        set_state(self, state)

    return __setstate__


def install() -> None:
    """Make the old paths and names known; again it does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for package in {"", *(old.rpartition(".")[0] for old in MODULES)}:
        path = f"{__package__}.{package}".rstrip(".")
        vars(sys.modules[path])["__getattr__"] = _of_package(path)
    for module, names in NAMES.items():
        path = f"{__package__}.{module}"
        vars(sys.modules[path])["__getattr__"] = _of_module(path, names)
    vars(weights)["__getattr__"] = _of_weights
    vars(checkpoint)["__getattr__"] = _of_checkpoint
    for old, new in BATCH.items():
        setattr(Batch, old, _of_batch(old, new))
    for kind, methods in METHODS.items():
        for old, new in methods.items():
            setattr(kind, old, _of_class(kind, old, new))
    restore = _of_pickles(LearnedOptimizer.__setstate__)
    LearnedOptimizer.__setstate__ = restore  # type: ignore[method-assign]
