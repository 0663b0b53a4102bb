"""Download token arrays of a Hub data set, one after the other, as files that gpt2.py reads; goes
on where it was stopped.

    python launch/download_tokens.py btherien/edufineweb-tokenized --tokens 10e9 --out tokens

Takes the first training arrays until they hold --tokens, and the first validation array. Exit code
0: all there. 1: the Hub could not be asked, one line on stderr. 2: wrong input.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data import read_listing
from options import OneLineParser, WrongInput
from prepare_data import convert

MOST_BYTES = 1 << 38  # of an array


class Unreachable(Exception):
    """The Hub has not given what was asked for; the message is one line."""


def in_order(names: Sequence[str], split: str) -> list[str]:
    """The .npy names of a split, by the numbers in them. Names that lead out of a folder, or that
    no terminal should be sent, are left out.
    """
    found = [
        name
        for name in names
        if name.endswith(".npy")
        and split in name
        and name.isprintable()
        and not {"", ".", ".."} & set(name.split("/"))
        and "\\" not in name
    ]
    return sorted(found, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)], name))


def download(repo: str, out: Path, wanted: int) -> str:
    """Bring tokens of `repo` into `out` until it holds `wanted` for training; a line that says so.

    Raises Unreachable, and WrongInput for arrays that hold no tokens.
    """
    import huggingface_hub

    from pylo_dist.weights.client import Guard, printable

    def ask(what: str, function: str, *args: str, **named: object) -> object:
        try:
            # entity tags become names of files
            with Guard(lambda name: MOST_BYTES, alone=False):
                return getattr(huggingface_hub, function)(repo, *args, repo_type="dataset", **named)
        except Exception as error:  # whatever its HTTP client raises
            reason = printable(" ".join(str(error).split()), 200)
            raise Unreachable(
                f"{what} of {repo} cannot be had from the Hub ({type(error).__name__}: {reason})"
            ) from None

    names = ask("the list of files", "list_repo_files")
    assert isinstance(names, list)
    train, val = in_order(names, "train"), in_order(names, "val")
    if not train or not val:
        raise WrongInput(
            f"{repo}: no .npy with train and val in their names; name another data set."
        )

    def bring(name: str) -> int:
        # arrays may lie in folders that tell the splits apart, under the same names
        flat = name.replace("/", "-")
        file = f"{Path(flat).stem}.bin"
        if file not in (listed := read_listing(out)) or not (out / file).is_file():
            there = Path(str(ask(name, "hf_hub_download", name, local_dir=out / ".download")))
            path = there.replace(out / ".download" / flat)
            convert([path], out, overwrite=True)
            path.unlink()
            listed = read_listing(out)
            print(f"{out / file}: {listed[file]['tokens']:,} tokens", flush=True)
        return int(listed[file]["tokens"])

    bring(val[0])
    held = 0
    for name in train:
        if held >= wanted:
            break
        held += bring(name)
    if held < wanted:
        raise WrongInput(
            f"{repo} holds {held:,} training tokens, {wanted:,} were wanted; pass fewer."
        )
    return f"{out}: {held:,} training tokens of {repo}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    parser = OneLineParser(
        prog="download_tokens.py", allow_abbrev=False, description="Bring tokens of a Hub data set."
    )
    parser.add_argument("repo", metavar="ORG/NAME")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tokens", type=float, required=True, help="for training, at least, e.g. 10e9"
    )
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        print(download(args.repo, args.out, int(args.tokens)))
    except (Unreachable, ValueError, OSError) as error:
        print(f"download_tokens.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, Unreachable) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
