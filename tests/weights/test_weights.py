"""Learned weights: every way to name them, what belongs to them, and errors that say what to do.

Background: PyLO fetches its weights from the Hub and keeps their decays in its constructors. Here a
name, a file, a folder and a mapping are one thing; decays travel with the weights; nothing is
unpickled, and nothing is fetched but at construction.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pylo_dist
from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
from pylo_dist.optim.adafac import effective_decays
from pylo_dist.optim.celo2 import ARCHITECTURE as CELO2
from pylo_dist.optim.elo import ARCHITECTURE as ELO
from pylo_dist.optim.velo import ARCHITECTURE as VELO
from pylo_dist.weights import (
    CARD_KEY,
    Architecture,
    MetaNetwork,
    Registered,
    WeightsError,
    architectures,
    load_weights,
    read_file,
    register_weights,
    registered_entry,
)
from pylo_dist.weights.publish import save_weights
from support.permissions import permission_bits_hold
from support.registry import restored

DECAYS = {
    "momentum_decays": [0.01, 0.02, 0.03],
    "rms_decays": [0.04],
    "adafactor_decays": [0.05, 0.06, 0.07],
}


def tensors(seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * torch.randn(shape, generator=generator)
        for name, shape in SMALL_FC.shapes.items()
    }


def write(path: Path, values: dict[str, Tensor] | None = None, card: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        values if values is not None else tensors(),
        path,
        None if card is None else {CARD_KEY: json.dumps(card)},
    )
    return path


def load(weights: Any) -> MetaNetwork:
    return load_weights(weights, SMALL_FC)


def adafac(weights: Any, **kwargs: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO([nn.Parameter(torch.ones(3, 4))], weights=weights, **kwargs)


@pytest.fixture
def registry() -> Iterator[None]:
    """Names registered in a test are gone after it."""
    with restored():
        yield


# --------------------------------------------------------------------------------------- where from


@pytest.mark.usefixtures("registry")
def test_every_source_gives_the_same_network(tmp_path: Path) -> None:
    file = write(tmp_path / "folder" / "any_name.safetensors")
    register_weights("mine", Registered("small_fc", str(file)))
    register_weights("team/mine", Registered("small_fc", str(file.parent)))
    wanted = tensors()
    sources = [wanted, file, str(file), file.parent, str(file.parent), "mine", "team/mine"]
    loaded = [load(source) for source in sources]
    for network in loaded:
        assert {name: t.tolist() for name, t in network.tensors.items()} == {
            name: t.tolist() for name, t in wanted.items()
        }
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


def test_a_card_of_ours_without_a_digest_was_changed(tmp_path: Path) -> None:
    """One bit of the key would do, and whatever else was changed would go unseen."""
    pylo_dist.save_weights(tmp_path / "w", load(tensors()))
    file = tmp_path / "w" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"digest", b"dige3t", 1))
    with pytest.raises(WeightsError, match="card in the file has no digest"):
        load(tmp_path / "w")
    file.write_bytes(whole)
    assert load(tmp_path / "w").digest == load(tensors()).digest


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


# ------------------------------------------------------------------------------------------- decays


def rule_decays(optimizer: pylo_dist.AdafacLO) -> list[tuple[float, ...]]:
    rule = optimizer.rule
    return [rule.momentum_decays, (rule.rms_decay,), rule.factor_decays]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("registry")
def test_stored_decays_win_over_registered_ones_and_arguments_over_both(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.safetensors")
    register_weights("whole numbers", Registered("small_fc", str(bare), {"rms_decays": (0,)}))
    assert load("whole numbers").decays["rms_decays"] == (0.0,)
    assert len(load("whole numbers").digest) == 64
    carded = write(
        tmp_path / "carded.safetensors", card={"architecture": "small_fc", "decays": DECAYS}
    )
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
    assert (
        rule_decays(adafac("carded", rms_decays=(0.2,), initial_momentum_decays=(0.5, 0.6, 0.7)))
        == wanted
    )


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"architecture": "velo"}, "are for velo, this optimizer needs small_fc"),
        (
            {"decays": {"momentum": [0.1]}},
            r"unknown decays \['momentum'\], wanted \['adafactor_decays'",
        ),
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


# ----------------------------------------------------------------------- folders as PyLO saves them

SIZES = {"H": 5, "2H": 10, "4H": 20, "P": 3}


def values(architecture: Architecture, seed: int = 3) -> dict[str, Tensor]:
    """Tensors of any architecture, VeLO's in a small size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name: [SIZES.get(str(n), n) for n in shape] for name, shape in architecture.shapes.items()
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}  # type: ignore[arg-type]


