"""Weights in flax's format: a theta.state, or a checkpoint of google/learned_optimization. Reads
files, within bounds, with msgpack and NumPy; nothing is unpickled and nothing in them is run.

Such a file is one msgpack map, nested, whose leaves are extensions: 1 an array, 3 a NumPy scalar,
both as (shape, name of the dtype, bytes), 2 a complex number. Arrays beyond 2^30 bytes are maps of
flat pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .client import printable
from .registry import Architecture, WeightsError
from .texts import read_bytes

SUFFIX = ".state"
STATE_FILE = f"theta{SUFFIX}"
LARGEST = 32 << 20  # bytes; VeLO's, the largest there are, have 9 million

Keys = tuple[str, ...]

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # extensions
_CHUNKED = {"__msgpack_chunked_array__", "shape", "chunks"}
_CHECKPOINT = {"params", "gen_id", "step"}  # what learned_optimization puts around the weights
_DTYPES = {
    **{f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    **{f"{sign}int{bits}": f"<{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (16, 32)},
    "int8": "i1",
    "uint8": "u1",
    "int64": "<i8",
    "uint64": "<u8",
    "bfloat16": "<u2",  # the upper half of a float32
}
# beyond what any of these files has; what a file announces is made room for before it is read
_MOST_ENTRIES, _MOST_DIMS, _LONGEST_TEXT, _DEEPEST, _MOST_PARTS = 256, 8, 256, 8, 10_000
_OTHERS = {  # how files of other formats begin
    b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez write; pickles are refused",
    **{
        bytes([0x80, version]): "a pickle, which is refused: nothing is unpickled"
        for version in range(2, 6)
    },
}


def read_arrays(path: Path) -> dict[Keys, np.ndarray[Any, Any]]:
    """All arrays of a file by the keys that lead to them; bfloat16 as float32.

    Raises:
        WeightsError: msgpack is missing, or it is no such file: cut, longer than what it holds,
            nested or large beyond bounds, with a key twice, or with what are no arrays of numbers.
    """
    try:
        return parsed(read_bytes(path, LARGEST))
    except ImportError:
        raise WeightsError(
            f"{path} is read with msgpack, which is not installed: pip install msgpack"
        ) from None
    except (ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is no readable file of flax's format: {printable(error)}"
        ) from error


def parsed(content: bytes) -> dict[Keys, np.ndarray[Any, Any]]:
    """As `read_arrays`, of the bytes of a file. Raises ValueError, and ImportError where msgpack is
    missing.
    """
    from msgpack import unpackb

    for start, what in _OTHERS.items():
        if content.startswith(start):
            raise ValueError(f"it is {what}")
    try:
        return _flat(_Reader(unpackb).read(content))
    # a TypeError for some keys that are no texts; what is nested beyond msgpack's own stack, and a
    # byte that begins nothing, raise errors without words
    except (ValueError, TypeError, RecursionError) as error:
        words = str(error) or "it is no msgpack, or nested too deeply"
        raise ValueError(words) from error


def arranged(
    arrays: Mapping[Keys, np.ndarray[Any, Any]], architecture: Architecture
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Tensors by the names of an architecture, and the decays among the arrays. Sizes are not
    compared with the architecture's.

    Raises:
        WeightsError: such files are not read for it, or the arrays are not just those it has; the
            message begins with what is wrong.
    """
    names = architecture.flax
    if names is None:
        raise WeightsError(f"{architecture.name} is not read from files of flax")
    groups = {name: _numbered(arrays, keys) for name, (keys, _) in names.tensors.items()}
    groups |= {f"decays {name}": [keys] for name, keys in names.decays.items()}
    wanted = {keys for group in groups.values() for keys in group}
    missing, extra = sorted(wanted - set(arrays)), sorted(set(arrays) - wanted)
    if missing or extra:
        raise WeightsError(
            f"they do not fit {architecture.name}: missing {_told(missing)}, unexpected "
            f"{_told(extra)}"
        )
    tensors = {}
    for name, (_, swapped) in names.tensors.items():
        parts = [arrays[keys] for keys in groups[name]]
        if len(parts) > 1:
            if any(part.ndim < 2 or part.ndim != parts[0].ndim for part in parts) or any(
                _but_joined(part.shape) != _but_joined(parts[0].shape) for part in parts
            ):
                shapes = [part.shape for part in parts]
                raise WeightsError(f"{_told(groups[name])} of {shapes} cannot be joined")
            array = np.concatenate(parts, axis=-2)
        else:
            array = parts[0]
        if swapped and array.ndim >= 2:
            array = array.swapaxes(-1, -2)
        # a copy in the order of its axes, that torch may own
        tensors[name] = torch.tensor(np.ascontiguousarray(array).reshape(array.shape))
    if names.units is not None:
        tensors = _widened(tensors, architecture, names.units)
    return tensors, {name: arrays[keys].ravel().tolist() for name, keys in names.decays.items()}


# ------------------------------------------------------------------------------------------- format


