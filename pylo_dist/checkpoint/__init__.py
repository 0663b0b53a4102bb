"""Checkpoints: folders with checksums that any layout on any number of ranks loads.

`tree` matches nested states by key, `folder` writes, verifies and reads; `full_state` gathers whole
tensors for torch.save.
"""

from .folder import FORMAT, MANIFEST, load, published, read_meta, save, verify
from .tree import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "CheckpointError",
    "load",
    "published",
    "read_meta",
    "save",
    "verify",
]
