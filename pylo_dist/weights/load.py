"""Learned weights: the registry, and loading from a mapping, a file, a folder, the Hub or the
built-in demo.

Reads safetensors only; nothing is unpickled, nothing is fetched at import, and nothing changes
after construction.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import hub
from .hub import PICKLED

if TYPE_CHECKING:
    from importlib.abc import Traversable  # not there in Python 3.14

WeightsLike = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]

CARD_KEY = "pylo_dist"  # safetensors metadata entry of ours: a JSON card
UNKNOWN = "unknown"


class WeightsError(ValueError):
    """Learned weights that cannot be had or do not fit; the message names the ways out."""


class WeightsChangedError(WeightsError):
    """The tensors of a file are not those that its own card was written for."""


@dataclass(frozen=True)
class Architecture:
    """A meta-network's tensors, and the decays that its weights imply when none are stored with
    them.

    Attributes:
        name: as in safetensors cards.
        shapes: every tensor and its shape; exactly these must be there. A letter stands for a size
            that the file decides, the same wherever it occurs, a number before it for a multiple:
            ("4H", "2H").
        ignored: names that may be there and are not read.
        decays: e.g. {"momentum_decays": offsets}, see the optimizer's constructor.
        config: settings in PyLO's config.json that change the function but no tensor, and the value
            that is computed here.
    """

    name: str
    shapes: Mapping[str, tuple[int | str, ...]]
    decays: Mapping[str, tuple[float, ...]]
    ignored: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


# PyLO keeps the decay offsets of btherien/mulo in its constructors, not in the checkpoint, and
# applies them to any weights.
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

# widths of the groups of features, each with a matrix of its own
_CELO2_GROUPS = (
    1,
    1,
    1,
    3,
    1,
    3,
    1,
    3,
    1,
    3,
    3,
    3,
    3,
    3,
)
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
    config={"activation": "relu"},
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
    ignored=(
        "input_weights",
        "input_bias",
        "hidden_weights.0",
        "hidden_bias.0",
        "output_weights",
        "output_bias",
    ),
    config={"mix_layers": True},
)

ARCHITECTURES = {architecture.name: architecture for architecture in (SMALL_FC, ELO, CELO2, VELO)}


@dataclass(frozen=True)
class Registered:
    """A name that `weights=` understands: where its file is and what belongs to it.

    Attributes:
        architecture: "small_fc", "elo", "celo2" or "velo".
        source: a Hub repository "org/name[@revision]", or a local file or folder; several, joined
        by "+", hold one part each. decays: decays that belong to the weights but are not stored in
        the file.
        note: one line for people: origin and anything to know.
        horizon: the longest run of the inner training, in steps; None: unknown.
        licence: its identifier first, as in "apache-2.0"; then, if need be, who says so.
        revision: branch, tag or commit for sources without an "@"; "": the default branch.
        sha256: what the file must have, hex, joined by "+" as the sources are; "": unknown, not
            compared.
    """

    architecture: str
    source: str
    decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""
    horizon: int | None = None
    licence: str = UNKNOWN
    revision: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        digests = self.sha256.split("+") if self.sha256 else []
        if digests and (
            len(digests) != len(self.source.split("+"))
            or not all(re.fullmatch("[0-9a-f]{64}", d) for d in digests)
        ):
            raise ValueError(
                f"sha256={self.sha256!r} of {self.source}: wanted 64 lower-case hex digits for "
                "every source, in '+'"
            )


# The released files were not seen when this was written: nothing is pinned, and what is unknown
# says so.
_PYLO_LICENCE = "apache-2.0 (declared by PyLO's model classes)"
_REGISTRY: dict[str, Registered] = {
    "btherien/mulo": Registered(
        "small_fc",
        "btherien/mulo",
        SMALL_FC.decays,
        "PyLO's small_fc_lopt weights, meta-trained with muP (arXiv 2406.00153); decays from "
        "PyLO's constructor",
        licence=_PYLO_LICENCE,
    ),
    "DiamondXL/elo": Registered(
        "elo", "DiamondXL/elo", {}, "PyLO's ELO weights", licence=_PYLO_LICENCE
    ),
    "DiamondXL/celo2": Registered(
        "celo2",
        "DiamondXL/celo2",
        {},
        "PyLO's CELO2 weights (arXiv 2602.19142)",
        licence=_PYLO_LICENCE,
    ),
    "DiamondXL/elo-celo2": Registered(
        "celo2", "DiamondXL/elo-celo2", {}, "PyLO's ELO-CELO2 weights", licence=_PYLO_LICENCE
    ),
    "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP": Registered(
        "velo",
        "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP",
        {},
        "Google's VeLO as PyLO has it (arXiv 2211.09760)",
        horizon=150_000,
        licence=_PYLO_LICENCE,
    ),
}


DEMO = Registered(
    "small_fc", "demo", note="built in, made by hand, for trying things out", licence="apache-2.0"
)


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
        source: where they came from, "repository@commit" or a path, for a saved folder what its
        card says; "" for a mapping. horizon: as in `Registered`.
        licence: as in `Registered`.
    """

    name: str
    architecture: str
    tensors: Mapping[str, Tensor]
    decays: Mapping[str, tuple[float, ...]]
    digest: str
    source: str = ""
    horizon: int | None = None
    licence: str = UNKNOWN

    def describe(self) -> str:
        """One line for logs: name and the start of the hash."""
        return f"weights {self.name} (sha256 {self.digest[:12]})"


