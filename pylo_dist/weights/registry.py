"""What goes by a name: the architectures of meta-networks, and released or own weights.

Writes its two tables only; the names themselves are registered where a learned optimizer is
defined, see optimizer/registry.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

UNKNOWN = "unknown"
# of the files that PyLO fetches. They were not seen when this was written: no sha256 is pinned, and
# what is unknown says so.
PYLO_LICENCE = "apache-2.0 (declared by PyLO's model classes)"
# of the files of Celo's authors, by the repository amoudgl/celo
CELO_LICENCE = "mit (of the repository amoudgl/celo, which says nothing of its own on weights)"
CELO_TASKS = (
    "4 tasks of image classification with small MLPs, augmented (fast_velo of amoudgl/celo)"
)
CELO_HORIZON = 2000  # steps: runs of 100 to 2000

_SIZE = re.compile(r"[0-9]*[A-Za-z]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class WeightsError(ValueError):
    """Learned weights that cannot be had or do not fit; the message names the ways out."""


@dataclass(frozen=True, slots=True)
class FlaxNames:
    """Where the tensors of an architecture stand in files that flax wrote.

    Attributes:
        tensors: by our name, the keys that lead to the array, and whether its last two axes are
            swapped, as in y = x @ w. A "*" in the last key stands for 0, 1, 2 and so on: these
            arrays are joined along their last axis but one.
        decays: decays that stand there too, by name, and their keys.
        units: of the hidden layers. A network that has fewer is completed with units that say 0,
            which is the same function. None: whatever the file has.
    """

    tensors: Mapping[str, tuple[tuple[str, ...], bool]]
    decays: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    units: int | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A meta-network's tensors, and the decays that its weights imply when none are stored with
    them. Raises ValueError for a shape that is none.

    Attributes:
        name: as in safetensors cards.
        shapes: every tensor and its shape; exactly these must be there. A letter stands for a size
            that the file decides, the same wherever it occurs, a number before it for a multiple:
            ("4H", "2H").
        decays: e.g. {"momentum_decays": offsets}, see the optimizer's constructor.
        ignored: names that may be there and are not read.
        config: settings in PyLO's config.json that change the function but no tensor, and the value
            that is computed here.
        constants: numbers that the rule computes with, by name, and their values where neither the
            card of the weights nor their registration says another.
        variants: what weights with other constants are called, and these.
        flax: where the tensors stand in files of flax; None: such files are not read.
    """

    name: str
    shapes: Mapping[str, tuple[int | str, ...]]
    decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    flax: FlaxNames | None = None

    def __post_init__(self) -> None:
        for key, shape in self.shapes.items():
            for size in shape:
                if not (_SIZE.fullmatch(size) if isinstance(size, str) else size > 0):
                    raise ValueError(
                        f"architecture {self.name!r}: {key!r} has shape {tuple(shape)}; wanted "
                        'sizes of 1 or more, or letters such as "H" and "4H"'
                    )


@dataclass(frozen=True, slots=True)
class Registered:
    """A name that `weights=` understands: where its file is and what belongs to it.

    Attributes:
        architecture: the name of one, such as "small_fc".
        source: a Hub repository "org/name[@revision]", or a local file or folder; several, joined
            by "+", hold one part each.
        decays: decays that belong to the weights but are not stored in the file.
        note: one line for people: origin and anything to know.
        horizon: the longest run of the inner training, in steps; None: unknown.
        licence: its identifier first, as in "apache-2.0"; then, if need be, who says so.
        revision: branch, tag or commit for sources without an "@"; "": the default branch.
        sha256: what the file must have, hex, joined by "+" as the sources are; "": unknown, not
            compared.
        trained_on: the tasks of meta-training, for people.
        constants: as in `Architecture`, of these weights. Files of flax hold none, so those of an
            architecture that has some are read only where this says them.
    """

    architecture: str
    source: str
    decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""
    horizon: int | None = None
    licence: str = UNKNOWN
    revision: str = ""
    sha256: str = ""
    trained_on: str = UNKNOWN
    constants: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        digests = self.sha256.split("+") if self.sha256 else []
        if digests and (
            len(digests) != len(self.source.split("+"))
            or not all(_SHA256.fullmatch(digest) for digest in digests)
        ):
            raise ValueError(
                f"sha256={self.sha256!r} of {self.source}: wanted 64 lower-case hex digits for "
                "every source, in '+'"
            )