class _Reader:
    """Makes arrays of msgpack's extensions, and looks at all that a file announces.

    Args:
        unpackb: msgpack's.
    """

    def __init__(self, unpackb: Any) -> None:
        self._unpackb, self._parts = unpackb, 0

    def read(self, content: bytes) -> Any:
        return self._unpackb(
            content,
            object_pairs_hook=self._map,
            list_hook=self._list,
            ext_hook=self._extension,
            max_str_len=_LONGEST_TEXT,
            max_bin_len=len(content),
            max_ext_len=len(content),
            max_array_len=_MOST_DIMS,
            max_map_len=_MOST_ENTRIES,
        )

    def _count(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS} parts")

    def _map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count()
        found: dict[str, Any] = {}
        for key, value in pairs:
            if not isinstance(key, str):
                raise ValueError(f"a key is a {type(key).__name__}, wanted a text")
            if key in found:
                raise ValueError(f"the key {printable(key, 80)!r} is there twice")
            found[key] = value
        return _whole(found) if "__msgpack_chunked_array__" in found else found

    def _list(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def _extension(self, code: int, data: bytes) -> Any:
        self._count()
        if code == _COMPLEX:
            raise ValueError("it holds a complex number, wanted real ones")
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"it holds an extension {code}, wanted arrays, which are {_ARRAY}")
        parts = self._unpackb(
            data,
            max_str_len=_LONGEST_TEXT,
            max_bin_len=len(data),
            max_array_len=_MOST_DIMS,
            max_map_len=0,
            max_ext_len=0,
        )
        if not (
            isinstance(parts, list)
            and list(map(type, parts)) == [list, str, bytes]
            and all(type(size) is int for size in parts[0])
        ):
            raise ValueError("an array is not what was wanted, [shape, dtype, bytes]")
        return _array(*parts)


def _array(shape: list[int], dtype: str, data: bytes) -> np.ndarray[Any, Any]:
    if dtype not in _DTYPES:
        raise ValueError(
            f"an array is of dtype {printable(dtype, 80)!r}, wanted one of {', '.join(_DTYPES)}"
        )
    wanted = np.dtype(_DTYPES[dtype])
    if any(size < 1 for size in shape) or math.prod(shape) * wanted.itemsize != len(data):
        raise ValueError(f"an array is {dtype} {tuple(shape)} and has {len(data)} bytes")
    array = np.frombuffer(data, wanted).reshape(shape)
    if dtype == "bfloat16":
        array = (array.astype("<u4") << 16).view("<f4")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _whole(found: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The array that was written in pieces."""
    shape, pieces = _numbers_of(found.get("shape")), _numbers_of(found.get("chunks"))
    if (
        set(found) != _CHUNKED
        or shape is None
        or not pieces
        or not all(type(size) is int for size in shape)
        or not all(isinstance(piece, np.ndarray) and piece.ndim == 1 for piece in pieces)
        or any(piece.dtype != pieces[0].dtype for piece in pieces)
        or any(size < 1 for size in shape)
        or len(shape) > _MOST_DIMS
        or math.prod(shape) != sum(piece.size for piece in pieces)
    ):
        raise ValueError(
            'an array in pieces is not what was wanted, {"shape": {"0": ...}, "chunks": {"0": '
            "...}} with as many numbers as it has"
        )
    return np.concatenate(pieces).reshape(shape)


def _numbers_of(tuple_as_map: object) -> list[Any] | None:
    """The entries "0", "1", .. of a map, in order; None for another map."""
    if not isinstance(tuple_as_map, dict):
        return None
    wanted = [str(i) for i in range(len(tuple_as_map))]
    return [tuple_as_map[key] for key in wanted] if set(wanted) == set(tuple_as_map) else None


def _flat(tree: object) -> dict[Keys, np.ndarray[Any, Any]]:
    """The arrays of nested maps by their keys, without what learned_optimization puts around."""
    if isinstance(tree, dict) and set(tree) == _CHECKPOINT:
        tree = tree["params"]
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, wanted a map of names to arrays")
    arrays: dict[Keys, np.ndarray[Any, Any]] = {}
    waiting: list[tuple[Keys, Any]] = [((), tree)]
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, dict):
            if len(keys) == _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} maps deep")
            waiting += [((*keys, key), inner) for key, inner in value.items()]
        elif isinstance(value, np.ndarray):
            arrays[keys] = value
        else:
            raise ValueError(f"{_told([keys])} is a {type(value).__name__}, wanted an array")
    return arrays


# -------------------------------------------------------------------------------------------- names


def _numbered(arrays: Mapping[Keys, Any], keys: Keys) -> list[Keys]:
    """The keys that stand for `keys`: with a "*", those numbered 0, 1, .. as far as they go."""
    if "*" not in keys[-1]:
        return [keys]
    found: list[Keys] = []
    while not found or found[-1] in arrays:
        found.append((*keys[:-1], keys[-1].replace("*", str(len(found)))))
    return found[:-1] or found


def _but_joined(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1])


def _told(keys: list[Keys]) -> str:
    return printable(", ".join(" . ".join(key) for key in keys) or "none")


def _widened(
    tensors: dict[str, Tensor], architecture: Architecture, units: int
) -> dict[str, Tensor]:
    """The same function with `units` hidden units, of which the further ones are always 0. Nothing
    is done where the tensors do not agree on a smaller number.
    """
    hidden = {
        name: [dim for dim, size in enumerate(shape) if size == units]
        for name, shape in architecture.shapes.items()
        if len(shape) == tensors[name].ndim
    }
    sizes = {tensors[name].shape[dim] for name, dims in hidden.items() for dim in dims}
    if len(sizes) != 1 or max(sizes) >= units:
        return tensors
    wide = dict(tensors)
    for name, dims in hidden.items():
        old = tensors[name]
        shape = [units if dim in dims else size for dim, size in enumerate(old.shape)]
        wide[name] = old.new_zeros(shape)
        wide[name][tuple(slice(size) for size in old.shape)] = old
    return wide