def pylo_folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """What huggingface_hub's PyTorchModelHubMixin.save_pretrained leaves: config.json,
    model.safetensors, README.md.
    """
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- learned-optimizer\n---\n")
    save_file(tensors, path / "model.safetensors")
    return path


MLP_CONFIG = {"input_size": 39, "hidden_size": 32, "hidden_layers": 1}
CELO2_CONFIG = {
    "activation": "relu",
    "feature_dims": [1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3],
    "hidden_layers": 2,
    "hidden_size": 8,
    "output_size": 3,
}
RNN_CONFIG = {"input_size": 30, "lstm_hidden_size": 5, "mix_layers": True, "param_inits": 3}


def pylo_velo(path: Path, rnn_config: dict[str, Any] = RNN_CONFIG) -> tuple[str, dict[str, Tensor]]:
    """VeLO's two folders, joined by "+", and all that belongs to the network."""
    kept = values(VELO)
    of_mlp = {name for name in kept if name.split("_")[0] in ("input", "hidden", "output")}
    scratch = {name: torch.full((2,), float("nan")) for name in VELO.ignored}
    assert {name.replace("_.", ".").removesuffix("_") for name in of_mlp} == set(scratch)
    path.mkdir(exist_ok=True)
    rnn = pylo_folder(
        path / "rnn", {name: t for name, t in kept.items() if name not in of_mlp}, rnn_config
    )
    mlp = pylo_folder(
        path / "mlp",
        {**{name: kept[name] for name in of_mlp}, **scratch},
        {"param_inits": 3, "hidden_size": 4},
    )
    return f"{rnn}+{mlp}", kept


@pytest.mark.parametrize(
    ("optimizer", "config"),
    [
        ("AdafacLO", MLP_CONFIG),
        ("MuLO", MLP_CONFIG),
        ("ELO", MLP_CONFIG),
        ("CELO2", CELO2_CONFIG),
        ("ELO_CELO2", CELO2_CONFIG),
    ],
)
def test_folders_of_pylo_load_unchanged(
    tmp_path: Path, optimizer: str, config: dict[str, Any]
) -> None:
    kept = values(CELO2 if "CELO2" in optimizer else SMALL_FC)
    folder = pylo_folder(tmp_path / "saved", kept, config)
    kwargs = {"width_mults": {"w": 1.0}} if optimizer == "MuLO" else {}
    built = getattr(pylo_dist, optimizer)(
        [("w", nn.Parameter(torch.ones(3, 4)))], weights=folder, **kwargs
    )
    assert set(built.weights.tensors) == set(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in built.weights.tensors.items())


def test_the_two_folders_of_velo_are_one_network(tmp_path: Path) -> None:
    folders, kept = pylo_velo(tmp_path / "velo")
    built = pylo_dist.VeLO([nn.Parameter(torch.ones(3, 4))], num_steps=10, weights=folders)
    assert set(built.weights.tensors) == set(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in built.weights.tensors.items())
    # a "+" in the path of a folder that is there joins nothing
    one = save_weights(tmp_path / "one+folder", folders)
    assert load_weights(tmp_path / "one+folder", VELO).digest == one.digest == built.weights.digest
    rnn, mlp = folders.split("+")
    for wrong, message in {
        rnn: r"missing \['hidden_bias_.0'",
        mlp: r"missing \['final_mix_layer.bias'",
        f"{rnn}+{rnn}": "is in two of the parts",
    }.items():
        with pytest.raises(WeightsError, match=message):
            load_weights(wrong, VELO)


