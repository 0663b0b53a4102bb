"""Learned weights from a mapping, a file, a folder, the Hub or the built-in demo, checked.

Reads safetensors and flax's theta.state; nothing is unpickled, nothing is fetched at import, and
nothing changes after construction.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import flax_state, hub
from .client import printable
from .hub import PICKLED
from .registry import (
    DEMO,
    UNKNOWN,
    Architecture,
    Registered,
    WeightsError,
    architecture_named,
    architectures,
    flax_kinds,
    known_architectures,
    registered_entry,
    registered_weights,
)
from .texts import parse_json, read_json

if TYPE_CHECKING:
    from importlib.abc import Traversable  # not there in Python 3.14

WeightsLike = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]

RANDOM = "random numbers"  # how the source of weights begins that nothing was trained for
CARD_KEY = "pylo_dist"  # safetensors metadata entry of ours: a JSON card


class WeightsChangedError(WeightsError):
    """The tensors of a file are not those that its own card was written for."""


@dataclass(frozen=True)
class MetaNetwork:
    """Frozen learned weights.

    Attributes:
        name: as the user named them.
        tensors: float32 CPU tensors by name.
        decays: decays stored or registered with them.
        tensors_digest: sha256 over names, shapes and values of the tensors, hex.
        source: where they came from, "repository@commit" or a path, for a saved folder what its
            card says; "" for a mapping.
        horizon, licence: as in `Registered`.
        constants: as in `Architecture`, those of which these weights have another value.
    """

    name: str
    architecture: str
    tensors: Mapping[str, Tensor]
    decays: Mapping[str, tuple[float, ...]]
    tensors_digest: str
    source: str = ""
    horizon: int | None = None
    licence: str = UNKNOWN
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256, hex, over what a rule computes with: architecture, tensors, decays and other
        constants.
        """
        decays = {name: [x.hex() for x in values] for name, values in self.decays.items()}
        parts: list[Any] = [self.architecture, self.tensors_digest, decays]
        if self.constants:
            parts.append({name: value.hex() for name, value in self.constants.items()})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def is_random(self) -> bool:
        """Whether they are `random_weights`, or a saved copy of such."""
        return self.source.startswith(RANDOM)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a pickle of an earlier version has the digest of the tensors as its only one
        own = {"tensors_digest" if key == "digest" else key: x for key, x in state.items()}
        self.__dict__.update({"constants": {}, **own})

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
            .safetensors file (several of these, joined by "+", hold one part each), flax's
            theta.state, or a mapping. Of a folder or a repository its safetensors are read, and
            its theta.state where there are none.
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
        for key in weights:
            if not isinstance(key, str):
                raise WeightsError(
                    f"weights is a mapping with a {type(key).__name__} as a key; wanted names of "
                    "tensors"
                )
        return _checked(
            _Found("a mapping", weights), architecture or _recognised("a mapping", weights)
        )
    if not isinstance(weights, (str, os.PathLike)):
        raise WeightsError(
            f"weights is a {type(weights).__name__}; wanted a name, a path, or a mapping of tensors"
        )
    name = os.fspath(weights)
    if not isinstance(name, str) or not name or "\0" in name:
        raise WeightsError(f"weights={printable(repr(name), 80)}: wanted a name or a path")
    try:
        Path(name).exists()
    except OSError as error:  # a name that is too long for a file
        said = f"{error.strerror}; wanted a name or a path"
        raise WeightsError(f"weights={printable(repr(name), 80)}: {said}") from None
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
    try:
        found = (
            _demo(architecture or architecture_named(DEMO.architecture))
            if name == "demo"
            else _find(name, entry, architecture, local_only)
        )
    except OSError as error:  # a folder that may not be looked into
        raise WeightsError(f"weights {printable(repr(name), 80)}: {error}") from error
    if architecture is None:
        named = entry.architecture if entry is not None else found.card.get("architecture")
        if named is not None and not (isinstance(named, str) and named in architectures()):
            raise WeightsError(
                f"weights {name!r} are for {printable(named)!r}, wanted one of "
                f"{known_architectures()}"
            )
        architecture = (
            architecture_named(named) if named is not None else _recognised(name, found.tensors)
        )
    return _checked(found, architecture)


