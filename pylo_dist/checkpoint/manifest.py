"""The manifest of a checkpoint: which files it has, how large they are, their digests. Reads and
writes manifest.json.

Whoever can write a folder can write its manifest: it tells damage and mistakes, not who the author
is. So what it says is checked entry by entry before any of it is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .files import BLOCK, DIGESTS, KNOWN_DIGESTS, Entry, open_regular
from .tree import CheckpointError

MANIFEST = "manifest.json"
INDEX = ".metadata"  # torch.distributed.checkpoint's
# of the folder; that of the state is in its parameter groups. 1: one sha256 per file; 2: a digest
# per block, which is taken while the file is written and compared while it is read
FORMAT = 2
KNOWN_FORMATS = (1, 2)
MOST_BYTES = 2**28  # of a manifest: 4 million blocks
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a published checkpoint says of itself.

    Attributes:
        path: of the manifest, for messages.
        format: one of KNOWN_FORMATS.
        meta: what the caller of `save` noted.
        files: by bare name.
        digest: sha256 of all of it: two checkpoints with the same one are the same.
        torch: the version that wrote it, where it says so.
    """

    path: Path
    format: int
    meta: dict[str, Any]
    files: dict[str, Entry]
    digest: str
    torch: str | None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError: no manifest, a damaged one, or one that `write` never wrote."""
        path = folder / MANIFEST
        with open_regular(path, "this is no published checkpoint") as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
                raise CheckpointError(f"{path}: {size} bytes, wanted at most {MOST_BYTES}")
            text = file.read()
        odd: list[str] = []

        def constant(name: str) -> float:
            odd.append(name)
            return float(name)

        try:
            # decoded here: json.loads would guess at other encodings
            content = json.loads(text.decode(), parse_constant=constant)
            claimed = content.pop("sha256")
            found = digest_of(content, "sha256")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); the file was changed or is damaged"
            ) from None
        if claimed != found:
            raise CheckpointError(
                f"{path}: its sha256 is not the one in it; the file was changed or is damaged"
            )
        if content.get("format") not in KNOWN_FORMATS or isinstance(content["format"], bool):
            raise CheckpointError(
                f"{path}: format {content.get('format')!r}, wanted one of {KNOWN_FORMATS}; it is "
                f"of pylo_dist {content.get('pylo_dist')!r}"
            )
        if odd and content["format"] > 1:  # format 1 took them into `meta`
            raise CheckpointError(f"{path} holds {odd[0]}, which is no JSON")
        by = content.get("torch")
        by = by[:40] if isinstance(by, str) else None
        return cls(path, content["format"], *_checked(path, content), found, by)

    def seen(self) -> str:
        """Which checkpoint this is, for people."""
        return f"{self.digest[:12]} (meta {str(self.meta)[:60]})"

    @contextmanager
    def of_another_torch(self) -> Iterator[None]:
        """Around reading: a CheckpointError says which torch wrote what cannot be read."""
        try:
            yield
        except CheckpointError as error:
            if self.torch in (None, torch.__version__):
                raise
            raise CheckpointError(
                f"{error} (torch {self.torch} wrote it, this is {torch.__version__})"
            ) from error


def _checked(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The `meta` and `files` of a manifest. Raises CheckpointError for what is none."""
    for key in ("meta", "files"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{path}: {key!r} is {content.get(key)!r:.80}, wanted an object")
    meta: dict[str, Any] = content["meta"]
    files: dict[str, Any] = content["files"]
    algorithm = "sha256" if content["format"] == 1 else content.get("digest")
    if algorithm not in KNOWN_DIGESTS:
        raise CheckpointError(
            f"{path}: its digest is {algorithm!r:.80}, wanted one of {', '.join(KNOWN_DIGESTS)}"
        )
    if algorithm not in DIGESTS:
        raise CheckpointError(
            f"{path}: its digest is {algorithm}, which this Python has no package for: "
            f"pip install {algorithm}"
        )
    entries = {}
    for name, entry in files.items():
        # a name with a separator in it, or of the manifest itself, would leave the folder
        odd = not name or Path(name).name != name or "\\" in name or "\0" in name
        if odd or name in ("..", MANIFEST):
            raise CheckpointError(f"{path} lists {name!r:.80}, wanted the bare name of a file")
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if type(size) is not int or not 0 <= size < 2**62:
            raise CheckpointError(
                f"{path}: the entry of {name!r} is {entry!r:.80}, wanted its size in 'bytes'"
            )
        if content["format"] == 1:
            digests, wanted = [entry.get("sha256")], 1
        else:
            digests, wanted = entry.get("blocks"), -(-size // BLOCK)
        if (
            not isinstance(digests, list)
            or len(digests) != wanted
            or not all(isinstance(digest, str) and _HEX.fullmatch(digest) for digest in digests)
        ):
            raise CheckpointError(
                f"{path}: the entry of {name!r} has not the {wanted} {algorithm} digests of "
                f"{size} bytes"
            )
        block = None if content["format"] == 1 else BLOCK
        entries[name] = Entry(size, algorithm, block, tuple(digests))
    if INDEX not in entries:
        raise CheckpointError(f"{path} does not list {INDEX}, the index of the other files")
    return meta, entries


def write(folder: Path, files: Mapping[str, Entry], meta: Mapping[str, Any], **more: Any) -> None:
    """Write the manifest of a folder and have it on the disk; `more`: for people."""
    content = {
        "format": FORMAT,
        "pylo_dist": __version__,
        **more,
        "meta": dict(meta),
        "digest": next(iter(files.values())).algorithm,
        "files": {
            name: {"bytes": entry.size, "blocks": list(entry.digests)}
            for name, entry in sorted(files.items())
        },
    }
    with (folder / MANIFEST).open("x") as file:
        json.dump({**content, "sha256": digest_of(content, "sha256")}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def check_meta(meta: Mapping[str, Any]) -> None:
    """Raise CheckpointError or TypeError for what cannot be kept as JSON."""
    try:
        json.dumps(dict(meta), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"meta cannot be kept as JSON ({error}); put numbers that are infinite or NaN, and "
            "what is nested deeply, into `state` or into text"
        ) from None


def digest_of(content: Any, algorithm: str) -> str:
    """Of JSON-able content."""
    return str(DIGESTS[algorithm](json.dumps(content, sort_keys=True).encode()).hexdigest())


@functools.cache
def fastest_digests() -> tuple[str, ...]:
    """The names of the digests that can be taken here, those first that this machine takes in the
    least time: which ones they are depends on the processor's instructions.
    """

    def seconds(name: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            DIGESTS[name](bytes(BLOCK))
            times.append(time.perf_counter() - start)
        return min(times)

    return tuple(sorted(DIGESTS, key=seconds))