def test_settings_of_pylo_that_are_not_computed_here_are_refused(tmp_path: Path) -> None:
    folder = pylo_folder(tmp_path / "tanh", values(CELO2), {**CELO2_CONFIG, "activation": "tanh"})
    with pytest.raises(
        WeightsError, match="activation = 'tanh', celo2 here computes 'relu' only; use PyLO"
    ):
        load_weights(folder, CELO2)
    folders, _ = pylo_velo(tmp_path / "velo", {**RNN_CONFIG, "mix_layers": False})
    with pytest.raises(
        WeightsError, match="mix_layers = False, velo here computes True only; use PyLO"
    ):
        load_weights(folders, VELO)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json is not readable JSON.*mend it"):
        load_weights(folder, CELO2)


# -------------------------------------------------------------------------------------------- saved


@pytest.mark.parametrize("architecture", architectures().values(), ids=architectures())
def test_saved_weights_are_read_back_bit_for_bit(
    tmp_path: Path, architecture: Architecture
) -> None:
    given = load_weights(values(architecture), architecture)
    decays = {
        name: tuple(0.1 * x for x in numbers) for name, numbers in architecture.decays.items()
    }
    folder = tmp_path / "a" / "folder"
    saved = save_weights(
        folder, given, decays=decays, horizon=1234, licence="mit", description="Some words."
    )
    read = load_weights(folder)  # knows its architecture
    digest = replace(given, decays=decays).digest
    for network in (
        saved,
        read,
        load_weights(folder, architecture),
        load_weights(folder / "model.safetensors", architecture),
    ):
        assert (network.architecture, network.digest, network.horizon, network.licence) == (
            architecture.name,
            digest,
            1234,
            "mit",
        )
        assert dict(network.decays) == decays
        assert all(
            torch.equal(tensor, given.tensors[name]) for name, tensor in network.tensors.items()
        )
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    card = (folder / "README.md").read_text()
    for said in (
        architecture.name,
        digest,
        "1,234 steps",
        "license: mit",
        "Some words.",
        *map(repr, sum(decays.values(), ())),
    ):
        assert said in card
    again = save_weights(tmp_path / "again", folder)  # what a folder says goes along
    assert (dict(again.decays), again.horizon, again.licence, again.digest) == (
        decays,
        1234,
        "mit",
        digest,
    )


def test_an_optimizers_weights_can_be_saved(tmp_path: Path) -> None:
    optimizer = adafac("demo")
    saved = save_weights(tmp_path / "demo", optimizer.weights)
    assert rule_decays(adafac(tmp_path / "demo")) == rule_decays(optimizer)
    assert saved.source == "built into pylo_dist"
    with pytest.raises(WeightsError, match="'demo' are for small_fc, this optimizer needs elo"):
        pylo_dist.ELO([nn.Parameter(torch.ones(3))], weights=optimizer.weights)


