"""Folders that may not be read or written, or are removed: one line that names the folder, the run
ends or goes on, and nothing is lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import faults
import gpt2
import pytest
from checkpoints import published_in
from faults import rows_of
from watch import Row, Watch

from support.permissions import permission_bits_hold

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("permissions")
    faults.prepare(path)
    return path


def command(folder: Path, out: Path, *extra: str) -> list[str]:
    words = faults.Setup(folder, "adamw", 1, steps=STEPS, save_every=2).command(out)
    del words[words.index("--keep") : words.index("--keep") + 2]
    return [*words, *extra]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    assert gpt2.main(command(folder, folder / "finished")) == 0
    return folder / "finished"


def at_step(step: int, action: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    add = Watch.add

    def add_and_act(self: Watch, row: Row) -> None:
        add(self, row)
        if row.step == step:
            action()

    patch.setattr(Watch, "add", add_and_act)


def test_refused_at_the_start_in_one_line(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above all not: a run that begins anew, since it cannot see the one that is there."""
    capsys.readouterr()
    newest = published_in(finished)[STEPS]
    with permission_bits_hold():
        for path, bits, out in (
            (finished, 0o555, finished),
            (finished, 0, finished),
            (finished, 0o555, finished / "below"),
            (finished, 0, finished / "below"),
            (finished / "checkpoints", 0, finished),
            (newest, 0, finished),
            (finished / "metrics.jsonl", 0, finished),
            (folder / "tokens", 0, folder / "new"),
            (folder / "tokens" / "train.bin", 0, folder / "new"),
        ):
            whole = path.stat().st_mode
            path.chmod(bits)
            try:
                assert gpt2.main(command(folder, out, "--steps", "5")) == 2, path
            finally:
                path.chmod(whole)
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1, (path, lines)
            assert str(path) in lines[0], lines
            assert ".running" not in [p.name for p in finished.iterdir()]
            assert list(published_in(finished)) == [2, 4]
            assert len(rows_of(finished)) == STEPS


def test_what_becomes_read_only_loses_no_row(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with permission_bits_hold():
        with monkeypatch.context() as patch:
            at_step(3, lambda: (out / "checkpoints").chmod(0o555), patch)
            assert gpt2.main(command(folder, out)) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        wanted = f"step-00000004 was not written: {out / 'checkpoints'} cannot be written to"
        assert wanted in line, line
        assert len(rows_of(out)) == STEPS
        (out / "checkpoints").chmod(0o755)
        # a checkpoint that may not be deleted is kept, and the run ends as any other
        with monkeypatch.context() as patch:
            at_step(3, lambda: (out / "checkpoints" / "step-00000002").chmod(0o555), patch)
            assert gpt2.main(command(folder, out, "--keep", "1")) == 0
        said = capsys.readouterr().err
        assert said.count("cannot be deleted") == 1, said
        assert list(published_in(out)) == [4]
        assert len(rows_of(out)) == STEPS
        for path in (out / "checkpoints").iterdir():
            path.chmod(0o755)


def test_what_is_removed_is_written_anew(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    at_step(3, lambda: shutil.rmtree(out), monkeypatch)
    assert gpt2.main(command(folder, out)) == 0
    assert f"{out / 'metrics.jsonl'} was removed" in capsys.readouterr().err
    assert rows_of(out) == rows_of(finished)
    assert faults.differences(finished, out, STEPS) == ["checkpoints"]  # that of step 2 is gone
    assert (out / "config.json").is_file()
