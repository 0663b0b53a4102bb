"""What `python -m pylo_dist doctor` says of where it runs from, and of CUDA without extensions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import pylo_dist
from pylo_dist.__main__ import main
from pylo_dist.maths import compiled

OWN = Path(pylo_dist.__file__).resolve().parent


def package(folder: Path, *files: str) -> Path:
    (folder / "pylo_dist").mkdir(parents=True)
    for name in ("pylo_dist/__init__.py", *files):
        (folder / name).touch()
    return folder


def warnings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def test_doctor_warns_of_a_second_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    clean = [entry for entry in sys.path if not (Path(entry or ".") / "pylo_dist").is_dir()]
    monkeypatch.setattr(sys, "path", [str(OWN.parent), *clean])
    finders = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    monkeypatch.setattr(sys, "meta_path", finders)  # without that of another checkout
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"package: {OWN}" in said.splitlines()
    assert warnings_of(said) == []

    installed = package(tmp_path / "site-packages", "pylo_dist/_kernels_cpu.abi3.so")
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    checkout = package(tmp_path / "clone", "pyproject.toml")
    (checkout / "launch").mkdir()
    monkeypatch.chdir(checkout / "launch")  # which is on no search path
    assert main(["doctor"]) == 0
    other, here = warnings_of(capsys.readouterr().out)
    assert f"{installed / 'pylo_dist'} (installed, with compiled passes)" in other
    assert f"{checkout / 'pylo_dist'} (a checkout, without compiled passes)" in here
    for line in (other, here):
        assert f"what ran here is {OWN} (" in line


class Editable:
    """A finder as setuptools installs it for some editable packages."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, self.file) if name == "pylo_dist" else None


def test_doctor_finds_editable_installations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    editable = package(tmp_path / "clone", "pyproject.toml") / "pylo_dist"
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable(editable / "__init__.py")])
    assert main(["doctor"]) == 0
    assert any(
        f"{editable} (a checkout, without" in line for line in warnings_of(capsys.readouterr().out)
    )


def test_cuda_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    of = compiled.library.__wrapped__  # uncached
    monkeypatch.setattr(compiled, "library", lambda device: "there is no CPU extension")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert of("cuda") == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = of("cuda")
    assert "cuda" in said
    if not list(OWN.glob("_kernels_cuda.*")):
        assert said.startswith("the cuda extension was not built")
        assert "CPU" not in said
