"""Small files of others: what is no file, too large, or nested without end is refused by name, in
the scripts and in the package.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import ds
import pytest
import recipe
import texts as scripts
from data import LISTING, read_listing
from options import WrongInput

import pylo_dist
from pylo_dist.weights import WeightsError, load_weights
from pylo_dist.weights import texts as package

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("module", [scripts, package], ids=["scripts", "package"])
def test_bounds(module: ModuleType, tmp_path: Path) -> None:
    file, pipe = tmp_path / "file.json", tmp_path / "pipe.json"
    file.write_text('{"a": [1, 2.5, "x"]}')
    assert module.read_json(file) == {"a": [1, 2.5, "x"]}
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), tmp_path):
        with pytest.raises((ValueError, OSError), match=r"is no regular file|Is a directory"):
            module.read_text(path)
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        module.read_json(file, 10)
    for text, words in (
        (DEEP, "nested too deeply"),
        ('{"a": Infinity}', "Infinity is no number of JSON"),
        ("[NaN]", "NaN is no number of JSON"),
        ("{", "Expecting property name"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            module.read_json(file)
    file.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="can't decode"):
        module.read_json(file)


def test_who_reads_them(tmp_path: Path) -> None:
    """Recipes, DeepSpeed's JSON, lists of tokens, folders of weights."""
    pipe, deep = tmp_path / "pipe", tmp_path / "deep"
    os.mkfifo(pipe)
    deep.write_text(DEEP)
    for path, words in ((pipe, "no regular file"), (deep, "nested")):
        with pytest.raises(ValueError, match=rf"--recipe .* cannot be read: .*{words}"):
            recipe.read(path)
        with pytest.raises(WrongInput, match=rf"--deepspeed .* cannot be read: .*{words}"):
            ds.read(path)
        folder = tmp_path / f"of {path.name}"
        folder.mkdir()
        path.rename(folder / LISTING)
        with pytest.raises(ValueError, match=rf"{LISTING} cannot be read .*{words}"):
            read_listing(folder)
    again = tmp_path / "again"
    again.write_text("about: &a x\ncost: *a\nflags: {}\n")
    with pytest.raises(ValueError, match="cannot be read: aliases"):
        recipe.read(again)

    folder = tmp_path / "weights"
    folder.mkdir()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="it is no regular file"):
        load_weights(folder)
    (folder / "model.safetensors").unlink()
    pylo_dist.save_weights(folder, "demo")
    (folder / "config.json").write_text(DEEP)
    with pytest.raises(WeightsError, match=r"config.json is not readable JSON: it is nested too"):
        load_weights(folder)
