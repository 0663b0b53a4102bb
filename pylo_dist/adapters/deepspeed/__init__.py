"""DeepSpeed's partitions: the optimizer on them, and the checkpoints. Imports no DeepSpeed."""

from .client import become
from .layout import Layout, Source, find_layout
from .optimizer import STATE_KEY, DeepSpeedOptimizer

__all__ = ["STATE_KEY", "DeepSpeedOptimizer", "Layout", "Source", "become", "find_layout"]
