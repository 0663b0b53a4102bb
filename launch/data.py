"""Token files, the built-in text, and which samples a step sees. Knows no model.

Two file formats, both of little-endian uint16 tokens: llm.c's (a header of 256 int32: magic
20240520, version 1, token count) and nanoGPT's (no header).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import os
import resource
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import texts

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TokenArray = npt.NDArray[np.uint16]

# Tokens of a split compared with the vocabulary before training; a batch checks its own again.
SCANNED_TOKENS = 2**28
VALIDATION_SHARE = 10  # one piece of the built-in text in ten
# of a folder: by file name its tokens and its sha256, as prepare_data.py writes it
LISTING = "tokens.json"
CHUNK = 2**24  # tokens written or hashed at a time
NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


# -------------------------------------------------------------------------------------- token files


def write_tokens(path: Path, tokens: npt.NDArray[np.integer]) -> None:
    """Write a 1-D array of tokens with a header, complete or not at all.

    Raises ValueError for a token outside uint16 and for more tokens than the header's int32 can
    count.
    """
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**16:
        raise ValueError(
            f"{path}: tokens from {tokens.min()} to {tokens.max()} came; the format holds 0 to "
            "65535. Use a tokenizer of at most 65536 tokens."
        )
    if tokens.size >= 2**31:
        raise ValueError(
            f"{path}: {tokens.size} tokens came; one file counts to 2147483647. Write several."
        )
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(header.tobytes())
        for start in range(0, tokens.size, CHUNK):
            file.write(tokens[start : start + CHUNK].astype("<u2").tobytes())
    os.replace(aside, path)


def read_tokens(path: Path) -> TokenArray:
    """Map the tokens of one file, (N,), without reading them. ValueError for a file that holds
    none.
    """
    again = "Make it again with launch/prepare_data.py."
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. Check the path, or make it with launch/prepare_data.py."
        )
    if path.suffix != ".bin":
        raise ValueError(
            f"{path}: {path.suffix or 'no suffix'} found, a .bin file of tokens wanted. "
            f"Make one: python launch/prepare_data.py {path} --out FOLDER"
        )
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty. {again}")
    if size % 2:
        raise ValueError(
            f"{path}: {size} bytes found, an even number wanted (uint16 tokens). {again}"
        )
    if not _has_header(path, size):
        return np.memmap(path, dtype="<u2", mode="r")
    _, version, count = np.fromfile(path, dtype="<i4", count=3)
    found = (size - HEADER_BYTES) // 2
    if version != VERSION:
        raise ValueError(f"{path}: header version {version} found, {VERSION} wanted. {again}")
    if count != found:
        raise ValueError(
            f"{path}: the header counts {count} tokens, the file holds {found}; it is cut or "
            f"damaged. {again}"
        )
    if count == 0:
        raise ValueError(f"{path}: the file holds a header and no tokens. {again}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def _has_header(path: Path, size: int) -> bool:
    """Whether llm.c's header opens the file; ValueError where another header does.

    No GPT-2 token file without a header can begin like the magic: its first uint16 would be token
    55432.
    """
    head = np.fromfile(path, dtype="<i4", count=min(HEADER_INTS, size // 4))
    if head.size and head[0] == MAGIC:
        if head.size < HEADER_INTS:
            raise ValueError(
                f"{path}: the file ends inside its header, {size} of {HEADER_BYTES} bytes. "
                "Make it again with launch/prepare_data.py."
            )
        return True
    # Text never has 500 zero tokens in a row; a header of another format does after its few fields.
    if head.size == HEADER_INTS and 0 < head[1] < 10 and head[2] > 0 and not head[3:].any():
        raise ValueError(
            f"{path}: header magic {head[0]} found, {MAGIC} wanted (llm.c's uint16 tokens). "
            "Make it again for GPT-2, or strip the header."
        )
    return False


def make_room(count: int) -> None:
    """Let this process open `count` files more, as far as its hard limit allows: each file that is
    mapped stays open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count
        resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
        )


def find_files(folder: Path, split: str) -> list[Path]:
    """The *.bin of `folder` with `split` ("train" or "val") in their name, sorted. ValueError for
    none.
    """
    found = sorted(path for path in folder.glob("*.bin") if split in path.name)
    if not found:
        raise ValueError(
            f"{folder}: no *{split}*.bin in this folder. Name a file, or make both splits with "
            "launch/prepare_data.py."
        )
    return found


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2 * CHUNK):
            found.update(chunk)
    return found.hexdigest()


