"""One entry per optimizer: what it says, what it refuses, and that all or nothing is registered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pylo_dist
from pylo_dist import Architecture, Registered, Registration, register_optimizer
from pylo_dist.optimizer.settings import REQUIRED
from pylo_dist.weights import architectures
from support.registry import restored, tables

ARCHITECTURE = Architecture("twin", {"w": ("H", "2H"), "b": (3,)}, {"rms_decays": (0.5,)})


class Twin(pylo_dist.LearnedOptimizer):
    def __init__(self, params: Any, lr: float, *, weights: Any, pace: int = 3, **others: Any):
        raise NotImplementedError


def entry(**changes: Any) -> Registration:
    weights = {"a/twin": Registered("twin", "a/twin")}
    return replace(Registration("twin", Twin, ARCHITECTURE, weights), **changes)


@pytest.fixture(autouse=True)
def _registered_for_one_test() -> Iterator[None]:
    with restored():
        yield


def test_every_face_of_the_package_has_an_entry() -> None:
    entries = pylo_dist.registered_optimizers()
    faces = {
        name
        for name, found in vars(pylo_dist).items()
        if isinstance(found, type) and issubclass(found, pylo_dist.LearnedOptimizer)
    } - {"LearnedOptimizer"}
    assert {found.face.__name__ for found in entries.values()} == faces
    assert {found.deepspeed for found in entries.values()} == faces
    assert faces < set(pylo_dist.__all__)
    assert len(pylo_dist.__all__) == len(set(pylo_dist.__all__))
    for found in entries.values():
        assert getattr(pylo_dist, found.face.__name__) is found.face
        assert found.arguments["weights"] in found.weights  # the default is one of its names
    assert all(hasattr(pylo_dist, name) for name in pylo_dist.__all__)


def test_an_entry_brings_its_architecture_and_names() -> None:
    register_optimizer(entry())
    assert pylo_dist.registered_optimizers()["twin"].deepspeed == "Twin"
    assert architectures()["twin"] is ARCHITECTURE
    assert pylo_dist.registered_weights()["a/twin"].source == "a/twin"
    before = tables()
    register_optimizer(entry())  # the same again
    assert tables() == before
    pylo_dist.registered_optimizers().clear()
    assert tables() == before


def test_arguments_are_those_of_the_constructors() -> None:
    others = {"clip": "global", "nonfinite": "error", "process_group": None}
    others |= {"state_dtype": None, "state_seed": 0}
    assert entry().arguments == {"lr": REQUIRED, "weights": REQUIRED, "pace": 3, **others}
    entries = pylo_dist.registered_optimizers()
    assert entries["velo"].arguments["num_steps"] is REQUIRED
    assert list(entries["mulo"].arguments)[:3] == ["width_mults", "lr", "weights"]
    assert entries["elo-celo2"].arguments["clip_grad"] is True  # its own, not that of CELO2
    assert "embedding_pattern" in entries["elo-celo2"].arguments


def test_examples_name_what_is_required() -> None:
    weights = 'weights="THIS REPOSITORY OR FOLDER"'
    wanted = f"from {__name__} import Twin\noptimizer = Twin(model.parameters(), {weights}, lr=...)"
    assert entry().example() == wanted
    velo = pylo_dist.registered_optimizers()["velo"].example()
    call = f"pylo_dist.VeLO(model.parameters(), {weights}, num_steps=...)"
    assert velo == f"import pylo_dist\noptimizer = {call}"


def other_face(**body: Any) -> type[pylo_dist.LearnedOptimizer]:
    return type("Other", (Twin,), body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"face": other_face()},
            "optimizer name 'twin' is taken by .*test_registry.Twin; register",
        ),
        (
            {"name": "other", "deepspeed": "VeLO"},
            "\"type\" 'VeLO' is taken by pylo_dist.optim.velo",
        ),
        ({"name": "other"}, "\"type\" 'Twin' is taken"),
        (
            {"name": "o", "deepspeed": "O", "weights": {"a/twin": Registered("twin", "b/twin")}},
            "weights name 'a/twin' is taken",
        ),
        (
            {"name": "o", "deepspeed": "O", "architecture": replace(ARCHITECTURE, ignored=("x",))},
            "architecture name 'twin' is taken by one with other tensors or decays",
        ),
        (
            {
                "name": "o",
                "deepspeed": "O",
                "architecture": replace(ARCHITECTURE, name="new"),
                "weights": {"n": Registered("new", "n"), "demo": Registered("new", "n")},
            },
            "weights name 'demo' is taken",
        ),
    ],
)
def test_taken_names_are_refused_and_nothing_changes(changes: dict[str, Any], message: str) -> None:
    register_optimizer(entry())
    before = tables()
    with pytest.raises(ValueError, match=message):
        register_optimizer(entry(**changes))
    assert tables() == before


def test_a_definition_that_was_run_again_takes_the_place_of_the_first() -> None:
    register_optimizer(entry())
    again = type("Twin", (pylo_dist.LearnedOptimizer,), {"__module__": __name__})
    again.__init__ = Twin.__init__  # type: ignore[misc]
    register_optimizer(entry(face=again))
    assert pylo_dist.registered_optimizers()["twin"].face is again
    with pytest.raises(ValueError, match="optimizer name 'twin' is taken"):  # other weights
        register_optimizer(entry(weights={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Twin"}, "optimizer name 'Twin': wanted small letters"),
        ({"name": ""}, "optimizer name ''"),
        ({"face": dict}, "its face is <class 'dict'>; wanted a class derived from"),
        ({"deepspeed": "a twin"}, "deepspeed='a twin'; wanted a name such as 'Twin'"),
        (
            {"weights": {"a/b": Registered("velo", "a/b")}},
            "optimizer 'twin': weights 'a/b' are for velo, it needs twin",
        ),
    ],
)
def test_entries_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry(**changes)


@pytest.mark.parametrize("shape", [(0,), (3, -1), ("HH",), ("4",), ("",)])
def test_shapes_that_are_none_are_refused(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(ValueError, match=r"architecture 'a': 'w' has shape .*; wanted sizes of 1"):
        Architecture("a", {"w": shape})


# ----------------------------------------------------------------------------------------- plugins

PLUGIN = """
import pylo_dist
from pylo_dist.optim.elo import ARCHITECTURE

