"""Write learned weights with all that belongs to them: a folder that `load_weights` reads back
bit-equal, or a Hub repository.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from .._version import __version__
from . import hub
from .load import CARD_KEY, MetaNetwork, WeightsLike, is_float32, load_weights, read_file
from .registry import UNKNOWN, WeightsError, architecture_named, example_of

CARD_FILE = "README.md"


def save_weights(
    folder: str | os.PathLike[str],
    weights: WeightsLike | MetaNetwork,
    architecture: str | None = None,
    *,
    decays: Mapping[str, Sequence[float]] | None = None,
    horizon: int | None = None,
    licence: str | None = None,
    description: str = "",
    overwrite: bool = False,
) -> MetaNetwork:
    """Write `weights` to `folder`: model.safetensors (float32) and a model card, README.md. Call it
    on one rank.

    The file's metadata say architecture, decays, digest, source, horizon and licence, so
    `weights=folder` needs nothing else, and gives the tensors bit for bit, under the same digest.
    Several parts (VeLO's) become one file.

    Args:
        weights: all that `weights=` of an optimizer takes, or the `weights` of an optimizer.
        architecture: the name of a registered one, such as "velo"; needed for tensors that fit two
            of them (small_fc and elo).
        decays: e.g. {"momentum_decays": (0.1, 0.2, 0.3)}; instead of those that `weights` come
            with, name by name.
        horizon: the longest run of the inner training, in steps; None: as `weights` say.
        licence: its identifier first, as in "apache-2.0"; None: as `weights` say.
        description: for the model card.
        overwrite: replace other weights in `folder`.

    Returns:
        The weights as read back from `folder`.

    Raises:
        WeightsError: `weights` cannot be had or do not fit, their architecture is not registered,
            or `folder` holds other weights.
    """
    network = _completed(weights, architecture, decays, horizon, licence)
    target = Path(folder)
    file = target / hub.WEIGHTS_FILE
    if target.exists() and not target.is_dir():
        raise WeightsError(f"{target} is a file, wanted a folder to write {file.name} to")
    others = sorted(path.name for path in target.glob("*.safetensors") if path != file)
    if others:
        raise WeightsError(
            f"folder {target} holds {', '.join(others)}, a weights folder holds one such file; "
            "name a new folder"
        )
    if file.exists() and not overwrite and _digest_of(target, network) != network.digest:
        raise WeightsError(
            f"folder {target} holds other weights; name a new folder, or overwrite them "
            "(overwrite=True)"
        )
    card = {
        "architecture": network.architecture,
        "decays": {name: list(values) for name, values in network.decays.items()},
        **({"constants": dict(network.constants)} if network.constants else {}),
        "digest": network.digest,
        "name": network.name,
        "source": network.source,
        "horizon": network.horizon,
        "licence": network.licence,
        "pylo_dist": __version__,
    }
    # the folder appears whole, or what it holds is as before: also of a process that is killed
    scratch = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        written = scratch / file.name
        save_file(dict(network.tensors), written, {"format": "pt", CARD_KEY: json.dumps(card)})
        (scratch / CARD_FILE).write_text(_model_card(network, description), encoding="utf-8")
        if target.exists():
            for name in (file.name, CARD_FILE):
                (scratch / name).replace(target / name)
        else:
            scratch.rename(target)
    except OSError as error:
        raise WeightsError(f"folder {target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_weights(target, architecture_named(network.architecture))


def push_to_hub(
    repo_id: str,
    weights: WeightsLike | MetaNetwork,
    architecture: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    decays: Mapping[str, Sequence[float]] | None = None,
    horizon: int | None = None,
    licence: str | None = None,
    description: str = "",
) -> str:
    """Commit `weights` with their model card to the Hub repository `repo_id`, made when there is
    none. Call it on one rank.

    Args:
        repo_id: "org/name".
        private: for a repository that is made; None: as the organisation's settings say.
        revision: an existing branch; None: the default branch.
        token: None: HF_TOKEN, or the one that `hf auth login` stored.
        commit_message: None: one that names the digest.

    The other arguments are those of `save_weights`.

    Returns:
        "org/name@commit", which `weights=` takes.

    Raises:
        WeightsError: `weights` cannot be had or do not fit, or the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        network = save_weights(
            folder,
            weights,
            architecture,
            decays=decays,
            horizon=horizon,
            licence=licence,
            description=description,
        )
        message = commit_message or f"{network.architecture} weights {network.digest[:12]}"
        try:
            commit = hub.upload(
                repo_id,
                Path(folder),
                message=message,
                private=private,
                revision=revision,
                token=token,
            )
        except hub.HubError as error:
            raise WeightsError(
                f"weights could not be pushed to {repo_id!r} ({error}). Ways out: log in with a "
                "token that may write there (`hf auth login`, HF_TOKEN or token=...); or "
                "save_weights to a folder and upload that"
            ) from error
    return f"{repo_id}@{commit}"


def _completed(
    weights: WeightsLike | MetaNetwork,
    architecture: str | None,
    decays: Mapping[str, Sequence[float]] | None,
    horizon: int | None,
    licence: str | None,
) -> MetaNetwork:
    """`weights`, loaded, with what the arguments say about them."""
    network = load_weights(
        weights, None if architecture is None else architecture_named(architecture)
    )
    known = architecture_named(network.architecture).decays
    if not isinstance(decays, (Mapping, type(None))):
        raise WeightsError(f"decays is a {type(decays).__name__}; wanted a mapping of numbers")
    for name, values in (decays or {}).items():
        if (
            name not in known
            or not isinstance(values, Sequence)
            or len(values) != len(known[name])
            or not all(map(is_float32, values))
        ):
            wanted = (
                ", ".join(
                    f"{key} ({len(numbers)} finite numbers)" for key, numbers in known.items()
                )
                or "no decays"
            )
            raise WeightsError(
                f"decays {name!r} = {values!r} do not belong to {network.architecture}: wanted "
                f"{wanted}"
            )
    if horizon is not None and not (type(horizon) is int and horizon >= 1):
        raise WeightsError(f"horizon={horizon!r}: wanted a number of steps, 1 or more")
    return replace(
        network,
        decays={
            **network.decays,
            **{name: tuple(map(float, values)) for name, values in (decays or {}).items()},
        },
        horizon=network.horizon if horizon is None else horizon,
        licence=network.licence if licence is None else licence,
    )


def stored_digest(folder: str | os.PathLike[str]) -> str | None:
    """The digest that `save_weights` wrote into the weights file of `folder`; None where it did not
    write it.
    """
    found = sorted(Path(folder).glob("*.safetensors"))
    return _digest_in(found[0]) if found else None


def _digest_of(folder: Path, like: MetaNetwork) -> str | None:
    """The digest of the weights that `folder` holds, by what they are and not by what the file
    says; None for what are no weights of that architecture.
    """
    try:
        return load_weights(folder, architecture_named(like.architecture)).digest
    except WeightsError:
        return None


def _digest_in(file: Path) -> str | None:
    digest = read_file(file)[1].get("digest")
    return digest if isinstance(digest, str) else None


def _model_card(network: MetaNetwork, description: str) -> str:
    """README.md for people and, in its first lines, for the Hub."""
    licence = network.licence.split()[0].lower() if network.licence.strip() else UNKNOWN
    horizon = f"{network.horizon:,} steps" if network.horizon is not None else UNKNOWN
    decays = [
        f"| {name} | {', '.join(map(repr, values))} |" for name, values in network.decays.items()
    ]
    tensors = [
        f"| `{name}` | {tuple(tensor.shape)} |" for name, tensor in sorted(network.tensors.items())
    ]
    example = example_of(network.architecture)
    return "\n".join(
        [
            "---",
            f"license: {licence}",
            "library_name: pylo_dist",
            "tags:",
            "- learned-optimizer",
            "- pylo_dist",
            "---",
            "",
            f"# Weights of a learned optimizer: {network.architecture}",
            "",
            *([description.strip(), ""] if description.strip() else []),
            *(["```python", example, "```", ""] if example else []),
            "| | |",
            "|---|---|",
            f"| architecture | {network.architecture} |",
            f"| from | {network.source or network.name} |",
            f"| licence | {network.licence} |",
            f"| meta-training horizon | {horizon} |",
            *decays,
            *(f"| {name} | {value!r} |" for name, value in network.constants.items()),
            f"| digest | `{network.digest}` |",
            "",
            "The digest is a sha256 over the architecture, the decays, constants that are not the "
            "architecture's own, and the names, shapes and float32 values of the tensors;",
            "loading compares it with the one in the metadata of `model.safetensors`, and `python "
            "-m pylo_dist weights verify FOLDER` prints it.",
            "",
            "| tensor | shape |",
            "|---|---|",
            *tensors,
            "",
        ]
    )
