"""Turn text files into the token files that gpt2.py reads: train.bin and val.bin.

    python launch/prepare_data.py book.txt more/*.txt --out data/books
    python launch/gpt2.py --preset micro --data data/books

Arrays of tokens that others have made, .npy of uint16, become one file each; "train" or "val" in
their names says which split:

    python launch/prepare_data.py edufineweb_train_0.npy edufineweb_val_0.npy --out tokens
    python launch/prepare_data.py --check tokens

--check reads every file, and names those that are not what was written.

Beside the files lies tokens.json, with their lengths and hashes. Exit code 0: written. 2: wrong
input, one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from data import LISTING, TokenArray, read_listing, sha256_of, write_tokens
from options import OneLineParser, WrongInput

Encode = Callable[[Path], TokenArray]


def encode_bytes(path: Path) -> TokenArray:
    """A file's bytes as tokens 0 ... 255, (N,)."""
    return np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.uint16)


def gpt2_encoder() -> Encode:
    """GPT-2's byte-pair encoding, through tiktoken. Raises WrongInput where it or its files cannot
    be had.
    """
    try:
        import tiktoken
    except ImportError:
        raise WrongInput("--tokenizer gpt2 needs a package: pip install tiktoken") from None
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP client raises
        raise WrongInput(
            f"tiktoken cannot load GPT-2's vocabulary ({type(error).__name__}); connect to the "
            "network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer "
            "bytes."
        ) from None

    def encode(path: Path) -> TokenArray:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise WrongInput(
                f"{path}: no UTF-8 text at byte {error.start}; convert it, or use bytes."
            ) from None
        # The end-of-text token opens each document, as in the published GPT-2 data sets.
        return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16)

    return encode


def split(tokens: TokenArray, val_fraction: float) -> tuple[TokenArray, TokenArray]:
    """(train, validation) of one file: its end is held out."""
    cut = round(tokens.size * (1 - val_fraction))
    return tokens[:cut], tokens[cut:]


def prepare(
    texts: Sequence[Path], out: Path, *, encode: Encode, val_fraction: float, overwrite: bool
) -> str:
    """Write `out`/train.bin and `out`/val.bin; a line that says what they hold.

    Raises WrongInput.
    """
    if not 0 < val_fraction < 1:
        raise WrongInput(f"--val-fraction is {val_fraction}; it must lie between 0 and 1.")
    for text in texts:
        if not text.is_file():
            raise WrongInput(f"{text}: no such text file; check the path.")
    if out.exists() and not out.is_dir():
        raise WrongInput(f"--out {out} is a file; name a folder.")
    files = [out / "train.bin", out / "val.bin"]
    taken = [str(file) for file in files if file.exists()]
    if taken and not overwrite:
        raise WrongInput(f"{', '.join(taken)} exists; choose another --out or pass --overwrite.")
    pieces = [split(encode(text), val_fraction) for text in texts]
    splits = [np.concatenate(part) for part in zip(*pieces, strict=True)]
    if not all(tokens.size for tokens in splits):
        raise WrongInput(
            f"{splits[0].size} training and {splits[1].size} validation tokens came out; both need "
            "some. Use more text, or another --val-fraction."
        )
    write(dict(zip(files, splits, strict=True)))
    return ", ".join(
        f"{file}: {tokens.size:,} tokens" for file, tokens in zip(files, splits, strict=True)
    )


def write(files: dict[Path, TokenArray]) -> None:
    """Write token files of one folder, and list them in its tokens.json beside those that it lists
    already.
    """
    folder = next(iter(files)).parent
    folder.mkdir(parents=True, exist_ok=True)
    listed = read_listing(folder)
    for file, tokens in files.items():
        write_tokens(file, tokens)
        listed[file.name] = {"tokens": int(tokens.size), "sha256": sha256_of(file)}
        aside = folder / f".{LISTING}.part"
        aside.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
        os.replace(aside, folder / LISTING)


def convert(arrays: Sequence[Path], out: Path, *, overwrite: bool) -> str:
    """Write each .npy of `arrays` as a token file into `out`; a line that says so. Raises
    WrongInput.
    """
    total = 0
    for path in arrays:
        file = out / f"{path.stem}.bin"
        if "train" not in path.name and "val" not in path.name:
            raise WrongInput(
                f'{path}: neither "train" nor "val" in its name; rename it, so that its split is '
                "known."
            )
        if file.exists() and not overwrite:
            raise WrongInput(f"{file} exists; choose another --out or pass --overwrite.")
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise WrongInput(f"{path} cannot be read as an array: {error}") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui" or not tokens.size:
            raise WrongInput(
                f"{path}: {tokens.dtype} {tokens.shape} found, a one-dimensional array of tokens "
                "wanted."
            )
        try:
            write({file: tokens})
        except ValueError as error:
            raise WrongInput(str(error)) from None
        total += int(tokens.size)
    return f"{out}: {total:,} tokens from {len(arrays)} array(s)"


def check(folder: Path) -> str:
    """Compare the files of a folder with its tokens.json; a line that says so. Raises WrongInput
    naming those that differ.
    """
    try:
        listed = read_listing(folder)
    except ValueError as error:
        raise WrongInput(str(error)) from None
    if not listed:
        raise WrongInput(
            f"{folder}: no {LISTING} there, so nothing to compare with; it is written by "
            "prepare_data.py."
        )
    files = {folder / name: entry["sha256"] for name, entry in listed.items()}
    wrong = [
        path.name
        for path, wanted in files.items()
        if not path.is_file() or sha256_of(path) != wanted
    ]
    if wrong:
        raise WrongInput(f"{folder}: {', '.join(wrong)}: missing, cut or damaged; make them again.")
    tokens = sum(entry["tokens"] for entry in listed.values())
    return f"{folder}: {len(listed)} file(s), {tokens:,} tokens, as they were written"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    parser = OneLineParser(
        prog="prepare_data.py",
        allow_abbrev=False,
        description="Turn text into token files for gpt2.py.",
    )
    parser.add_argument(
        "texts",
        type=Path,
        nargs="*",
        metavar="TEXT",
        help="UTF-8 text; bytes take any file; or .npy of tokens",
    )
    parser.add_argument("--out", type=Path, help="folder for train.bin and val.bin")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FOLDER",
        help="compare its files with its tokens.json, and do nothing else",
    )
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share held out, from each file's end"
    )
    parser.add_argument("--overwrite", action="store_true")
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        if args.check is not None:
            print(check(args.check))
            return 0
        if not args.texts or args.out is None:
            raise WrongInput(f"{'TEXT' if not args.texts else '--out'} is missing; see --help.")
        arrays = [path for path in args.texts if path.suffix == ".npy"]
        if arrays and len(arrays) < len(args.texts):
            raise WrongInput(
                f"{arrays[0]} is an array of tokens and others are texts; prepare them one kind "
                "after the other."
            )
        if arrays:
            print(convert(arrays, args.out, overwrite=args.overwrite))
            return 0
        encode = gpt2_encoder() if args.tokenizer == "gpt2" else encode_bytes
        told = prepare(
            args.texts,
            args.out,
            encode=encode,
            val_fraction=args.val_fraction,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:  # WrongInput, and a tokens.json that cannot be read
        print(f"prepare_data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    preset = "micro" if args.tokenizer == "bytes" else "124m"
    print(f"{told}\nnext: python launch/gpt2.py --preset {preset} --data {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
