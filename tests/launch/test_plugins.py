"""--plugin brings an optimizer of a user's own; flags are read without PyTorch, and --help says
what is registered.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gpt2
import options
import pytest

from support.registry import restored

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--preset", "nano", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
# ELO that asks for the length of the run, and for a number that no flag has.
EAGER = """
import pylo_dist
from pylo_dist.optim.elo import ARCHITECTURE

class Eager(pylo_dist.ELO):
    def __init__(self, params, *, num_steps, lr=0.25, zeal=2, clip="global", **others):
        assert num_steps > 1
        super().__init__(params, lr=lr, clip=clip, **others)

pylo_dist.register_optimizer(pylo_dist.Registration("eager", Eager, ARCHITECTURE))
"""
NUMBERS = itertools.count()
READ = """
import sys, options
found = options.read(sys.argv[1:])
assert "torch" not in sys.modules
assert "pylo_dist" not in sys.modules
print(found.optimizer, found.plugin)
"""


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that finds the scripts of launch/."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "launch")])
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """A file, of whose optimizer nothing is left after the test; a process runs one of a name
    once.
    """
    path = tmp_path / f"eager{next(NUMBERS)}.py"
    path.write_text(EAGER)
    with restored():
        yield path


def test_reading_a_command_needs_no_pytorch() -> None:
    words = ["--optimizer", "anything", "--plugin", "nowhere.py", "--num-steps", "3"]
    done = python(READ, *words)
    assert done.stdout == "anything nowhere.py\n", done.stderr


def test_help_says_what_is_registered(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*words: str) -> str:
        """What --help says, in one line."""
        with pytest.raises(SystemExit) as end:
            options.parse(["--help", *words])
        assert end.value.code == 0
        return " ".join(re.sub(r"-\n +", "-", capsys.readouterr().out).split())

    built_in, with_plugin = help_of(), help_of("--plugin", str(plugin))
    for said in (
        "adafaclo, celo, celo-adam, celo2, elo-celo2, elo, mulo, velo or adamw; default: adafaclo",
        "default: 0.001 for celo2, elo-celo2 and elo, the preset's for adamw, 1 for others",
        "default: 0.1 for elo-celo2 and adamw, 0 for others",
        "default: 1 for elo-celo2, no clipping for others",
        "of celo, celo-adam and velo: length of the run",
        "of mulo: heads at that width",
    ):
        assert said in built_in
    for said in (
        "velo, eager or adamw; default: adafaclo",
        "0.25 for eager",
        "of celo, celo-adam, velo and eager: length of the run",
    ):
        assert said in with_plugin


def test_a_plugin_brings_its_optimizer(
    plugin: Path, learned_weights: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--plugin", str(plugin), "--optimizer", "eager", "--out", str(out)]
    words += ["--weights", str(learned_weights["elo"]), "--steps", "2"]
    assert gpt2.main([*SMALL, *words]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["optimizer"], config["lr"], config["num_steps"]) == ("eager", 0.25, 2)
    assert (out / "optimizer.txt").read_text().startswith("Eager, weights ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer", "sgd"], "invalid choice: 'sgd' (choose from adafaclo, celo,"),
        (
            ["--optimizer", "eager"],
            "eager has no default for zeal; give it one, there is no flag for it",
        ),
        (
            ["--optimizer", "eager", "--mup-base-width", "32"],
            "--mup-base-width is for --optimizer mulo and means nothing to eager",
        ),
        (
            ["--plugin", "no.such.module", "--optimizer", "eager"],
            "plugin no.such.module cannot be imported (ModuleNotFoundError",
        ),
        (["--plugin", "gone.py"], "plugin gone.py cannot be imported (FileNotFoundError"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin.write_text(EAGER.replace("zeal=2", "zeal"))
    assert gpt2.main([*SMALL, "--plugin", str(plugin), *words]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