def test_saving_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError,
        match="of small_fc, celo, celo_adam, celo2, elo, velo the tensors fit small_fc and elo; "
        "name the architecture",
    ):
        save_weights(tmp_path / "new", tensors())
    for architecture in ("small_fc", "elo"):
        assert (
            save_weights(tmp_path / architecture, tensors(), architecture).architecture
            == architecture
        )
    with pytest.raises(
        WeightsError,
        match="architecture 'mlp': wanted one of small_fc, celo, celo_adam, celo2, elo, velo",
    ):
        save_weights(tmp_path / "new", tensors(), "mlp")
    for decays in (
        {"rms_decay": [0.1]},
        {"rms_decays": [0.1, 0.2]},
        {"rms_decays": [float("nan")]},
    ):
        with pytest.raises(
            WeightsError,
            match=r"do not belong to small_fc: wanted momentum_decays \(3 finite numbers\)",
        ):
            save_weights(tmp_path / "new", tensors(), "small_fc", decays=decays)
    with pytest.raises(WeightsError, match="horizon=0: wanted a number of steps"):
        save_weights(tmp_path / "new", tensors(), "small_fc", horizon=0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(WeightsError, match="is a file, wanted a folder"):
        save_weights(tmp_path / "elo" / "model.safetensors", tensors(), "elo")


def test_saving_replaces_nothing_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    first = save_weights(folder, tensors(1), "small_fc")
    save_weights(folder, tensors(1), "small_fc")  # the same again
    with pytest.raises(
        WeightsError, match="holds other weights; name a new folder, or overwrite them"
    ):
        save_weights(folder, tensors(2), "small_fc")
    assert load(folder).digest == first.digest
    assert (
        save_weights(folder, tensors(2), "small_fc", overwrite=True).digest
        == load(folder).digest
        != first.digest
    )
    write(tmp_path / "taken" / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"holds other.safetensors, a weights folder holds one such file"
    ):
        save_weights(tmp_path / "taken", tensors(), "small_fc", overwrite=True)


def test_tensors_that_changed_after_they_were_saved_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path, tensors(), "small_fc")
    kept, card = read_file(tmp_path / "model.safetensors")
    kept["network.output.bias"][0] += 1e-6
    write(tmp_path / "model.safetensors", kept, card)
    with pytest.raises(WeightsError, match="changed after they were saved: fetch them again"):
        load(tmp_path)


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a file's card, and nothing else."""
    kept, card = read_file(path)
    write(path, kept, {**card, **changes})


def test_decays_and_architecture_that_changed_are_refused(tmp_path: Path) -> None:
    saved = save_weights(tmp_path, tensors(), "small_fc")
    file = tmp_path / "model.safetensors"
    changed = {**saved.decays, "momentum_decays": (0.95216392, 0.14245212, 0.06812963)}
    for changes in ({"decays": changed}, {"architecture": "elo", "decays": {}}):
        save_weights(tmp_path, tensors(), "small_fc", overwrite=True)
        rewrite(file, **changes)
        with pytest.raises(WeightsError, match=r"architecture and decays have digest .* changed"):
            load_weights(tmp_path)
    assert load({**tensors()}).digest != load_weights(tensors(), ELO).digest


def test_what_an_earlier_version_saved_loads_with_a_note(tmp_path: Path) -> None:
    """Its digests were of the tensors alone, in files and in states."""
    network = save_weights(tmp_path / "w", tensors(), "small_fc", decays=DECAYS)
    rewrite(tmp_path / "w" / "model.safetensors", digest=network.tensors_digest)
    with pytest.warns(UserWarning, match=r"digest in the file is that of an earlier version"):
        optimizer = adafac(tmp_path / "w")
    assert optimizer.weights.digest == network.digest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_weights(tmp_path / "w", tmp_path / "w")  # the same weights, under a digest of today
    assert adafac(tmp_path / "w").weights.digest == network.digest

    optimizer.param_groups[0]["state_weights"] = network.tensors_digest
    state = optimizer.state_dict()
    other = adafac(network)
    with pytest.warns(UserWarning, match="knew weights by their tensors alone"):
        other.load_state_dict(state)
    assert other.param_groups[0]["state_weights"] == network.digest
    decays = {**network.decays, "rms_decays": (0.05,)}
    with pytest.raises(ValueError, match="state_weights"):
        adafac(replace(network, decays=decays)).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "value", [True, 10**400, 1e300, float("nan")], ids=["bool", "int", "float", "NaN"]
)
def test_numbers_that_float32_does_not_reach_are_refused(tmp_path: Path, value: float) -> None:
    file = write(tmp_path / "w.safetensors", card={"decays": {"rms_decays": [value]}})
    with pytest.raises(WeightsError, match=r"'rms_decays' = .*float32 reaches|NaN is no number"):
        load(file)
    with pytest.raises(WeightsError, match=r"'rms_decays' = .*finite numbers"):
        save_weights(tmp_path / "new", tensors(), "small_fc", decays={"rms_decays": [value]})
    wide = {name: tensor.double() for name, tensor in tensors().items()}
    wide["network.output.bias"][1] = 1e300
    with pytest.raises(WeightsError, match=r"'network.output.bias' holds numbers that float32"):
        load(wide)