DEMO = Registered(
    "small_fc",
    "demo",
    note="built in, made by hand, for trying things out",
    licence="apache-2.0",
    trained_on="nothing: its numbers were set by hand",
)

_ARCHITECTURES: dict[str, Architecture] = {}
_EXAMPLES: dict[str, str] = {}  # by architecture: code that builds an optimizer on its weights
_WEIGHTS: dict[str, Registered] = {}


def register_architecture(
    architecture: Architecture, weights: Mapping[str, Registered] | None = None, example: str = ""
) -> None:
    """Make an architecture known, and names of its weights; all of it or nothing.

    Args:
        weights: by name, see `register_weights`.
        example: code that builds an optimizer on such weights, for model cards; that of the first
            registration is shown.

    Raises:
        ValueError: a name is taken by something else.
    """
    known = _ARCHITECTURES.get(architecture.name, architecture)
    if known != architecture:
        raise ValueError(
            f"architecture name {architecture.name!r} is taken by one with other tensors or "
            "decays; register under another name"
        )
    weights = dict(weights or {})
    for name, entry in weights.items():
        _check_free(name, entry)
    _ARCHITECTURES[architecture.name] = architecture
    _EXAMPLES.setdefault(architecture.name, example)
    _WEIGHTS.update(weights)


def architectures() -> dict[str, Architecture]:
    """All known architectures by name."""
    return dict(_ARCHITECTURES)


def architecture_named(name: str) -> Architecture:
    """The architecture of that name. Raises WeightsError for an unknown one."""
    if name not in _ARCHITECTURES:
        raise WeightsError(f"architecture {name!r}: wanted one of {known_architectures()}")
    return _ARCHITECTURES[name]


def flax_kinds() -> dict[str, tuple[Architecture, Mapping[str, float]]]:
    """What files of flax can hold: architectures and their variants by name, and the constants."""
    kinds: dict[str, tuple[Architecture, Mapping[str, float]]] = {}
    for known in _ARCHITECTURES.values():
        if known.flax is not None:
            kinds[known.name] = (known, known.constants)
            kinds |= {name: (known, constants) for name, constants in known.variants.items()}
    return kinds


def known_architectures() -> str:
    """Their names, and how others become known, for errors."""
    return (
        f"{', '.join(_ARCHITECTURES)} (pylo_dist.register_optimizer makes that of an optimizer of "
        "your own known)"
    )


def example_of(architecture: str) -> str:
    """Code that builds an optimizer on weights of that architecture; "" where nobody said it."""
    return _EXAMPLES[architecture]


def register_weights(name: str, entry: Registered) -> None:
    """Make `weights=name` mean `entry`. Raises ValueError when the name is taken by another."""
    _check_free(name, entry)
    _WEIGHTS[name] = entry


def registered_weights() -> dict[str, Registered]:
    """All registered names."""
    return dict(_WEIGHTS)


def registered_entry(name: str) -> Registered | None:
    """The entry of a name, else None; "name@revision" is that of `name` at another revision, whose
    sha256 is not known.
    """
    base, _, revision = name.partition("@")
    entry = _WEIGHTS.get(name)
    if (
        entry is None
        and revision
        and "+" not in name
        and base in _WEIGHTS
        and "@" not in _WEIGHTS[base].source
    ):
        entry = replace(_WEIGHTS[base], revision=revision, sha256="")
    return entry


def _check_free(name: str, entry: Registered) -> None:
    if name == "demo" or _WEIGHTS.get(name, entry) != entry:
        raise ValueError(f"weights name {name!r} is taken; register under another name")
