"""Checkpoints: folders with checksums that are published last, and whole copies of sharded state. Writes the folder it is given.

A folder is written by torch.distributed.checkpoint, so any layout on any number of ranks loads what any other saved.

    folder/                  while it is written: .folder.partial/, renamed in one step when everything is on the disk
        __0_0.distcp ...     torch.distributed.checkpoint's files
        .metadata            its index, a pickle of torch's: unpickled only after its checksum matched
        manifest.json        size and sha256 of every file, what the caller noted, and a sha256 over the manifest itself
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

Folder = Union[str, "os.PathLike[str]"]

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that may not be loaded; the message names the file or the key."""


def save(folder: Folder, state: Mapping[str, Any], *, meta: Mapping[str, Any] | None = None, process_group: Any = None) -> None:
    """Write `state` to a new folder: aside, with checksums, published last. All ranks call it alike.

    A reader sees the whole folder or none of it: what a killed run leaves behind has another name (`.{name}.partial`, cleared
    by the next save of the same name). Returns on every rank when the folder is there.

    Args:
        folder: must not exist; on a file system that all ranks share.
        state: by key, a model, optimizer or scheduler (anything with `state_dict` and `load_state_dict`), or nested dicts of
            tensors, numbers and strings. DDP and torch.compile wrappers are taken off, so that names do not depend on them. What
            differs between ranks needs a key of its own on each rank, e.g. {"rng": {str(rank): ...}}.
        meta: kept in the manifest as JSON, e.g. {"step": 100}; rank 0's counts.
        process_group: the ranks that take part; None: the world, or this process alone without torch.distributed.

    Raises:
        CheckpointError: the folder exists, or some rank could not write its part; raised on all ranks, nothing is published.
    """
    raise NotImplementedError


def load(
    folder: Folder, state: Mapping[str, Any], *, optional: Sequence[str] = (), process_group: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load what `save` wrote, on any number of ranks and any layout. All ranks call it alike.

    First every checksum is verified, then keys, shapes and dtypes are compared, then all is read aside, and each optimizer checks
    what it would load; only then does anything change.

    Args:
        folder: a published checkpoint.
        state: as for `save`: objects are loaded through their `load_state_dict`; nested dicts are the template of what is read
            (their tensors say shape, dtype and device; they are not written).
        optional: keys of `state` of which entries may be missing in the checkpoint, e.g. ("rng",) on another number of ranks;
            such entries are left out of the result.

    Returns:
        The loaded entries of those keys of `state` that are no objects, and the `meta` of `save`.

    Raises:
        CheckpointError: a file that is missing, truncated or changed, by name; a key that is missing or does not fit, by name; on
            all ranks. Nothing has been changed then.
        ValueError: what the load_state_dict of an optimizer refuses (another model, rule, weights or format), on all ranks.
    """
    raise NotImplementedError


def verify(folder: Folder, *, process_group: Any = None) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest, without torch reading any of them; return its `meta`.

    The ranks of the process group share the work; call it alike on all of them.

    Raises:
        CheckpointError: as `load`.
    """
    raise NotImplementedError


def published(parent: Folder) -> list[Path]:
    """The published checkpoints in `parent`, sorted by name ("step-000100" < "step-000200"); [] where there is none.

    Looks for manifests only; `load` verifies.
    """
    return sorted(path.parent for path in Path(parent).glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))
