"""Learned weights: every way to name them, what belongs to them, and errors that say what to do.

Background: PyLO fetches its weights from the Hub and keeps their decays in its constructors. Here a name, a file, a folder and a
mapping are one thing; decays travel with the weights; nothing is unpickled, and nothing is fetched but at construction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pylo_dist
from pylo_dist import weights as weights_module
from pylo_dist.optim.adafac import effective_decays
from pylo_dist.weights import CARD_KEY, SMALL_FC, MetaNetwork, Registered, WeightsError, load_weights, register_weights

DECAYS = {"momentum_decays": [0.01, 0.02, 0.03], "rms_decays": [0.04], "adafactor_decays": [0.05, 0.06, 0.07]}


def tensors(seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in SMALL_FC.shapes.items()}


def write(path: Path, values: dict[str, Tensor] | None = None, card: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values if values is not None else tensors(), path, None if card is None else {CARD_KEY: json.dumps(card)})
    return path


def load(weights: Any) -> MetaNetwork:
    return load_weights(weights, SMALL_FC)


def adafac(weights: Any, **kwargs: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO([nn.Parameter(torch.ones(3, 4))], weights=weights, **kwargs)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names registered in a test are gone after it."""
    monkeypatch.setattr(weights_module, "_REGISTRY", dict(weights_module._REGISTRY))


# ---------------------------------------------------------------------------------------- where from


@pytest.mark.usefixtures("registry")
def test_every_source_gives_the_same_network(tmp_path: Path) -> None:
    file = write(tmp_path / "folder" / "any_name.safetensors")
    register_weights("mine", Registered("small_fc", str(file)))
    register_weights("team/mine", Registered("small_fc", str(file.parent)))
    wanted = tensors()
    sources = [wanted, file, str(file), file.parent, str(file.parent), "mine", "team/mine"]
    loaded = [load(source) for source in sources]
    for network in loaded:
        assert {name: t.tolist() for name, t in network.tensors.items()} == {name: t.tolist() for name, t in wanted.items()}
        assert all(t.dtype == torch.float32 for t in network.tensors.values())
        assert network.digest == loaded[0].digest
        assert network.architecture == "small_fc"
        assert {k: tuple(v) for k, v in network.decays.items()} == dict(SMALL_FC.decays)
    assert [n.name for n in loaded] == [
        "a mapping",
        str(file),
        str(file),
        str(file.parent),
        str(file.parent),
        "mine",
        "team/mine",
    ]


def test_demo_is_built_in() -> None:
    demo = load("demo")
    assert demo.name == "demo"
    assert set(demo.tensors) == set(SMALL_FC.shapes)
    params = [nn.Parameter(torch.ones(3, 4))]
    optimizer = pylo_dist.AdafacLO(params, weights="demo")
    params[0].grad = torch.full((3, 4), 0.1)
    optimizer.step()
    assert bool((params[0] < 1.0).all())  # against the gradient
    assert f"weights demo (sha256 {demo.digest[:12]})" in str(optimizer.report())


def test_other_floating_point_dtypes_are_read_as_float32() -> None:
    halves = {name: t.to(torch.bfloat16) for name, t in tensors().items()}
    network = load(halves)
    for name, tensor in network.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].float())


def test_the_network_does_not_share_the_callers_memory() -> None:
    given = tensors()
    network = load(given)
    given["network.output.bias"].fill_(5.0)
    assert torch.equal(network.tensors["network.output.bias"], tensors()["network.output.bias"])


def test_digest_follows_the_values_and_not_the_order() -> None:
    network = load(tensors())
    assert load(dict(reversed(tensors().items()))).digest == network.digest
    for name in SMALL_FC.shapes:
        changed = tensors()
        changed[name].view(-1)[-1] += 1e-6
        assert load(changed).digest != network.digest, name
    assert network.describe() == f"weights a mapping (sha256 {network.digest[:12]})"


