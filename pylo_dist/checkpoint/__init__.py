"""Checkpoints: folders with checksums that any layout on any number of ranks loads."""

from .folder import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    load,
    published,
    read_meta,
    save,
    verify,
)

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
