"""`python -m pylo_dist weights`: what it prints, what it writes, and exit code 2 with one line for
wrong input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

import pylo_dist
from pylo_dist.__main__ import main
from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
from pylo_dist.weights import CARD_KEY, load_weights, read_file
from support import hub_cases
from support.hub_cases import Call
from support.hub_server import serving

ROOT = Path(__file__).parents[2]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in SMALL_FC.shapes.items()
    }


NETWORK = load_weights(tensors(), SMALL_FC)
# as the file has them
DIGEST = replace(NETWORK, decays={**NETWORK.decays, "rms_decays": (0.25,)}).digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "given.safetensors"
    save_file(
        tensors(),
        path,
        {
            CARD_KEY: '{"architecture": "small_fc", "decays": {"rms_decays": [0.25]}, "horizon": '
            "500}"
        },
    )
    return path


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "demo", *pylo_dist.registered_weights()]
    assert "unknown" in lines[2]
    assert "150,000 steps" in next(line for line in lines if line.startswith("Pauljanson002"))
    assert "2,000 steps" in next(line for line in lines if line.startswith("amoudgl/velo-s"))


def test_show_prints_what_belongs_to_the_weights(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "show", str(file)]) == 0
    out = capsys.readouterr().out.splitlines()
    for line in (
        "architecture: small_fc",
        "horizon: 500 steps",
        "licence: unknown",
        "momentum_decays: 0.15216392, 0.14245212, 0.06812963",  # what a file without them implies
        "rms_decays: 0.25",
        f"digest: {DIGEST}",
        "tensors: 6",
        "  network.input.weight (32, 39)",
    ):
        assert line in out

    demo = load_weights("demo", SMALL_FC)
    assert main(["weights", "show", "demo"]) == 0
    assert f"digest: {demo.digest}" in capsys.readouterr().out.splitlines()


def test_show_asks_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "show", "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP"]) == 0
    out = capsys.readouterr().out
    assert "architecture: velo\nhorizon: 150,000 steps\nlicence: apache-2.0" in out
    assert "\nmeta-trained on: a mixture of tasks" in out
    assert "\nfactor: 100.0\n" in out
    assert "digest: not known here: weights" in out
    assert "no network was asked for" in out
    assert "  lstm.linear.weight (4H, 2H)" in out
    assert "tensors: 20\n" in out


def test_fetch_and_verify_a_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fetched"
    assert main(["weights", "fetch", str(file), "--to", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: small_fc weights from {file}, digest {DIGEST}\n"
    assert main(["weights", "verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: small_fc weights, digest {DIGEST} as written\n"
    assert load_weights(folder, SMALL_FC).decays["rms_decays"] == (0.25,)

    kept, card = read_file(folder / "model.safetensors")
    kept["network.input.weight"][3, 4] += 1.0
    save_file(kept, folder / "model.safetensors", {CARD_KEY: json.dumps(card)})
    assert main(["weights", "verify", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: weights '{folder}': tensors, architecture and dec")
    assert f"the card of the file says {DIGEST}" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["show", "nonsense"],
            "weights 'nonsense': no such file or folder, nor a registered name (demo, "
            "btherien/mulo",
        ),
        (
            ["show", "some/thing"],
            "weights 'some/thing' could not be had from the Hub (no network was asked for",
        ),
        (["show", "demo", "--architecture", "celo2"], "there are no demo weights for celo2"),
        (
            ["fetch", "FILE", "--to", "FILE"],
            "is a file, wanted a folder to write model.safetensors to",
        ),
        (
            ["fetch", "FILE", "--to", "new", "--architecture", "elo"],
            "are for small_fc, this optimizer needs elo",
        ),
        (
            ["fetch", "demo", "--to", "OTHERS"],
            "holds other weights; name a new folder, or overwrite them",
        ),
        (["verify", "nowhere"], "nowhere is no folder; wanted one that"),
        (["verify", "1" * 300], "File name too long"),
        (["show", "1" * 300], "File name too long; wanted a name or a path"),
        (["fetch", "1" * 300, "--to", "new"], "File name too long; wanted a name or a path"),
        (["verify", "OTHERS"], "and none to compare it with: write it with"),
        (["verify", "PICKLED"], "only pickled files (model.pt), which are refused"),
        (["list", "--plugin", "gone.py"], "plugin gone.py cannot be imported (FileNotFoundError"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    others, pickled = tmp_path / "others", tmp_path / "pickled"
    others.mkdir()
    pickled.mkdir()
    (others / "model.safetensors").write_bytes(
        save(tensors(), {CARD_KEY: '{"architecture": "small_fc"}'})
    )
    (pickled / "model.pt").write_bytes(b"\x80")
    places = {"FILE": str(file), "OTHERS": str(others), "PICKLED": str(pickled)}
    assert main(["weights", *(places.get(a, a) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["weights"],
        ["weights", "sell"],
        ["weights", "fetch", "demo"],
        ["weights", "show", "demo", "--architecture", "x"],
    ],
)
def test_commands_that_are_none_have_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m pylo_dist" in capsys.readouterr().err


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pylo_dist", "weights", "show", "nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: weights 'nonsense': no such file or folder")
    assert done.stdout == ""


def test_a_fetched_folder_loads_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    with serving() as server:
        commit = server.commit("btherien/mulo", {"model.safetensors": save(tensors())})
        home = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
        assert (
            Call(
                home, hub_cases.fetch, ["weights", "fetch", "btherien/mulo", "--to", str(folder)]
            ).result()
            == 0
        )
        missing = ["weights", "fetch", "no/thing", "--to", str(tmp_path / "nothing")]
        assert Call(home, hub_cases.fetch, missing).result() == 2
    assert not (tmp_path / "nothing").exists()

    read = load_weights(folder)
    assert (read.digest, read.source, read.horizon) == (
        NETWORK.digest,
        f"btherien/mulo@{commit}",
        None,
    )
    assert read.licence == "apache-2.0 (declared by PyLO's model classes)"
    assert dict(read.decays) == dict(SMALL_FC.decays)
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "other")}
    assert Call(nowhere, hub_cases.build, "AdafacLO", str(folder)).result() == read.digest
    assert not (tmp_path / "other").exists()