@pytest.mark.usefixtures("registry")
def test_registered_names() -> None:
    entry = Registered("small_fc", "somewhere/else@v1", note="a note")
    register_weights("mine", entry)
    register_weights("mine", entry)  # the same again is no conflict
    assert pylo_dist.registered_weights()["mine"] == entry
    assert "btherien/mulo" in pylo_dist.registered_weights()
    pylo_dist.registered_weights().clear()
    assert "mine" in pylo_dist.registered_weights()
    for name in ("mine", "demo", "btherien/mulo"):
        with pytest.raises(ValueError, match=f"weights name {name!r} is taken"):
            register_weights(name, Registered("small_fc", "somewhere/else@v2"))


# --------------------------------------------------------------------------------------------- decays


def rule_decays(optimizer: pylo_dist.AdafacLO) -> list[tuple[float, ...]]:
    rule = optimizer.rule
    return [rule.momentum_decays, (rule.rms_decay,), rule.factor_decays]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("registry")
def test_stored_decays_win_over_registered_ones_and_arguments_over_both(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.safetensors")
    carded = write(tmp_path / "carded.safetensors", card={"architecture": "small_fc", "decays": DECAYS})
    partial = write(tmp_path / "partial.safetensors", card={"decays": {"rms_decays": [0.04]}})
    registered = {"momentum_decays": (-0.01, -0.02, -0.03), "rms_decays": (-0.04,)}
    for name, file in {"bare": bare, "carded": carded, "partial": partial}.items():
        register_weights(name, Registered("small_fc", str(file), registered))
    architecture = {name: tuple(values) for name, values in SMALL_FC.decays.items()}
    stored = {name: tuple(values) for name, values in DECAYS.items()}
    assert dict(load(bare).decays) == architecture
    assert dict(load("bare").decays) == {**architecture, **registered}
    assert dict(load(carded).decays) == dict(load("carded").decays) == stored
    assert dict(load("partial").decays) == {**architecture, **registered, "rms_decays": (0.04,)}

    initial = [(0.9, 0.99, 0.999), (0.999,), (0.9, 0.99, 0.999)]
    wanted = [effective_decays(i, stored[name]) for i, name in zip(initial, DECAYS, strict=True)]
    assert rule_decays(adafac("carded")) == wanted
    wanted[1] = effective_decays((0.999,), (0.2,))
    assert rule_decays(adafac("carded", rms_decays=(0.2,))) == wanted
    wanted[0] = effective_decays((0.5, 0.6, 0.7), stored["momentum_decays"])
    assert rule_decays(adafac("carded", rms_decays=(0.2,), initial_momentum_decays=(0.5, 0.6, 0.7))) == wanted


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"architecture": "velo"}, "are for velo, this optimizer needs small_fc"),
        ({"decays": {"momentum": [0.1]}}, r"unknown decays \['momentum'\], wanted \['adafactor_decays'"),
        ({"decays": {"rms_decays": 0.1}}, "'rms_decays'.*0.1"),
        ({"decays": [0.1]}, "decays"),
        (["small_fc"], "card"),
    ],
)
def test_cards_that_do_not_fit_are_refused(tmp_path: Path, card: Any, message: str) -> None:
    file = write(tmp_path / "w.safetensors", card=card)
    with pytest.raises(WeightsError, match=message):
        load(file)


def test_stored_decays_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors", card={"decays": {"momentum_decays": [0.1]}})
    with pytest.raises(ValueError, match=r"momentum_decays=\(0.1,\): wanted 3 finite numbers"):
        adafac(file)


# -------------------------------------------------------------------------------------------- refused


