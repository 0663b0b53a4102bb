"""Learned weights: where they come from, and where they go."""

from .client import printable
from .load import (
    CARD_KEY,
    MetaNetwork,
    WeightsChangedError,
    WeightsLike,
    load_weights,
    read_file,
)
from .registry import (
    DEMO,
    PYLO_LICENCE,
    UNKNOWN,
    Architecture,
    Registered,
    WeightsError,
    architecture_named,
    architectures,
    register_architecture,
    register_weights,
    registered_entry,
    registered_weights,
)

__all__ = [
    "CARD_KEY",
    "DEMO",
    "PYLO_LICENCE",
    "UNKNOWN",
    "Architecture",
    "MetaNetwork",
    "Registered",
    "WeightsChangedError",
    "WeightsError",
    "WeightsLike",
    "architecture_named",
    "architectures",
    "load_weights",
    "printable",
    "read_file",
    "register_architecture",
    "register_weights",
    "registered_entry",
    "registered_weights",
]