def _recognised(name: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """The architecture that has just these tensors, by their names, and by their shapes where
    several have the names.
    """
    fits = [
        a
        for a in architectures().values()
        if set(a.shapes) <= set(tensors) <= {*a.shapes, *a.ignored}
    ]
    if len(fits) > 1:
        fits = [a for a in fits if _has_shapes(tensors, a)]
    if len(fits) != 1:
        these = " and ".join(a.name for a in fits) if fits else "none"
        raise WeightsError(
            f"weights {name!r}: of {', '.join(architectures())} the tensors fit {these}; name the "
            "architecture"
        )
    return fits[0]


def load_flax(file: str | os.PathLike[str], kind: str) -> MetaNetwork:
    """The learned weights in a file that flax wrote, whatever its name.

    Args:
        kind: the name of an architecture, or of a variant such as "velo_s".

    Raises:
        WeightsError: it is no such file, or its arrays are not those of that kind.
    """
    kinds = flax_kinds()
    if kind not in kinds:
        raise WeightsError(f"architecture {kind!r}: wanted one of {', '.join(kinds)}")
    path = Path(file)
    if path.suffix in PICKLED or path.suffix == ".safetensors":
        why = (
            "is not converted: weights= takes it as it is"
            if path.suffix == ".safetensors"
            else "has the name of a pickled file; these are refused"
        )
        raise WeightsError(f"{printable(path)} {why}; wanted a file that flax wrote")
    architecture, constants = kinds[kind]
    tensors, card = _read_flax(str(file), path, architecture)
    card["constants"] = dict(constants)
    found = _Found(str(file), tensors, card, source=str(path.absolute()))
    return _checked(found, architecture)


def _read_flax(
    name: str, path: Path, architecture: Architecture | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file of flax, and a card that says their decays, and their architecture where
    none was given.
    """
    arrays = flax_state.read_arrays(path)
    fits = []
    for known, _ in flax_kinds().values():
        try:
            tensors, decays = flax_state.arranged(arrays, known)
        except WeightsError:
            continue
        if known not in fits and _has_shapes(tensors, known):
            fits.append(known)
    if architecture is None:
        if len(fits) != 1:
            these = " and ".join(a.name for a in fits) if fits else "none"
            raise WeightsError(
                f"weights {name!r}: of {', '.join(flax_kinds())} the arrays fit {these}; name the "
                "architecture"
            )
        tensors, decays = flax_state.arranged(arrays, fits[0])
        return tensors, {"architecture": fits[0].name, "decays": decays}
    try:
        tensors, decays = flax_state.arranged(arrays, architecture)
    except WeightsError as error:
        of = f"; these are arrays of {fits[0].name}" if len(fits) == 1 else ""
        raise WeightsError(f"weights {name!r}: {error}{of}") from None
    return tensors, {"decays": decays}


def _of_state_file(
    name: str, path: Path, entry: Registered | None, architecture: Architecture | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `_read_flax`, of a file that nobody has converted. Its constants must be registered: a
    number that is not in the file is not guessed.
    """
    if architecture is None and entry is not None:
        architecture = architectures().get(entry.architecture)
    tensors, card = _read_flax(name, path, architecture)
    architecture = architecture or architecture_named(card["architecture"])
    unsaid = sorted(set(architecture.constants) - set(entry.constants if entry else ()))
    if unsaid and _has_shapes(tensors, architecture):
        kinds = [kind for kind, (known, _) in flax_kinds().items() if known is architecture]
        raise WeightsError(
            f"weights {name!r}: {path} does not say the {', '.join(unsaid)} that "
            f"{architecture.name} computes with; convert it, saying what it is: `python -m "
            f"pylo_dist weights convert {path} --architecture {'|'.join(kinds)} --to FOLDER`"
        )
    return tensors, card


def _has_shapes(tensors: Mapping[str, Tensor], architecture: Architecture) -> bool:
    sizes: dict[str, int] = {}
    found = [(tensors.get(name), shape) for name, shape in architecture.shapes.items()]
    return all(isinstance(t, Tensor) and _fits(tuple(t.shape), shape, sizes) for t, shape in found)


def _whose(tensors: Mapping[str, Tensor]) -> str:
    """What to add to an error on tensors that do not fit: which architecture they are of, if
    any.
    """
    names = [
        a.name
        for a in architectures().values()
        if set(tensors) <= {*a.shapes, *a.ignored} and _has_shapes(tensors, a)
    ]
    return f"; these are tensors of {' or '.join(names)}" if names else ""


def _demo_file(architecture: Architecture) -> Traversable:
    return resources.files("pylo_dist") / "data" / f"demo_{architecture.name}.safetensors"


def _demo(architecture: Architecture) -> _Found:
    demo = _demo_file(architecture)
    if not demo.is_file():
        raise WeightsError(
            f"there are no demo weights for {architecture.name}; name a folder, a file or a Hub "
            f"repository, or try it out with pylo_dist.random_weights({architecture.name!r})"
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
        if path.suffix == flax_state.SUFFIX:
            part_tensors, part_card = _of_state_file(name, path, entry, architecture)
        else:
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
    """The file of weights of a file, a folder or a Hub repository, the config.json beside it, and
    "repository@commit".
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if not found and (path / flax_state.STATE_FILE).is_file():
            return path / flax_state.STATE_FILE, None, ""
        if len(found) != 1:
            pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED)
            why = (
                f"only pickled files ({', '.join(pickled)}), which are refused"
                if pickled and not found
                else f"{len(found)} of them"
            )
            raise WeightsError(
                f"weights {name!r}: folder {source}: wanted exactly one .safetensors file, "
                f"found {why}"
            )
        config = path / hub.CONFIG_FILE
        return found[0], config if config.is_file() else None, ""
    if path.is_file():
        if path.suffix not in (".safetensors", flax_state.SUFFIX):
            raise WeightsError(
                f"weights {name!r}: file {source}: only .safetensors files are read, and flax's "
                f"{flax_state.STATE_FILE}; convert it with safetensors.torch.save_file, or what "
                "flax wrote with `python -m pylo_dist weights convert`"
            )
        return path, None, ""
    repository, _, named = source.partition("@")
    # not any suffix: "org/name-1.5@v2.0" has two dots
    is_file_name = path.suffix in (".safetensors", flax_state.SUFFIX, *PICKLED)
    if is_file_name or repository.count("/") != 1 or source.startswith((".", "/", "~")):
        known = ", ".join(["demo", *registered_weights()])
        raise WeightsError(
            f"weights {name!r}: no such file or folder, nor a registered name ({known})"
        )
    try:
        files = hub.download(repository, named or revision or None, local_only=local_only)
    except hub.HubError as error:
        has_demo = architecture is None or _demo_file(architecture).is_file()
        demo = '; or pass weights="demo" for the small hand-made ones' if has_demo else ""
        # a folder of one part would lack the others
        by_client = "" if "+" in name else f" or `hf download {repository}`"
        raise WeightsError(
            f"weights {name!r} could not be had from the Hub ({error}). Ways out: connect and try "
            f"again; on a machine with a network run `python -m pylo_dist weights fetch {name} "
            f"--to FOLDER`{by_client} and pass that folder; pass a .safetensors file or a mapping"
            f"{demo}"
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
        if not path.is_file():
            raise ValueError("it is no regular file")
        path.open("rb").close()  # safetensors says of all that it cannot open that it is not there
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            metadata = file.metadata() or {}
        card = parse_json(metadata.get(CARD_KEY, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file: {printable(error)}"
        ) from error
    if not isinstance(card, dict) or not isinstance(card.get("decays", {}), dict):
        raise WeightsError(
            f"{path}: the card {printable(card)} is not what was wanted, {{'architecture': ..., "
            "'decays': {...}}"
        )
    return tensors, card


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is not readable JSON: {printable(error)}; mend it, or remove it for PyLO's "
            "defaults"
        ) from error
    return config if isinstance(config, dict) else {}


def _checked(found: _Found, architecture: Architecture) -> MetaNetwork:
    name, tensors, card = found.name, found.tensors, found.card
    if card.get("architecture", architecture.name) != architecture.name:
        raise WeightsError(
            f"weights {name!r} are for {printable(card['architecture'])}, this optimizer needs "
            f"{architecture.name}"
        )
    for path, config in found.configs:
        for key, wanted in architecture.config.items():
            if config.get(key, wanted) != wanted:
                raise WeightsError(
                    f"weights {name!r}: {path} says {key} = {printable(repr(config[key]))}, "
                    f"{architecture.name} "
                    f"here computes {wanted!r} only; use PyLO for these weights"
                )
    missing = sorted(set(architecture.shapes) - set(tensors))
    extra = sorted(set(tensors) - set(architecture.shapes) - set(architecture.ignored))
    if missing or extra:
        raise WeightsError(
            f"weights {name!r} do not fit {architecture.name}: missing {missing or 'none'}, "
            f"unexpected {printable(extra or 'none')}{_whose(tensors)}"
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
                f"{_whose(tensors)}"
            )
        frozen[key] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if tensor.numel() and not all(map(math.isfinite, frozen[key].aminmax())):
            if not bool(tensor.isfinite().all()):
                raise WeightsError(f"weights {name!r}: {key!r} holds inf or NaN")
            raise WeightsError(
                f"weights {name!r}: {key!r} holds numbers that float32, in which rules compute, "
                "does not reach"
            )
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(frozen[key].numpy().data)
    entry = found.entry or Registered(architecture.name, "")
    implied = {**architecture.decays, **entry.decays}
    decays = {key: tuple(map(float, values)) for key, values in implied.items()}
    decays |= _stored_decays(name, card, architecture)
    horizon = card.get("horizon")
    network = MetaNetwork(
        name,
        architecture.name,
        frozen,
        decays,
        digest.hexdigest(),
        constants=_other_constants(name, card, entry, architecture),
        source=printable(found.source),
        horizon=horizon if type(horizon) is int and horizon > 0 else entry.horizon,
        licence=printable(card.get("licence") or entry.licence),
    )
    _compare_digest(network, card)
    return network


def _stored_decays(
    name: str, card: dict[str, Any], architecture: Architecture
) -> dict[str, tuple[float, ...]]:
    """The decays in a card. Raises WeightsError for what are none."""
    stored = {}
    for key, value in card.get("decays", {}).items():
        if not isinstance(value, list) or not all(map(is_float32, value)):
            raise WeightsError(
                f"weights {name!r}: the card has {printable(key)!r} = {printable(value)}, wanted a "
                "list of numbers that float32 reaches"
            )
        stored[key] = tuple(float(x) for x in value)
    unknown = sorted(set(stored) - set(architecture.decays))
    if unknown:
        raise WeightsError(
            f"weights {name!r}: the card names unknown decays {printable(unknown)}, wanted "
            f"{sorted(architecture.decays)}"
        )
    return stored


def _other_constants(
    name: str, card: dict[str, Any], entry: Registered, architecture: Architecture
) -> dict[str, float]:
    """The constants of registration and card, where they are not the architecture's. Raises
    WeightsError for what are none.
    """
    stored = card.get("constants", {})
    if not isinstance(stored, dict) or not all(map(is_float32, stored.values())):
        raise WeightsError(
            f"weights {name!r}: the card has constants = {printable(stored)}, wanted numbers that "
            "float32 reaches, by name"
        )
    unknown = sorted({*stored, *entry.constants} - set(architecture.constants))
    if unknown:
        raise WeightsError(
            f"weights {name!r}: unknown constants {printable(unknown)}, {architecture.name} has "
            f"{sorted(architecture.constants)}"
        )
    said = {key: float(value) for key, value in {**entry.constants, **stored}.items()}
    return {key: value for key, value in said.items() if value != architecture.constants[key]}


def is_float32(value: object) -> bool:
    """Whether a value is a finite number that stays one in float32."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]


def _compare_digest(network: MetaNetwork, card: Mapping[str, Any]) -> None:
    """Raise WeightsChangedError where the digest in a card is another one, or missing in one that
    `save_weights` wrote. That of an earlier version, over the tensors alone, is taken with a
    warning.
    """
    said = card.get("digest")
    if said is None and "pylo_dist" in card:
        raise WeightsChangedError(
            f"weights {network.name!r}: the card in the file has no digest, and the version of "
            "pylo_dist it names writes one; it was changed after it was saved: fetch them again, "
            "or save them anew with pylo_dist.save_weights"
        )
    if said is None or said == network.digest:
        return
    if said == network.tensors_digest:
        warnings.warn(
            f"weights {network.name!r}: the digest in the file is that of an earlier version, over "
            "the tensors alone; whether its decays are as they were written cannot be told. "
            "pylo_dist.save_weights writes one that covers them",
            stacklevel=2,
        )
        return
    raise WeightsChangedError(
        f"weights {network.name!r}: tensors, architecture and decays have digest "
        f"{network.digest}, the card of the file says {printable(said)}; they were changed after "
        "they were saved: fetch them again, or save them anew with pylo_dist.save_weights"
    )