def read_listing(folder: Path) -> dict[str, dict[str, Any]]:
    """What tokens.json of a folder lists; {} where there is none. Raises ValueError."""
    path = folder / LISTING
    try:
        found = texts.read_json(path, 1 << 26) if path.exists() else {}
        return {
            str(name): {"tokens": int(entry["tokens"]), "sha256": str(entry["sha256"])}
            for name, entry in found.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); make the folder again, or remove that file."
        ) from None


def check_listing(folder: Path, split: str, found: Mapping[str, int]) -> None:
    """Compare the files of a split, by name their tokens, with what the folder's tokens.json lists.
    Raises ValueError.
    """
    for name, entry in read_listing(folder).items():
        if split in name and found.get(name) != entry["tokens"]:
            has = f"{found[name]} tokens found" if name in found else "no such file"
            raise ValueError(
                f"{folder / name}: {has}, {entry['tokens']} wanted by {LISTING}; it is cut, "
                "damaged or another. Make it again."
            )


# ------------------------------------------------------------------------------------ built-in text


@functools.cache
def builtin_text() -> tuple[bytes, bytes]:
    """(train, validation) from the text that this Python carries: its help topics and its
    docstrings.

    The same bytes for the same installation. A piece is one help topic or all docstrings of one
    module, and goes to validation when the hash of its name falls into one tenth. Hence no module
    is in both, a neighbour's wording gives nothing away, and validation draws on the whole library.
    A docstring that occurs twice is kept once.

    Raises ValueError for a Python stripped of both.
    """
    train: list[str] = []
    validation: list[str] = []
    seen: set[str] = set()
    for name, given in [*_topics(), *_docstrings()]:
        fresh = list(dict.fromkeys(text for text in given if text not in seen))
        seen.update(fresh)
        if fresh:
            digest = hashlib.sha256(name.encode()).digest()
            held_out = int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0
            (validation if held_out else train).append("\n\n".join(fresh) + "\n\n\n")
    if not train or not validation:
        raise ValueError(
            "this Python carries no help topics and no library sources; pass --data FOLDER."
        )
    return "".join(train).encode(), "".join(validation).encode()


