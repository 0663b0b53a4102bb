"""What a person sees of a run: its progress lines, and its end on a machine that has no matplotlib,
with a sample that a terminal would obey.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import gpt2
import pytest
import torch
import watch
from model import GPT
from picture import figure_of
from watch import Beside, Remaining, Row, escaped

ESCAPES = (
    "a\tb \x1b[2J\x07\r\x85\u202ez\n"  # clears a screen, rings, overwrites, turns a line round
)
SHOWN = "a\tb \\x1b[2J\\x07\\r\\x85\\u202ez\n"


def test_a_first_run_without_matplotlib(
    tokens_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, done = tmp_path / "run", []

    def generate(self: GPT, *_: Any, **__: Any) -> torch.Tensor:
        done.append((out / "DONE").exists())
        return torch.tensor([[0, *ESCAPES.encode()]])

    monkeypatch.setattr(GPT, "generate", generate)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    command = ["--preset", "nano", "--optimizer", "adamw", "--threads", "1", "--device", "cpu"]
    command += ["--batch-size", "4", "--block-size", "16", "--data", str(tokens_folder)]
    command += ["--steps", "5", "--eval-every", "2", "--eval-batches", "1", "--out", str(out)]
    assert gpt2.main(command) == 0
    told = capsys.readouterr()
    assert done == [True]
    assert (out / "DONE").read_text() == "5 steps\n"
    assert not (out / "loss.png").exists()
    about = [line for line in told.err.splitlines() if "loss.png" in line]
    assert len(about) == 1
    assert "pip install 'pylo-dist[launch]'" in about[0]
    # no command to a terminal, on the screen and in the file
    assert (out / "sample.txt").read_text() == SHOWN
    assert "    | a\tb \\x1b[2J\\x07\\r\\x85\\u202ez" in told.out.splitlines()
    assert not set(told.out) - set("\n\t") & set(map(chr, [*range(32), 127]))

    lines = [line for line in told.err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{n}/5" for n in range(1, 6)]
    # a value where it was measured, and nowhere else
    assert ["  val " in line for line in lines] == [False, True, False, True, True]
    assert all(re.search(r"  \d+:\d\d left$", line) for line in lines)
    assert lines[-1].endswith("  0:00 left")


def row(
    step: int, *, step_ms: float = 500.0, loss: float = 2.0, val_loss: float | None = None
) -> Row:
    return Row(step, loss, val_loss, 1.0, step_ms, 1.0, 1.0)


def test_the_time_that_is_left() -> None:
    now = [100.0]
    left = Remaining(2_000_000, lambda: now[0])
    assert left.after(row(7)) == "11 d 13:46:36"  # of its own 0.5 s
    now[0] += 3.0  # of which 1 s was a validation
    assert left.after(row(11)) == "17 d 08:39:52"
    short = Remaining(4000, lambda: now[0])
    assert short.after(row(1)) == "33:20"
    now[0] += 2.0
    assert short.after(row(2)) == "2:13:16"
    assert short.after(row(4000)) == "0:00"


def test_a_bar_says_of_which_step_a_validation_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from options import parse

    shown: list[str] = []

    class Bar:
        """In place of tqdm on a terminal."""

        def __init__(self, **_: Any) -> None: ...

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            shown.append(text)

        def update(self) -> None: ...

        close = update

    monkeypatch.setattr(watch, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    options = parse(["--preset", "nano", "--optimizer", "adamw", "--steps", "3"])
    seen = watch.Watch(options, tmp_path, {})
    for one in (row(1), row(2, val_loss=1.5), row(3)):
        seen.add(one)
    seen.close()
    assert [re.findall(r"val.*?(?=  )", text) for text in shown] == [
        [],
        ["val 1.5000"],
        ["val 1.5000 at step 2"],
    ]


def test_the_picture_names_its_curves() -> None:
    rows = [row(step, loss=6.0 - step, val_loss=5.5 - step) for step in (1, 2, 3)]
    near = [row(step, loss=6.01 - step, val_loss=5.51 - step) for step in (1, 2, 3)]

    def texts(rows: list[Row], beside: Beside | None) -> dict[str, float]:
        figure = figure_of(rows, unit="byte", title="", name="velo", beside=beside)
        figure.draw_without_rendering()
        return {text.get_text(): text.xy[1] for text in figure.axes[0].texts}

    found = texts(rows, Beside("adamw", 1e-3, near))
    assert list(found) == ["velo  2.500", "adamw, lr 0.001  2.510", "untrained  5.000"]
    velo, adamw, untrained = found.values()
    assert adamw - velo > 0.1  # or they would cover each other
    assert (velo, untrained) == (2.5, 5.0)
    assert list(texts(rows[1:], None)) == ["velo  2.500"]  # where the first row is lost
    far = [row(step, loss=10.0**step, val_loss=None) for step in (1, 2, 3)]
    found = texts(
        rows, Beside("adamw", 1.0, far)
    )  # it has left the picture, and is named at its top
    assert found["velo  2.500"] < found["untrained  5.000"] < found["adamw, lr 1  370.000"] < 5.6
    far = [row(step, loss=1e9, val_loss=None) for step in (1, 2)]
    assert "adamw, lr 1  1e+09" in texts(rows, Beside("adamw", 1.0, far))
    assert texts([row(1)], None) == {"velo  2.000": 2.0, "untrained  2.000": pytest.approx(2.1)}


def test_what_is_escaped() -> None:
    assert escaped(ESCAPES) == SHOWN
    assert escaped("déjà vu, 日本 \ufffd") == "déjà vu, 日本 \ufffd"
