"""Learned weights: the registry, and loading from a mapping, a file, a folder, the Hub or the built-in demo.

Reads safetensors only; nothing is unpickled, nothing is fetched at import, and nothing changes after construction.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.abc import Traversable
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Decays = dict[str, tuple[float, ...]]
WeightsLike = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]

CARD_KEY = "pylo_dist"  # safetensors metadata entry of ours: a JSON card
PICKLED = (".bin", ".pt", ".pth", ".pkl")


class WeightsError(ValueError):
    """Learned weights that cannot be had or do not fit; the message names the ways out."""


@dataclass(frozen=True)
class Architecture:
    """A meta-network's tensors, and the decays that its weights imply when none are stored with them.

    Attributes:
        name: as in safetensors cards.
        shapes: every tensor and its shape; exactly these must be there. A letter stands for a size that the file decides, the
            same wherever it occurs, a number before it for a multiple: ("4H", "2H").
        ignored: names that may be there and are not read.
        decays: e.g. {"momentum_decays": offsets}, see the optimizer's constructor.
    """

    name: str
    shapes: Mapping[str, tuple[int | str, ...]]
    decays: Mapping[str, tuple[float, ...]]
    ignored: tuple[str, ...] = ()


# PyLO keeps the decay offsets of btherien/mulo in its constructors, not in the checkpoint, and applies them to any weights.
SMALL_FC = Architecture(
    "small_fc",
    {
        "network.input.weight": (32, 39),
        "network.input.bias": (32,),
        "network.linear_0.weight": (32, 32),
        "network.linear_0.bias": (32,),
        "network.output.weight": (2, 32),
        "network.output.bias": (2,),
    },
    {
        "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
        "rms_decays": (0.01079706,),
        "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
    },
)

# the same network with decays that are used as they are
ELO = Architecture("elo", SMALL_FC.shapes, {})

_CELO2_GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # widths of the groups of features, each with a matrix of its own
CELO2 = Architecture(
    "celo2",
    {
        **{f"w0.{i}": (width, 8) for i, width in enumerate(_CELO2_GROUPS)},
        "b0": (8,),
        "dense_w.0": (8, 8),
        "dense_b.0": (8,),
        "dense_w.1": (8, 3),
        "dense_b.1": (3,),
    },
    {},
)

VELO = Architecture(
    "velo",
    {
        "mix_layer1.weight": ("H", 30),  # in the files, and in the reference's, but without effect
        "mix_layer1.bias": ("H",),
        "mix_layer2.weight": ("H", 30),
        "mix_layer2.bias": ("H",),
        "final_mix_layer.weight": ("H", 30),
        "final_mix_layer.bias": ("H",),
        "lstm.linear.weight": ("4H", "2H"),
        "lstm.linear.bias": ("4H",),
        "rnn_to_controls.weight": ("P", "H"),
        "rnn_to_controls.bias": ("P",),
        "step_size.weight": (1, "H"),
        "step_size.bias": (1,),
        "lstm_init_state.0": (1, "H"),
        "lstm_init_state.1": (1, "H"),
        "input_weights_": ("P", 4, 30),
        "input_bias_": ("P", 4),
        "hidden_weights_.0": ("P", 4, 4),
        "hidden_bias_.0": ("P", 4),
        "output_weights_": ("P", 3, 4),
        "output_bias_": ("P", 3),
    },
    {},
    # PyLO's files also hold the last set it worked with
    ignored=("input_weights", "input_bias", "hidden_weights.0", "hidden_bias.0", "output_weights", "output_bias"),
)


@dataclass(frozen=True)
class Registered:
    """A name that `weights=` understands: where its file is and what belongs to it.

    Attributes:
        source: a Hub repository "org/name[@revision]", or a local file or folder; several, joined by "+", hold one part each.
        decays: decays that belong to the weights but are not stored in the file.
        note: one line for people: origin, horizon, licence.
    """

    architecture: str
    source: str
    decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""


_REGISTRY: dict[str, Registered] = {
    "btherien/mulo": Registered(
        "small_fc", "btherien/mulo", SMALL_FC.decays, "PyLO's small_fc_lopt weights, meta-trained with muP (arXiv 2406.00153)"
    ),
    "DiamondXL/elo": Registered("elo", "DiamondXL/elo", {}, "PyLO's ELO weights"),
    "DiamondXL/celo2": Registered("celo2", "DiamondXL/celo2", {}, "PyLO's CELO2 weights (arXiv 2602.19142)"),
    "DiamondXL/elo-celo2": Registered("celo2", "DiamondXL/elo-celo2", {}, "PyLO's ELO-CELO2 weights"),
    "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP": Registered(
        "velo",
        "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP",
        {},
        "Google's VeLO as PyLO has it (arXiv 2211.09760), meta-trained up to 150k steps",
    ),
}


def register_weights(name: str, entry: Registered) -> None:
    """Make `weights=name` mean `entry`. Raises ValueError when the name is taken by something else."""
    if name == "demo" or _REGISTRY.get(name, entry) != entry:
        raise ValueError(f"weights name {name!r} is taken; register under another name")
    _REGISTRY[name] = entry


def registered_weights() -> dict[str, Registered]:
    """All registered names."""
    return dict(_REGISTRY)


@dataclass(frozen=True)
class MetaNetwork:
    """Frozen learned weights.

    Attributes:
        name: as the user named them.
        tensors: float32 CPU tensors by name.
        decays: decays stored or registered with them.
        digest: sha256 over names, shapes and values, hex.
    """

    name: str
    architecture: str
    tensors: Mapping[str, Tensor]
    decays: Mapping[str, tuple[float, ...]]
    digest: str

    def describe(self) -> str:
        """One line for logs: name and the start of the hash."""
        return f"weights {self.name} (sha256 {self.digest[:12]})"


def load_weights(weights: WeightsLike | MetaNetwork, architecture: Architecture) -> MetaNetwork:
    """The learned weights named by `weights`, checked against `architecture`.

    Args:
        weights: "demo", a registered name, `org/name[@revision]` on the Hub, a folder, a .safetensors file, or a mapping.

    Raises:
        WeightsError: they cannot be had, or a tensor is missing, extra or misshapen.
    """
    if isinstance(weights, MetaNetwork):
        return weights
    decays: Mapping[str, tuple[float, ...]] = architecture.decays
    if isinstance(weights, Mapping):
        return _checked("a mapping", weights, {}, architecture, decays)
    name = os.fspath(weights)
    if name == "demo":
        demo = _demo_file(architecture)
        if not demo.is_file():
            raise WeightsError(f"there are no demo weights for {architecture.name}; name a folder, a file or a Hub repository")
        with resources.as_file(demo) as path:
            return _checked("demo", *_read_file(path), architecture, decays)
    source = name
    if name in _REGISTRY:
        entry = _REGISTRY[name]
        if entry.architecture != architecture.name:
            raise WeightsError(f"weights {name!r} are for {entry.architecture}, this optimizer needs {architecture.name}")
        source, decays = entry.source, {**decays, **entry.decays}
    tensors: dict[str, Tensor] = {}
    card: dict[str, Any] = {}
    for part in source.split("+"):
        part_tensors, part_card = _read_file(_locate(name, part, architecture))
        tensors.update(part_tensors)
        card.update(part_card)
    return _checked(name, tensors, card, architecture, decays)


def _demo_file(architecture: Architecture) -> Traversable:
    return resources.files(__package__) / "data" / f"demo_{architecture.name}.safetensors"


def _locate(name: str, source: str, architecture: Architecture) -> Path:
    """The .safetensors file of a file, a folder or a Hub repository."""
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED)
            why = (
                f"only pickled files ({', '.join(pickled)}), which are refused"
                if pickled and not found
                else f"{len(found)} of them"
            )
            raise WeightsError(f"folder {source}: wanted exactly one .safetensors file, found {why}")
        return found[0]
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(f"file {source}: only .safetensors files are read; convert it with safetensors.torch.save_file")
        return path
    repository, _, revision = source.partition("@")
    is_file_name = path.suffix in (".safetensors", *PICKLED)  # not any suffix: "org/name-1.5@v2.0" has two dots
    if is_file_name or repository.count("/") != 1 or source.startswith((".", "/", "~")):
        known = ", ".join(["demo", *_REGISTRY])
        raise WeightsError(f"weights {name!r}: no such file or folder, nor a registered name ({known})")
    return _download(name, repository, revision or None, architecture)


def _download(name: str, repository: str, revision: str | None, architecture: Architecture) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "model.safetensors", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        demo = ' or pass weights="demo" for the small hand-made ones' if _demo_file(architecture).is_file() else ""
        raise WeightsError(
            f"weights {name!r} could not be had from the Hub ({first_line}). Ways out: connect and try again; on a machine with "
            f"a network run `hf download {repository}` and pass its folder; pass a .safetensors file or a mapping;{demo}"
        ) from error


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is the wanted one; letters met for the first time get their size in `sizes` (modified in place)."""
    if len(shape) != len(wanted):
        return False
    for got, want in zip(shape, wanted, strict=True):
        if isinstance(want, str):
            factor = int(want[:-1] or 1)
            want = factor * sizes.setdefault(want[-1], got // factor)
        if got != want:
            return False
    return True


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and our card (empty when the file has none)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            metadata = file.metadata() or {}
        card = json.loads(metadata.get(CARD_KEY, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("decays", {}), dict):
        raise WeightsError(f"{path}: the card {card!r} is not what was wanted, {{'architecture': ..., 'decays': {{...}}}}")
    return tensors, card


def _checked(
    name: str,
    tensors: Mapping[str, Tensor],
    card: dict[str, Any],
    architecture: Architecture,
    decays: Mapping[str, tuple[float, ...]],
) -> MetaNetwork:
    if card.get("architecture", architecture.name) != architecture.name:
        raise WeightsError(f"weights {name!r} are for {card['architecture']}, this optimizer needs {architecture.name}")
    missing = sorted(set(architecture.shapes) - set(tensors))
    extra = sorted(set(tensors) - set(architecture.shapes) - set(architecture.ignored))
    if missing or extra:
        raise WeightsError(
            f"weights {name!r} do not fit {architecture.name}: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    digest = hashlib.sha256()
    frozen: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for key in sorted(architecture.shapes):
        tensor = tensors[key]
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"weights {name!r}: {key!r} is a {type(tensor).__name__}, wanted a tensor")
        if not _fits(tuple(tensor.shape), architecture.shapes[key], sizes) or not tensor.is_floating_point():
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise WeightsError(
                f"weights {name!r}: {key!r} is {tensor.dtype} {tuple(tensor.shape)}, wanted floating point "
                f"{tuple(architecture.shapes[key])}{f' with {known}' if known else ''}"
            )
        if not bool(tensor.isfinite().all()):
            raise WeightsError(f"weights {name!r}: {key!r} holds inf or NaN")
        frozen[key] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(frozen[key].numpy().tobytes())
    stored = {}
    for key, value in card.get("decays", {}).items():
        if not isinstance(value, list) or not all(isinstance(x, (int, float)) for x in value):
            raise WeightsError(f"weights {name!r}: the card has {key!r} = {value!r}, wanted a list of numbers")
        stored[key] = tuple(float(x) for x in value)
    unknown = sorted(set(stored) - set(architecture.decays))
    if unknown:
        raise WeightsError(f"weights {name!r}: the card names unknown decays {unknown}, wanted {sorted(architecture.decays)}")
    return MetaNetwork(name, architecture.name, frozen, {**decays, **stored}, digest.hexdigest())
