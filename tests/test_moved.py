"""Module paths and names of the version before (acc4d19): importable for one version, with a
warning that says where they are.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pylo_dist
from pylo_dist import _moved
from pylo_dist.core.rule import Batch

# Every public name that a module of acc4d19 defined.
NAMES: dict[str, list[str]] = json.loads(Path(__file__).with_name("names_acc4d19.json").read_text())
OLD_PAGE = Path(__file__).with_name("own_rule_acc4d19.txt")
# What was replaced rather than moved: an adapter's insides that no user could have called, and a
# table that the registry of optimizers holds now.
GONE: dict[str, set[str]] = {
    "adapters.buckets": {"Member"},  # BucketParam
    "adapters.deepspeed": {"Member"},  # Slot
    "hub": {"Result"},  # a type variable
    "publish": {"FACES"},
}


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


def test_the_old_names_of_batches_and_weights_are_the_new_ones() -> None:
    batch = Batch.of([], [], torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert batch.keep is batch.moves  # type: ignore[attr-defined]
        assert batch.kept_sum == batch.reused_sum  # type: ignore[attr-defined]
        from pylo_dist.weights import ARCHITECTURES, VELO  # type: ignore[attr-defined]
    assert VELO is ARCHITECTURES["velo"] is pylo_dist.VeLO.__init__.__globals__["ARCHITECTURE"]
    said = {str(warning.message) for warning in caught}
    assert {warning.filename for warning in caught} == {__file__}
    for old, new in (
        ("Batch.keep", "Batch.moves"),
        ("Batch.kept_sum", "Batch.reused_sum"),
        ("pylo_dist.weights.VELO", "pylo_dist.weights.architectures()['velo']"),
        ("pylo_dist.weights.ARCHITECTURES", "pylo_dist.weights.architectures()"),
    ):
        assert f"{old} is {new} now; the old name goes with the next version" in said


def test_a_rule_written_against_the_version_before_runs() -> None:
    """The page of acc4d19 on rules of one's own, with the check that it ends with."""
    blocks = re.findall(r"```python\n(.*?)```", OLD_PAGE.read_text(), re.DOTALL)
    found: dict[str, Any] = {"__name__": "a_rule_of_the_version_before"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec("".join(blocks), found)
        found["test_every_cut_gives_the_uncut_run"]()
    said = {str(warning.message).split(" is ")[0] for warning in caught}
    assert {"Batch.keep", "Batch.moving", "Batch.kept"} <= said


def test_old_modules_are_attributes_without_an_import() -> None:
    code = (
        "import warnings, pylo_dist\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    found = [pylo_dist.shards.bind_shard, pylo_dist.optim.base.Batch,\n"
        "             pylo_dist.adapters.plain.collect, pylo_dist.shards.bind_shard]\n"
        "    import pylo_dist.shards\n"
        "from pylo_dist.core import pieces, rule\n"
        "from pylo_dist.layouts import plain\n"
        "assert found == [pieces.bind_shard, rule.Batch, plain.collect, pieces.bind_shard]\n"
        "assert {w.filename for w in caught} == {'<string>'} and len(caught) == 3, caught\n"
        "assert not hasattr(pylo_dist, 'no_such_module')\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_old_methods_are_the_new_ones() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = pylo_dist.AdafacLO([param], weights="demo")
    param.grad = torch.ones(3)
    with pytest.warns(DeprecationWarning, match=r"LearnedOptimizer\.early\.arrived now"):
        optimizer.gradients_arrived([param])  # type: ignore[attr-defined]
    assert optimizer.early.taken() == {id(param)}
    with pytest.warns(DeprecationWarning, match=r"LearnedOptimizer\.early\.forget now"):
        optimizer.forget_gradients()  # type: ignore[attr-defined]
    assert optimizer.early.taken() == set()


def test_a_pickle_of_the_version_before_steps_on() -> None:
    """Written by acc4d19: `torch.save((optimizer, after_the_next_step), path)`, AdafacLO, demo."""
    path = Path(__file__).parent / "checkpoint" / "saved" / "acc4d19" / "pickled.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        optimizer, wanted = torch.load(path, weights_only=False)
    params = optimizer.param_groups[0]["params"]
    for param in params:
        param.grad = torch.arange(param.numel()).reshape(param.shape) / 8 - 0.5
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, wanted, strict=True))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["a", "b"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["state_weights"] == optimizer.weights.digest