# ----------------------------------------------------------------------------------------- registry


def test_what_the_registry_says() -> None:
    entries = pylo_dist.registered_weights()
    assert {name: entry.architecture for name, entry in entries.items()} == {
        "amoudgl/adafac-mlp-lopt": "small_fc",
        "amoudgl/celo": "celo",
        "amoudgl/celo-adam": "celo_adam",
        "amoudgl/velo-4000": "velo",
        "amoudgl/velo-s": "velo",
        "btherien/mulo": "small_fc",
        "DiamondXL/elo": "elo",
        "DiamondXL/celo2": "celo2",
        "DiamondXL/elo-celo2": "celo2",
        "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP": "velo",
    }
    assert {name: entry.horizon for name, entry in entries.items() if entry.horizon} == {
        "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP": 150_000,
        "amoudgl/adafac-mlp-lopt": 2000,
        "amoudgl/celo": 2000,
        "amoudgl/celo-adam": 2000,
        "amoudgl/velo-4000": 150_000,
        "amoudgl/velo-s": 2000,
    }
    licences = {name: entry.licence.split()[0] for name, entry in entries.items()}
    assert set(licences.values()) == {"apache-2.0", "mit", "unknown"}
    assert licences["amoudgl/velo-4000"] == "unknown"  # a copy of Google's
    assert {name: dict(entry.constants) for name, entry in entries.items() if entry.constants} == {
        "amoudgl/velo-4000": {"factor": 100.0},
        "amoudgl/velo-s": {"factor": 1.0},
    }
    assert entries["btherien/mulo"].trained_on == "unknown"
    assert "4 tasks" in entries["amoudgl/celo"].trained_on
    assert entries["btherien/mulo"].decays == SMALL_FC.decays
    at_v2 = registered_entry("btherien/mulo@v2")
    assert at_v2 is not None
    assert (at_v2.revision, at_v2.decays) == ("v2", SMALL_FC.decays)
    assert registered_entry("somebody/else@v2") is None


