"""The index of torch.distributed.checkpoint, a pickle, read without running any of it.

Every class that such an index names has a stand-in here that keeps what it is given and does
nothing; another name is refused. What the stand-ins hold is then checked, field by field, and made
into torch's own classes. Reads nothing but the bytes it is given.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .files import Entry
from .tree import CheckpointError

MOST_IN_A_LIST = 2**20  # entries of a state's list: what is read makes room for the last one


class _StandIn:
    """What the index says of an object: never the object."""

    state: Any = None

    def __new__(cls, *args: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_StandIn):
    pass


class _Chunk(_StandIn):
    pass


class _Bytes(_StandIn):
    pass


class _Properties(_StandIn):
    pass


class _Whole(_StandIn):
    pass


class _Key(_StandIn):
    pass


class _Place(_StandIn):
    pass


def _stand_ins() -> dict[tuple[str, str], Any]:
    """By module and name, new classes for each index: nothing that one does to them stays."""
    metadata, storage = (
        f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem")
    )
    known: dict[tuple[str, str], Any] = {
        (metadata, "Metadata"): _Whole,
        (metadata, "MetadataIndex"): _Key,
        (metadata, "TensorStorageMetadata"): _Tensor,
        (metadata, "BytesStorageMetadata"): _Bytes,
        (metadata, "ChunkStorageMetadata"): _Chunk,
        (metadata, "TensorProperties"): _Properties,
        (metadata, "StorageMeta"): _StandIn,
        (metadata, "_MEM_FORMAT_ENCODING"): _StandIn,
        (storage, "_StorageInfo"): _Place,
        ("torch.serialization", "_get_layout"): _StandIn,
        ("builtins", "getattr"): _StandIn,  # how Python 3.11.0 writes an Enum
    }
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"):
            known[module, name] = _StandIn
    found = {key: type(value.__name__, (value,), {}) for key, value in known.items()}
    return {**found, ("torch", "Size"): tuple}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")


def parse(data: bytes, path: Path, files: Mapping[str, Entry]) -> Metadata:
    """The index of a checkpoint.

    Args:
        data: its bytes.
        path: for messages.
        files: those of the manifest; the index may lead to no other ones, nor beyond their ends.

    Raises:
        CheckpointError: another class is named, or something in it is not as torch writes it.
    """
    try:
        return _Checked(path, files).metadata(_Unpickler(data).load())
    except CheckpointError:
        raise
    # of the pickle machine too: there is nothing that hostile bytes do not raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is no index of torch.distributed.checkpoint: {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from None


class _Checked:
    """Torch's classes from stand-ins."""

    def __init__(self, path: Path, files: Mapping[str, Entry]) -> None:
        self._path, self._files = path, files

    def _refuse(self, what: str, found: Any) -> NoReturn:
        raise CheckpointError(f"{self._path}: {what} is {found!r:.80}, which torch never writes")

    def _fields(self, stand_in: Any, kind: type[_StandIn], what: str) -> dict[str, Any]:
        if not isinstance(stand_in, kind) or not isinstance(stand_in.state, dict):
            self._refuse(what, stand_in)
        return stand_in.state

    def _sizes(self, value: Any, what: str) -> torch.Size:
        if type(value) is not tuple or not all(type(n) is int and 0 <= n < 2**62 for n in value):
            self._refuse(what, value)
        return torch.Size(value)

    def metadata(self, read: Any) -> Metadata:
        fields = self._fields(read, _Whole, "the whole of it")
        entries, places, paths = (
            fields.get(name) for name in ("state_dict_metadata", "storage_data", "planner_data")
        )
        for name, value in (("entries", entries), ("places", places), ("paths", paths)):
            if type(value) is not dict:
                self._refuse(f"the table of {name}", value)
        assert entries is not None
        assert places is not None
        stored = dict(self._stored(key, place) for key, place in places.items())
        for name, entry in entries.items():
            if type(name) is not str:
                self._refuse("a key", name)
            entries[name] = self._entry(name, entry, stored)
        self._check_paths(paths, entries)
        return Metadata(entries, paths, stored, StorageMeta(), "1.0.0")

    def _stored(self, key: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
        key, place = self._fields(key, _Key, "a key"), self._fields(place, _Place, "a place")
        fqn, offset, hint = (key.get(name) for name in ("fqn", "offset", "index"))
        if type(fqn) is not str or not (hint is None or type(hint) is int):
            self._refuse("a key", key)
        file, start, length = (place.get(name) for name in ("relative_path", "offset", "length"))
        inside = type(file) is str and file in self._files
        if not inside or type(start) is not int or type(length) is not int:
            self._refuse(f"the place of {fqn!r}", place)
        if min(start, length) < 0 or start + length > self._files[file].size:
            self._refuse(f"the place of {fqn!r} in {file}", (start, length))
        if place.get("transform_descriptors"):
            self._refuse(f"the filters of {fqn!r}", place["transform_descriptors"])
        offset = None if offset is None else self._sizes(offset, f"the place of {fqn!r}")
        return MetadataIndex(fqn, offset, hint), _StorageInfo(file, start, length)

    def _entry(
        self, name: str, entry: Any, stored: Mapping[MetadataIndex, _StorageInfo]
    ) -> TensorStorageMetadata | BytesStorageMetadata:
        if isinstance(entry, _Bytes):
            if MetadataIndex(name) not in stored:
                self._refuse(f"the place of {name!r}", None)
            return BytesStorageMetadata()
        fields = self._fields(entry, _Tensor, f"the entry of {name!r}")
        properties, parts = fields.get("properties"), fields.get("chunks")
        size = self._sizes(fields.get("size"), f"the shape of {name!r}")
        dtype = properties.state[0] if isinstance(properties, _Properties) else None
        if not isinstance(dtype, torch.dtype):
            self._refuse(f"the dtype of {name!r}", dtype)
        if type(parts) is not list:
            self._refuse(f"the parts of {name!r}", parts)
        chunks = []
        for part in parts:
            given = self._fields(part, _Chunk, f"a part of {name!r}")
            offsets, sizes = (
                self._sizes(given.get(key), f"a part of {name!r}") for key in ("offsets", "sizes")
            )
            if not len(size) == len(offsets) == len(sizes) or any(
                low + n > end for low, n, end in zip(offsets, sizes, size, strict=True)
            ):
                self._refuse(f"a part of {name!r}", (offsets, sizes))
            place = stored.get(MetadataIndex(name, offsets))
            # what is wanted of memory is in the files: nobody makes room for more than they hold
            if place is None or math.prod(sizes) * dtype.itemsize > place.length:
                self._refuse(f"the place of a part of {name!r}", place)
            chunks.append(ChunkStorageMetadata(offsets, sizes))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            self._refuse(f"the number of elements in the parts of {name!r}", [*chunks])
        return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)

    def _check_paths(self, paths: Any, entries: Mapping[str, Any]) -> None:
        """Every key has one path through mappings (strings) and lists (numbers), no two the same,
        and none leads through the end of another.
        """
        if paths.keys() != entries.keys():
            self._refuse("a path", sorted(paths.keys() ^ entries.keys(), key=str)[:3])
        kinds: dict[tuple[Any, ...], type | None] = {}
        for key, path in paths.items():
            if type(path) is not tuple or not path or type(path[0]) is not str:
                self._refuse(f"the path of {key!r}", path)
            for i, step in enumerate(path):
                known = type(step) is str or (type(step) is int and 0 <= step < MOST_IN_A_LIST)
                if not known or kinds.setdefault(path[:i], type(step)) is not type(step):
                    self._refuse(f"the path of {key!r}", path)
        for key, path in paths.items():
            if path in kinds:
                self._refuse(f"the path of {key!r}", path)
            kinds[path] = None
