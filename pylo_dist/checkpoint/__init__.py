"""Checkpoints: folders with checksums that any layout on any number of ranks loads.

`tree` matches nested states by key, `folder` saves and loads; below it `manifest` says which files
there are, `files` has their digests, `archive`, `index` and `storage` stand between them and
torch.distributed.checkpoint, and run nothing of what they read. `full_state` gathers whole tensors
for torch.save.
"""

from .folder import clear, load, published, read_meta, save, verify
from .manifest import FORMAT, MANIFEST
from .tree import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "CheckpointError",
    "clear",
    "load",
    "published",
    "read_meta",
    "save",
    "verify",
]