def _without(name: str) -> dict[str, Any]:
    return {key: t for key, t in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_without("network.output.bias"), r"missing \['network.output.bias'\], unexpected none"),
        ({**tensors(), "extra": torch.zeros(1)}, r"missing none, unexpected \['extra'\]"),
        (
            {**tensors(), "network.input.weight": torch.zeros(39, 32)},
            r"'network.input.weight' is torch.float32 \(39, 32\), wanted floating point \(32, 39\)",
        ),
        ({**tensors(), "network.input.bias": torch.zeros(32, dtype=torch.int32)}, "'network.input.bias' is torch.int32"),
        ({**tensors(), "network.output.bias": torch.tensor([0.0, float("nan")])}, "'network.output.bias' holds inf or NaN"),
        ({**tensors(), "network.output.bias": torch.tensor([0.0, float("inf")])}, "'network.output.bias' holds inf or NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    for source in (values, write(tmp_path / "w.safetensors", values)):
        with pytest.raises(WeightsError, match=message):
            load(source)


def test_a_mapping_of_something_else_is_refused_by_name() -> None:
    with pytest.raises(WeightsError, match=r"'network.output.bias' is a list, wanted a tensor"):
        load({**tensors(), "network.output.bias": [0.0, 0.0]})


def test_folders_need_exactly_one_file(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    (pickled / "other.pt").write_bytes(b"\x80")
    with pytest.raises(WeightsError, match=r"only pickled files \(other.pt, pytorch_model.bin\), which are refused"):
        load(pickled)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsError, match=r"wanted exactly one .safetensors file, found 0"):
        load(empty)
    write(tmp_path / "two" / "a.safetensors")
    write(tmp_path / "two" / "b.safetensors")
    with pytest.raises(WeightsError, match=r"wanted exactly one .safetensors file, found 2"):
        load(tmp_path / "two")


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "weights.pt"
    torch.save(tensors(), pickled)
    with pytest.raises(WeightsError, match=r"only .safetensors files are read"):
        load(pickled)
    renamed = tmp_path / "weights.safetensors"
    renamed.write_bytes(pickled.read_bytes())
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(renamed)


@pytest.mark.usefixtures("registry")
def test_unknown_names_list_the_known_ones() -> None:
    register_weights("mine", Registered("small_fc", "somewhere"))
    for name in ("mulo", "missing.safetensors", "./folder/of/weights", "/no/such/folder"):
        with pytest.raises(
            WeightsError, match=r"no such file or folder, nor a registered name \(demo, btherien/mulo.*mine\)"
        ) as e:
            load(name)
        assert repr(name) in str(e.value)


@pytest.mark.usefixtures("registry")
def test_names_of_another_architecture_are_refused() -> None:
    register_weights("theirs", Registered("velo", "somewhere"))
    with pytest.raises(WeightsError, match="'theirs' are for velo, this optimizer needs small_fc"):
        load("theirs")


# -------------------------------------------------------------------------------------------- network


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False
    )


OFFLINE = """
import time, torch, pylo_dist
start = time.perf_counter()
for name in (None, "somebody/weights@v1", "no such/name"):
    try:
        pylo_dist.AdafacLO([torch.nn.Parameter(torch.ones(3))], **({} if name is None else {"weights": name}))
    except pylo_dist.WeightsError as error:
        print(error)
print(time.perf_counter() - start)
"""


def test_default_weights_without_a_network_fail_quickly_and_name_the_ways_out(tmp_path: Path) -> None:
    done = run(OFFLINE, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    default, other, invalid, took = done.stdout.strip().splitlines()
    assert default.startswith("weights 'btherien/mulo' could not be had from the Hub")
    assert other.startswith("weights 'somebody/weights@v1' could not be had from the Hub")
    assert invalid.startswith("weights 'no such/name' could not be had from the Hub")
    for way_out in ("connect", "hf download btherien/mulo", ".safetensors file", "a mapping", 'weights="demo"'):
        assert way_out in default
    assert float(took) < 10.0


def test_files_found_on_the_hub_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    file, asked = write(tmp_path / "model.safetensors"), []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("somebody/weights-1.5@v2.0").digest == load(file).digest
    assert load("btherien/mulo").name == "btherien/mulo"
    assert asked == [("somebody/weights-1.5", "model.safetensors", "v2.0"), ("btherien/mulo", "model.safetensors", None)]


NO_SOCKETS = """
import socket
def refused(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refused
import torch, pylo_dist
from pylo_dist.weights import SMALL_FC
tensors = {name: torch.zeros(shape) for name, shape in SMALL_FC.shapes.items()}
for weights in (tensors, "demo"):
    pylo_dist.AdafacLO([torch.nn.Parameter(torch.ones(3))], weights=weights)
try:
    socket.socket()
except AssertionError:
    print("built")
"""


def test_nothing_is_fetched_at_import_or_for_local_weights(tmp_path: Path) -> None:
    done = run(NO_SOCKETS, HF_HOME=str(tmp_path))
    assert done.stdout.strip() == "built", done.stderr
    assert not list(tmp_path.iterdir())