print("run")

class Mine(pylo_dist.ELO):
    pass

pylo_dist.register_optimizer(pylo_dist.Registration("mine", Mine, ARCHITECTURE))
"""
LOAD = """
import sys, pylo_dist
for where in sys.argv[1:]:
    try:
        pylo_dist.load_plugin(where)
    except ValueError as error:
        print(error)
print(*[name for name in pylo_dist.registered_optimizers() if name == "mine"])
"""


def loaded(folder: Path, *where: str) -> list[str]:
    """What a process says that loads these plugins, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *where],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


def test_plugins_are_files_and_modules_and_run_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").write_text(PLUGIN)
    path = str(tmp_path / "folder" / "mine.py")
    assert loaded(tmp_path, "folder/mine.py", path, "mine") == ["run", "mine"]
    assert loaded(tmp_path, "folder.mine", "folder.mine") == ["run", "mine"]


def test_plugins_that_cannot_be_imported_say_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import pylo_dist\n1 / 0\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "json.py").write_text(PLUGIN)
    (tmp_path / "taken.py").write_text(PLUGIN.replace('"mine"', '"velo"'))
    said = loaded(
        tmp_path, "broken.py", "broken.py", "folder/json.py", "taken.py", "no.such.module"
    )
    for line, words in zip(
        said,
        (
            "plugin broken.py cannot be imported (ZeroDivisionError: division by zero); wanted",
            "plugin broken.py cannot be imported (ZeroDivisionError: division by zero); wanted",
            "(ValueError: there is a module 'json' already: give the file another name)",
            "run",
            "(ValueError: optimizer name 'velo' is taken by pylo_dist.optim.velo.VeLO; register",
            "plugin no.such.module cannot be imported (ModuleNotFoundError: No module named 'no')",
            "",
        ),
        strict=True,
    ):
        assert words in line
