"""Module paths and names of the version before (acc4d19): importable for one version, with a
warning that says where they are.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pylo_dist
from pylo_dist import _moved

# Every public name that a module of acc4d19 defined.
NAMES: dict[str, list[str]] = json.loads(Path(__file__).with_name("names_acc4d19.json").read_text())
# What was replaced rather than moved: an adapter's insides that no user could have called, and a
# table that the registry of optimizers holds now.
GONE: dict[str, set[str]] = {"publish": {"FACES"}}


@pytest.mark.parametrize("module", sorted(set(NAMES) - {"deepspeed"}))
def test_every_public_name_is_where_it_was(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(f"pylo_dist.{module}")
        lost = {name for name in NAMES[module] if not hasattr(found, name)}
    assert lost == GONE.get(module, set())


def test_what_moved_is_the_same_object_and_warns() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from pylo_dist.optim.base import Batch, Sum\n"
        "    from pylo_dist import shards\n"
        "from pylo_dist.core import pieces, requests, rule\n"
        "assert (Batch, Sum, shards.bind_shard) == (rule.Batch, requests.Sum, pieces.bind_shard)\n"
        "print(*(f'{w.category.__name__} {w.filename} {w.message}' for w in caught), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first, second = done.stdout.splitlines()
    wanted = "DeprecationWarning <string> pylo_dist.{} is {} now; the old path goes with "
    wanted += "the next version"
    assert first == wanted.format("optim.base", "pylo_dist.core.rule and pylo_dist.core.requests")
    assert second == wanted.format("shards", "pylo_dist.core.shards and pylo_dist.core.pieces")


def test_the_package_itself_uses_no_old_path() -> None:
    code = "import pylo_dist, pylo_dist.__main__"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:pylo_dist", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_says_where_the_module_went() -> None:
    sys.modules.pop("pylo_dist.reference", None)
    with pytest.warns(DeprecationWarning, match="maths.reference now"):
        old = importlib.import_module("pylo_dist.reference")
    with pytest.raises(AttributeError, match=r"moved to pylo_dist\.maths\.reference"):
        _ = old.no_such_name
    assert not hasattr(pylo_dist, "no_such_module")
    assert set(_moved.MODULES).isdisjoint({"comm", "weights", "optimizer", "checkpoint"})