def test_sha256_of_every_source(tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for wrong in ("abc", digest.upper(), f"{digest}+{digest}"):
        with pytest.raises(ValueError, match="wanted 64 lower-case hex digits for every source"):
            Registered("small_fc", str(file), sha256=wrong)
    assert Registered("velo", "a/b+c/d", sha256=f"{digest}+{digest}")


@pytest.mark.usefixtures("registry")
def test_registered_files_have_their_sha256(tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    register_weights("mine", Registered("small_fc", str(file), sha256=digest))
    assert load("mine").digest == load(file).digest
    write(file, tensors(8))
    with pytest.raises(
        WeightsError,
        match=f"w.safetensors has sha256 .*, registered is {digest}; it is another file",
    ):
        load("mine")


# ------------------------------------------------------------------------------------------ refused


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
        (
            {**tensors(), "network.input.bias": torch.zeros(32, dtype=torch.int32)},
            "'network.input.bias' is torch.int32",
        ),
        (
            {**tensors(), "network.output.bias": torch.tensor([0.0, float("nan")])},
            "'network.output.bias' holds inf or NaN",
        ),
        (
            {**tensors(), "network.output.bias": torch.tensor([0.0, float("inf")])},
            "'network.output.bias' holds inf or NaN",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
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
    with pytest.raises(
        WeightsError, match=r"only pickled files \(other.pt, pytorch_model.bin\), which are refused"
    ):
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
            WeightsError,
            match=r"no such file or folder, nor a registered name \(demo, btherien/mulo.*mine\)",
        ) as e:
            load(name)
        assert repr(name) in str(e.value)


@pytest.mark.usefixtures("registry")
def test_names_of_another_architecture_are_refused() -> None:
    register_weights("theirs", Registered("velo", "somewhere"))
    with pytest.raises(WeightsError, match="'theirs' are for velo, this optimizer needs small_fc"):
        load("theirs")


# ------------------------------------------------------------------------------------------ network


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


OFFLINE = """
import time, torch, pylo_dist
start = time.perf_counter()
for name in (None, "somebody/weights@v1", "no such/name"):
    try:
        given = {} if name is None else {"weights": name}
        pylo_dist.AdafacLO([torch.nn.Parameter(torch.ones(3))], **given)
    except pylo_dist.WeightsError as error:
        print(error)
print(time.perf_counter() - start)
"""


def test_default_weights_without_a_network_fail_quickly_and_name_the_ways_out(
    tmp_path: Path,
) -> None:
    done = run(OFFLINE, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    default, other, invalid, took = done.stdout.strip().splitlines()
    assert default.startswith("weights 'btherien/mulo' could not be had from the Hub")
    assert other.startswith("weights 'somebody/weights@v1' could not be had from the Hub")
    assert invalid.startswith("weights 'no such/name' could not be had from the Hub")
    for way_out in (
        "connect",
        "hf download btherien/mulo",
        ".safetensors file",
        "a mapping",
        'weights="demo"',
    ):
        assert way_out in default
    assert float(took) < 10.0


NO_SOCKETS = """
import socket
def refused(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refused
import torch, pylo_dist
from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
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


def test_what_may_not_be_read_is_refused_as_such(tmp_path: Path) -> None:
    """Not as if it were not there, or were a name of the Hub."""
    folder = tmp_path / "mine"
    save_weights(folder, tensors(), "small_fc")
    with permission_bits_hold():
        for path in (folder / "model.safetensors", folder):
            bits = path.stat().st_mode
            path.chmod(0)
            with pytest.raises(WeightsError, match=f"{folder}.*Permission denied"):
                load_weights(folder, SMALL_FC)
            path.chmod(bits)
    load_weights(folder, SMALL_FC)


# ------------------------------------------------------------------------------------------- random


@pytest.mark.parametrize("name", pylo_dist.registered_optimizers())
def test_random_weights_move_little_and_are_warned_of(name: str, tmp_path: Path) -> None:
    """Of every architecture: the same numbers again, other seeds, a step that stays small."""
    entry = pylo_dist.registered_optimizers()[name]
    architecture = entry.architecture.name
    network = pylo_dist.random_weights(architecture)
    assert (network.architecture, network.is_random) == (architecture, True)
    assert network.digest == pylo_dist.random_weights(architecture, 0).digest
    assert network.digest != pylo_dist.random_weights(architecture, seed=1).digest
    param = nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)))
    before, param.grad = param.detach().clone(), 0.1 * torch.ones_like(param)
    extra: dict[str, Any] = {"width_mults": {"w": 1.0}} if name == "mulo" else {}
    extra |= {"num_steps": 10} if "num_steps" in entry.arguments else {}
    folder = save_weights(tmp_path / "w", network)
    for weights in (network, folder, tmp_path / "w"):
        optimizer = entry.face([("w", param)], weights=weights, **extra)
        with pytest.warns(pylo_dist.RandomWeightsWarning, match="does not train them"):
            optimizer.step(1.0)
    moved = (param.detach() - before).norm() / before.norm()
    assert 0.0 < float(moved) < 0.03  # in three steps


def test_sizes_of_random_weights() -> None:
    tensors = pylo_dist.random_weights("velo", sizes={"H": 6, "P": 3}).tensors
    assert tensors["lstm.linear.weight"].shape == (24, 12)
    assert tensors["input_weights_"].shape == (3, 4, 30)
    for arguments, said in (
        ({"architecture": "nothing"}, "architecture 'nothing': wanted one of"),
        ({"architecture": "velo", "seed": -1}, "seed=-1"),
        ({"architecture": "velo", "sizes": {"H": 0}}, r"sizes\['H'\]=0: wanted 1 or more for H, P"),
        ({"architecture": "small_fc", "sizes": {"H": 4}}, "for no letter, which small_fc"),
    ):
        with pytest.raises(WeightsError, match=said):
            pylo_dist.random_weights(**arguments)  # type: ignore[arg-type]
