"""Recipes: flags of gpt2.py in a YAML file, with what the run costs. Flags on the command line win;
`none` there takes one back.

Values are read as they are written, without YAML's own ideas of numbers, in which 010 is 8 and 1:30
is 90.

    about: one line
    cost: what a run of it takes, where that has been measured
    flags:
      preset: 124m
      batch_size: 512
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import texts

KEYS = ("about", "cost", "flags")
DEPTH = 4  # levels of a recipe: two, and those of which the errors speak


def read(path: Path) -> dict[str, Any]:
    """A recipe: `about` and `cost`, two texts, and `flags`, a mapping. Raises ValueError."""
    try:
        import yaml
    except ImportError:
        raise ValueError("--recipe needs a package: pip install pyyaml") from None
    try:
        text = texts.read_text(path)
        _check_shape(yaml, text)
        found = yaml.load(text, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"--recipe {path} cannot be read: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"--recipe {path}: a mapping with {', '.join(KEYS)} was wanted.")
    known(path, found, KEYS)
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(f"--recipe {path} is without {', '.join(missing)}.")
    if not isinstance(found["flags"], dict):
        raise ValueError(f"--recipe {path}: under flags a mapping was wanted, such as steps: 300.")
    return found


def _check_shape(yaml: Any, text: str) -> None:
    """Raise ValueError for YAML that is nested deeply, or that stands for more than it says: a few
    aliases of aliases would be more than memory holds.
    """
    depth = 0
    for event in yaml.parse(text, yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read; write out what they stand for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEPTH:
            raise ValueError(f"it is nested in more than {DEPTH} levels")


def words(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The words of a command line that the recipe in `path` stands for. Raises ValueError naming
    the file.
    """
    flags, defaults = read(path)["flags"], vars(parser.parse_args([]))
    known(path, flags, [name for name in defaults if name != "recipe"])
    found: list[str] = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        if isinstance(defaults[key], bool):
            if value not in ("true", "false"):
                raise ValueError(f"--recipe {path}: {key} is {value!r}; true or false was wanted.")
            found.append(f"--{name}" if value == "true" else f"--no-{name}")
        elif isinstance(value, str) and value not in ("", "null", "~"):
            found.append(f"--{name}={value}")
        else:
            raise ValueError(
                f"--recipe {path}: {key} is {value!r}; a number or a text was wanted. Leave it out "
                "for the default."
            )
    try:
        parser.parse_args(found)
    except ValueError as error:
        raise ValueError(f"--recipe {path}: {error}") from None
    return found


def known(path: Path, given: Iterable[Any], names: Sequence[str]) -> None:
    """Raise ValueError, with the nearest name, for a key that is none of `names`."""
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, cutoff=0.0)
            raise ValueError(f"--recipe {path}: unknown key {key!r}; the nearest is {near[0]!r}.")