@dataclass(frozen=True)
class _Found:
    """What a name led to, not yet compared with an architecture; `configs` are PyLO's config.json,
    one per part.
    """

    name: str
    tensors: Mapping[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)
    entry: Registered | None = None
    source: str = ""
    configs: tuple[tuple[Path, dict[str, Any]], ...] = ()


def load_weights(
    weights: WeightsLike | MetaNetwork,
    architecture: Architecture | None = None,
    *,
    local_only: bool = False,
) -> MetaNetwork:
    """The learned weights named by `weights`, checked against `architecture`.

    Args:
        weights: "demo", a registered name, `org/name[@revision]` on the Hub, a folder, a
            .safetensors file (several of these, joined by "+", hold one part each), or a mapping.
        architecture: None: as the registry or the card in the file says, else the one whose tensors
            these are.
        local_only: for a Hub repository, look into the local cache and nowhere else.

    Raises:
        WeightsError: they cannot be had, a tensor is missing, extra or misshapen, a setting in
            config.json is not computed here, or the tensors are not those that the card in the file
            was written for.
    """
    if isinstance(weights, MetaNetwork):
        if architecture is not None and weights.architecture != architecture.name:
            raise WeightsError(
                f"weights {weights.name!r} are for {weights.architecture}, this optimizer needs "
                f"{architecture.name}"
            )
        return weights
    if isinstance(weights, Mapping):
        return _checked(
            _Found("a mapping", weights), architecture or _recognised("a mapping", weights)
        )
    name = os.fspath(weights)
    entry = DEMO if name == "demo" else registered_entry(name)
    if (
        entry is not None
        and entry is not DEMO
        and architecture is not None
        and entry.architecture != architecture.name
    ):
        raise WeightsError(
            f"weights {name!r} are for {entry.architecture}, this optimizer needs "
            f"{architecture.name}"
        )
    found = (
        _demo(architecture or SMALL_FC)
        if name == "demo"
        else _find(name, entry, architecture, local_only)
    )
    if architecture is None:
        named = entry.architecture if entry is not None else found.card.get("architecture")
        if named is not None and named not in ARCHITECTURES:
            raise WeightsError(
                f"weights {name!r} are for {named!r}, wanted one of {', '.join(ARCHITECTURES)}"
            )
        architecture = (
            ARCHITECTURES[named] if named is not None else _recognised(name, found.tensors)
        )
    return _checked(found, architecture)