def _topics() -> list[tuple[str, list[str]]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [(f"topic {name}", [text.strip()]) for name, text in sorted(topics.items())]


def _docstrings() -> list[tuple[str, list[str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        if NOT_TEXT.isdisjoint(relative.parts):
            pieces.append((relative.as_posix(), _docstrings_of(path)))
    return pieces


def _docstrings_of(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules are not ours to report
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # templates and the like
    found = []
    todo: list[ast.AST] = [tree]
    # depth first, in source order; a definition is a statement, so expressions are not visited
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                found.append(inspect.cleandoc(text).strip())
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        todo.extend(reversed(children))
    return found


# ------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a global batch is dealt to ranks and micro-batches, in sequences. ValueError where it
    cannot.
    """

    global_batch: int
    world_size: int
    micro_batch: int  # per rank

    def __post_init__(self) -> None:
        batch, world, micro = self.global_batch, self.world_size, self.micro_batch
        if batch % world:
            near = [str(n) for n in (batch // world * world, (batch // world + 1) * world) if n]
            raise ValueError(
                f"--batch-size {batch} cannot be shared equally by {world} ranks; use a multiple "
                f"of {world}, such as {' or '.join(near)}."
            )
        share = batch // world
        if share % micro:
            fitting = [str(n) for n in range(1, share + 1) if share % n == 0]
            raise ValueError(
                f"--micro-batch-size {micro} does not divide the {share} sequences of a rank "
                f"(--batch-size {batch} over {world} ranks); use one of {', '.join(fitting)}."
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch // self.world_size // self.micro_batch

    def rows(self, rank: int) -> list[slice]:
        """The samples of the global batch that `rank` takes, one slice per micro-batch."""
        share, micro = self.global_batch // self.world_size, self.micro_batch
        return [
            slice(start, start + micro) for start in range(rank * share, (rank + 1) * share, micro)
        ]


def drawn(size: int, seed: int, stream: int, step: int, count: int) -> npt.NDArray[np.int64]:
    """`count` numbers below `size`, (count,): the samples of a step out of a pool.

    A counter-based generator: a function of the arguments alone, whatever was drawn before and on
    however many ranks. Raw words, because numpy keeps those the same in every version. `stream`
    parts training from validation.
    """
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, 0, step])
    return (generator.random_raw(count) % np.uint64(size)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token arrays as one pool of windows of `block_size` + 1 tokens; no window crosses two files.

    Raises ValueError, naming the source, where it has not one window or a token outside the
    vocabulary.
    """

    names: tuple[str, ...]
    arrays: tuple[TokenArray, ...]
    block_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, array in zip(self.names, self.arrays, strict=True):
            if array.size <= self.block_size:
                raise ValueError(
                    f"{name}: {array.size} tokens found, {self.block_size + 1} or more wanted. "
                    "Use more text or a smaller --block-size."
                )
            self._check_vocabulary(name, array)

    @classmethod
    def from_path(cls, path: Path, split: str, *, block_size: int, vocab_size: int) -> Tokens:
        """A file, or the files of `split` in a folder."""
        paths = find_files(path, split) if path.is_dir() else [path]
        make_room(len(paths))
        try:
            arrays = tuple(read_tokens(p) for p in paths)
        except OSError as error:
            raise ValueError(
                f"{path}: {len(paths)} file(s) cannot be mapped ({error}); where too many are "
                "open, ulimit -n 65536."
            ) from None
        if path.is_dir():
            check_listing(
                path, split, {p.name: array.size for p, array in zip(paths, arrays, strict=True)}
            )
        return cls(tuple(map(str, paths)), arrays, block_size, vocab_size)

    @classmethod
    def from_bytes(cls, name: str, text: bytes, *, block_size: int, vocab_size: int) -> Tokens:
        return cls(
            (name,),
            (np.frombuffer(text, dtype=np.uint8).astype(np.uint16),),
            block_size,
            vocab_size,
        )

    @property
    def num_tokens(self) -> int:
        return sum(array.size for array in self.arrays)

    def digest(self) -> str:
        """A hash that tells one pool from another: of the sizes and of 4096 tokens of each array,
        evenly spaced.
        """
        found = hashlib.sha256()
        for array in self.arrays:
            found.update(array.size.to_bytes(8, "little"))
            found.update(array[:: -(-array.size // 4096)].astype("<u2").tobytes())
        return found.hexdigest()

    def windows(
        self, seed: int, stream: int, step: int, global_batch: int
    ) -> npt.NDArray[np.int64]:
        """First tokens of the `global_batch` windows of a step, (global_batch,), as places in the
        pool; see `drawn`.
        """
        return drawn(int(self._ends()[-1]), seed, stream, step, global_batch)

    def in_order(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """First tokens of `count` windows from number `first` on, (count,), as places in the pool.

        Windows lie end to end, each beginning with the token that the one before it ends with, file
        after file; after the last comes the first again. What is left at the end of a file is
        passed over.
        """
        ends = np.cumsum([(array.size - 1) // self.block_size for array in self.arrays])
        numbers = np.arange(first, first + count) % ends[-1]
        files = np.searchsorted(ends, numbers, side="right")
        before = np.concatenate(([0], ends))[files]  # windows in earlier files
        places: npt.NDArray[np.int64] = (
            np.concatenate(([0], self._ends()))[files] + (numbers - before) * self.block_size
        )
        return places

    def read(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The windows at `places` (n,): (n, block_size + 1).

        Raises ValueError, naming the source, for a token above the vocabulary and for a file that
        was cut since it was opened.
        """
        ends = self._ends()
        out = np.empty((places.size, self.block_size + 1), np.int64)
        files = np.searchsorted(ends, places, side="right")
        for i in np.unique(files):
            self._check_length(int(i))
        for row, place, i in zip(out, places, files.tolist(), strict=True):
            start = int(place) - (int(ends[i - 1]) if i else 0)
            row[:] = self.arrays[i][start : start + self.block_size + 1]
            if row.max() >= self.vocab_size:
                raise ValueError(self._vocabulary_error(self.names[i], int(row.max())))
        return out

    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum([array.size - self.block_size for array in self.arrays])

    def _check_length(self, i: int) -> None:
        """Mapped memory beyond the end of a file cannot be read: the process would be killed
        without a word.
        """
        array, name = self.arrays[i], self.names[i]
        if isinstance(array, np.memmap) and os.path.exists(name):
            wanted, found = array.offset + array.nbytes, os.path.getsize(name)
            if found < wanted:
                raise ValueError(
                    f"{name}: {found} bytes found, {wanted} when the run began; the file was cut. "
                    "Make it again."
                )

    def _check_vocabulary(self, name: str, array: TokenArray) -> None:
        chunk = 2**20
        num_chunks = -(-array.size // chunk)
        budget = max(1, SCANNED_TOKENS // chunk // len(self.arrays))
        for i in np.linspace(0, num_chunks - 1, min(num_chunks, budget)).astype(int):
            highest = int(array[i * chunk : (i + 1) * chunk].max())
            if highest >= self.vocab_size:
                raise ValueError(self._vocabulary_error(name, highest))

    def _vocabulary_error(self, name: str, token: int) -> str:
        return (
            f"{name}: token {token} found, tokens below {self.vocab_size} wanted by the model's "
            f"vocabulary. Use --vocab-size {token + 1} or more, a larger preset, or data made with "
            "another tokenizer."
        )