def registered_entry(name: str) -> Registered | None:
    """The entry of a name, else None; "name@revision" is that of `name` at another revision, whose
    sha256 is not known.
    """
    base, _, revision = name.partition("@")
    entry = _REGISTRY.get(name)
    if (
        entry is None
        and revision
        and "+" not in name
        and base in _REGISTRY
        and "@" not in _REGISTRY[base].source
    ):
        entry = replace(_REGISTRY[base], revision=revision, sha256="")
    return entry


def _recognised(name: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """The architecture that has just these tensors."""
    fits = [
        a
        for a in ARCHITECTURES.values()
        if set(a.shapes) <= set(tensors) <= {*a.shapes, *a.ignored}
    ]
    if len(fits) != 1:
        these = " and ".join(a.name for a in fits) if fits else "none"
        raise WeightsError(
            f"weights {name!r}: of {', '.join(ARCHITECTURES)} the tensors fit {these}; name the "
            "architecture"
        )
    return fits[0]


def _demo_file(architecture: Architecture) -> Traversable:
    return resources.files("pylo_dist") / "data" / f"demo_{architecture.name}.safetensors"


def _demo(architecture: Architecture) -> _Found:
    demo = _demo_file(architecture)
    if not demo.is_file():
        raise WeightsError(
            f"there are no demo weights for {architecture.name}; name a folder, a file or a Hub "
            "repository"
        )
    with resources.as_file(demo) as path:
        return _Found("demo", *read_file(path), DEMO, "built into pylo_dist")


def _find(
    name: str, entry: Registered | None, architecture: Architecture | None, local_only: bool
) -> _Found:
    """Read all parts of a source."""
    source = entry.source if entry is not None else name
    parts = [source] if Path(source).exists() else source.split("+")
    wanted = entry.sha256.split("+") if entry is not None and entry.sha256 else [""] * len(parts)
    tensors: dict[str, Tensor] = {}
    card: dict[str, Any] = {}
    sources, configs = [], []
    for part, sha256 in zip(parts, wanted, strict=True):
        revision = entry.revision if entry is not None else ""
        path, config, origin = _locate(name, part, revision, architecture, local_only)
        if sha256 and hub.sha256_of(path) != sha256:
            raise WeightsError(
                f"weights {name!r}: {path} has sha256 {hub.sha256_of(path)}, registered is "
                f"{sha256}; it is another file or another revision of it: name the revision you "
                "trust, or register it under a name of its own"
            )
        part_tensors, part_card = read_file(path)
        doubled = sorted(set(tensors) & set(part_tensors))
        if doubled:
            raise WeightsError(
                f"weights {name!r}: {doubled[0]!r} is in two of the parts {' + '.join(parts)}; "
                "name each part once"
            )
        tensors.update(part_tensors)
        card.update(part_card)
        sources.append(origin or str(part_card.get("source") or Path(part).absolute()))
        if config is not None:
            configs.append((config, _read_config(config)))
    return _Found(name, tensors, card, entry, "+".join(sources), tuple(configs))


def _locate(
    name: str, source: str, revision: str, architecture: Architecture | None, local_only: bool
) -> tuple[Path, Path | None, str]:
    """The .safetensors file of a file, a folder or a Hub repository, the config.json beside it, and
    "repository@commit".
    """
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
            raise WeightsError(
                f"folder {source}: wanted exactly one .safetensors file, found {why}"
            )
        config = path / hub.CONFIG_FILE
        return found[0], config if config.is_file() else None, ""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"file {source}: only .safetensors files are read; convert it with "
                "safetensors.torch.save_file"
            )
        return path, None, ""
    repository, _, named = source.partition("@")
    # not any suffix: "org/name-1.5@v2.0" has two dots
    is_file_name = path.suffix in (
        ".safetensors",
        *PICKLED,
    )
    if is_file_name or repository.count("/") != 1 or source.startswith((".", "/", "~")):
        known = ", ".join(["demo", *_REGISTRY])
        raise WeightsError(
            f"weights {name!r}: no such file or folder, nor a registered name ({known})"
        )
    try:
        files = hub.download(repository, named or revision or None, local_only=local_only)
    except hub.HubError as error:
        has_demo = architecture is None or _demo_file(architecture).is_file()
        demo = '; or pass weights="demo" for the small hand-made ones' if has_demo else ""
        raise WeightsError(
            f"weights {name!r} could not be had from the Hub ({error}). Ways out: connect and try "
            f"again; on a machine with a network run `python -m pylo_dist weights fetch {name} "
            f"--to FOLDER` or `hf download {repository}` and pass that folder; pass a .safetensors "
            f"file or a mapping{demo}"
        ) from error
    return files.weights, files.config, f"{repository}@{files.commit}"


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is the wanted one; letters met for the first time get their size in `sizes`
    (modified in place).
    """
    if len(shape) != len(wanted):
        return False
    for got, want in zip(shape, wanted, strict=True):
        if isinstance(want, str):
            factor = int(want[:-1] or 1)
            want = factor * sizes.setdefault(want[-1], got // factor)
        if got != want:
            return False
    return True


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and our card (empty when the file has none)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            metadata = file.metadata() or {}
        card = json.loads(metadata.get(CARD_KEY, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("decays", {}), dict):
        raise WeightsError(
            f"{path}: the card {card!r} is not what was wanted, {{'architecture': ..., 'decays': "
            "{...}}"
        )
    return tensors, card


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is not readable JSON: {error}; mend it, or remove it for PyLO's defaults"
        ) from error
    return config if isinstance(config, dict) else {}


def _checked(found: _Found, architecture: Architecture) -> MetaNetwork:
    name, tensors, card = found.name, found.tensors, found.card
    if card.get("architecture", architecture.name) != architecture.name:
        raise WeightsError(
            f"weights {name!r} are for {card['architecture']}, this optimizer needs "
            f"{architecture.name}"
        )
    for path, config in found.configs:
        for key, wanted in architecture.config.items():
            if config.get(key, wanted) != wanted:
                raise WeightsError(
                    f"weights {name!r}: {path} says {key} = {config[key]!r}, {architecture.name} "
                    f"here computes {wanted!r} only; use PyLO for these weights"
                )
    missing = sorted(set(architecture.shapes) - set(tensors))
    extra = sorted(set(tensors) - set(architecture.shapes) - set(architecture.ignored))
    if missing or extra:
        raise WeightsError(
            f"weights {name!r} do not fit {architecture.name}: missing {missing or 'none'}, "
            f"unexpected {extra or 'none'}"
        )
    digest = hashlib.sha256()
    frozen: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for key in sorted(architecture.shapes):
        tensor = tensors[key]
        if not isinstance(tensor, Tensor):
            raise WeightsError(
                f"weights {name!r}: {key!r} is a {type(tensor).__name__}, wanted a tensor"
            )
        if (
            not _fits(tuple(tensor.shape), architecture.shapes[key], sizes)
            or not tensor.is_floating_point()
        ):
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise WeightsError(
                f"weights {name!r}: {key!r} is {tensor.dtype} {tuple(tensor.shape)}, wanted "
                "floating point "
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
            raise WeightsError(
                f"weights {name!r}: the card has {key!r} = {value!r}, wanted a list of numbers"
            )
        stored[key] = tuple(float(x) for x in value)
    unknown = sorted(set(stored) - set(architecture.decays))
    if unknown:
        raise WeightsError(
            f"weights {name!r}: the card names unknown decays {unknown}, wanted "
            f"{sorted(architecture.decays)}"
        )
    if card.get("digest", digest.hexdigest()) != digest.hexdigest():
        raise WeightsChangedError(
            f"weights {name!r}: the tensors have digest {digest.hexdigest()}, the card of the file "
            f"says {card['digest']}; they were changed after they were saved: fetch them again, or "
            "save them anew with pylo_dist.save_weights"
        )
    entry = found.entry or Registered(architecture.name, "")
    return MetaNetwork(
        name,
        architecture.name,
        frozen,
        {**architecture.decays, **entry.decays, **stored},
        digest.hexdigest(),
        source=found.source,
        horizon=card["horizon"] if isinstance(card.get("horizon"), int) else entry.horizon,
        licence=str(card.get("licence") or entry.licence),
    )
