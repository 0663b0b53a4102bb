"""The command line: `python -m pylo_dist doctor` and `... weights list | show | fetch | convert |
verify`.

Writes only the folder that `fetch` and `convert` are given, and imports what `--plugin` names.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from ._version import __version__
from .maths import compiled
from .optimizer import load_plugin
from .weights import (
    DEMO,
    MetaNetwork,
    Registered,
    WeightsChangedError,
    WeightsError,
    architecture_named,
    architectures,
    flax_kinds,
    load_flax,
    load_weights,
    registered_entry,
    registered_weights,
)
from .weights.hub import HubError
from .weights.publish import save_weights, stored_digest

DONE, OTHER, WRONG_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code: 0 done, 2 wrong input, 1 otherwise. Errors are one line
    on stderr.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(
        "--plugin",
        metavar="MODULE|FILE.py",
        help="your own optimizers: what calls pylo_dist.register_optimizer",
    )
    # first of all, since it brings in names that other arguments may have
    plugin, argv = own.parse_known_args(argv)
    try:
        if plugin.plugin is not None:
            load_plugin(plugin.plugin)
    except ValueError as error:
        return _wrong(error)
    parser = argparse.ArgumentParser(
        prog="python -m pylo_dist",
        description="Learned optimizers for sharded training.",
        parents=[own],
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    doctor = commands.add_parser(
        "doctor", help="versions, what was built, and which path each device takes"
    )
    doctor.add_argument(
        "--require",
        choices=("cpu", "cuda"),
        help="exit code 1 where there are no compiled kernels for it",
    )
    doctor.set_defaults(run=_doctor)
    _add_weights(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except WeightsError as error:
        code = _wrong(error, OTHER if isinstance(error, WeightsChangedError) else WRONG_INPUT)
    except OSError as error:  # a name too long for a file, a folder that may not be read
        code = _wrong(error)
    return code


def _wrong(error: Exception, code: int = WRONG_INPUT) -> int:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return code


def _add_weights(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    weights = commands.add_parser(
        "weights", help="learned weights: what there is, and how to have it without a network"
    )
    actions = weights.add_subparsers(metavar="ACTION", required=True)

    listed = actions.add_parser("list", help="all registered names")
    listed.set_defaults(run=_list)

    show = actions.add_parser("show", help="what belongs to a name; asks no network")
    show.add_argument(
        "name",
        metavar="NAME",
        help='a registered name, "demo", org/name[@revision], a folder or a file',
    )
    show.add_argument(
        "--architecture", choices=architectures(), help="for tensors that fit two of them"
    )
    show.set_defaults(run=_show)

    fetch = actions.add_parser("fetch", help="write a folder that loads without a network")
    fetch.add_argument("name", metavar="NAME", help="as for show")
    fetch.add_argument("--to", metavar="FOLDER", required=True)
    fetch.add_argument(
        "--architecture", choices=architectures(), help="for tensors that fit two of them"
    )
    fetch.add_argument("--overwrite", action="store_true", help="replace other weights in FOLDER")
    fetch.set_defaults(run=_fetch)

    convert = actions.add_parser(
        "convert",
        help="write such a folder from a file of flax: a theta.state, or a checkpoint of "
        "google/learned_optimization",
    )
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--architecture", choices=flax_kinds(), required=True)
    convert.add_argument("--to", metavar="FOLDER", required=True)
    convert.add_argument(
        "--horizon",
        type=int,
        metavar="STEPS",
        help="the longest run of the inner training (default: unknown)",
    )
    convert.add_argument(
        "--licence", metavar="TEXT", help='its identifier first, as in "mit" (default: unknown)'
    )
    convert.add_argument("--overwrite", action="store_true", help="replace other weights in FOLDER")
    convert.set_defaults(run=_convert)

    verify = actions.add_parser(
        "verify", help="compare a folder's weights with the digest that was written with them"
    )
    verify.add_argument("folder", metavar="FOLDER")
    verify.set_defaults(run=_verify)


def _doctor(arguments: argparse.Namespace) -> int:
    print(
        f"pylo_dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}"
    )
    own = Path(__file__).resolve().parent
    print(f"package: {own}")
    for other in _others(own):
        print(
            f"warning: a second pylo_dist is {_told(other)}; what ran here is {_told(own)}. A "
            "script started elsewhere, such as launch/gpt2.py, may import the other: python -m pip "
            "install the one you want, or start from another folder"
        )
    for i in range(torch.cuda.device_count()):
        print(
            f"cuda:{i}: {torch.cuda.get_device_name(i)}, "
            f"sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        )
    for line in compiled.paths():
        print(line)
    if arguments.require is not None and (reason := compiled.library(arguments.require)):
        print(f"error: --require {arguments.require}: plain PyTorch ({reason})", file=sys.stderr)
        return OTHER
    return DONE


def _others(own: Path) -> list[Path]:
    """Folders of further packages of this name that Python could have imported: of the search path,
    of an editable installation, or of the checkout that this command was started in.
    """
    specs = [PathFinder.find_spec("pylo_dist", [entry or "."]) for entry in sys.path]
    for finder in sys.meta_path:  # where setuptools puts those that are installed editable
        if finder is not PathFinder and hasattr(finder, "find_spec"):
            specs.append(finder.find_spec("pylo_dist", None))
    files = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    here = Path.cwd()
    files += [folder / "pylo_dist" / "__init__.py" for folder in (here, *here.parents)]
    found = dict.fromkeys(file.resolve().parent for file in files if file.is_file())
    return [folder for folder in found if folder != own]


def _told(package: Path) -> str:
    built = "with" if any(package.glob("_kernels_*")) else "without"
    kind = "a checkout" if (package.parent / "pyproject.toml").is_file() else "installed"
    return f"{package} ({kind}, {built} compiled passes)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _horizon(steps: int | None) -> str:
    return "unknown" if steps is None else f"{steps:,} steps"


def _list(arguments: argparse.Namespace) -> int:
    rows = [("NAME", "ARCHITECTURE", "HORIZON", "LICENCE", "NOTE")]
    for name, entry in {"demo": DEMO, **registered_weights()}.items():
        rows.append((name, entry.architecture, _horizon(entry.horizon), entry.licence, entry.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    return DONE


def _show(arguments: argparse.Namespace) -> int:
    name: str = arguments.name
    entry = DEMO if name == "demo" else registered_entry(name)
    about: MetaNetwork | Registered
    shapes: Mapping[str, Sequence[int | str]]
    try:
        given = arguments.architecture
        about = network = load_weights(
            name, None if given is None else architecture_named(given), local_only=True
        )
        digest, shapes = (
            network.digest,
            {key: tuple(tensor.shape) for key, tensor in network.tensors.items()},
        )
    except WeightsError as error:
        if entry is None or not isinstance(error.__cause__, HubError):
            raise
        about, digest, shapes = (
            entry,
            f"not known here: {_one_line(error)}",
            architecture_named(entry.architecture).shapes,
        )
    print(f"name: {name}")
    if entry is not None:
        print(f"note: {entry.note}")
        print(f"meta-trained on: {entry.trained_on}")
    print(f"source: {about.source}")
    print(f"architecture: {about.architecture}")
    print(f"horizon: {_horizon(about.horizon)}")
    print(f"licence: {about.licence}")
    implied = architecture_named(about.architecture).decays
    for key, values in {**implied, **about.decays}.items():
        print(f"{key}: {', '.join(map(repr, values))}")
    for key, value in {
        **architecture_named(about.architecture).constants,
        **about.constants,
    }.items():
        print(f"{key}: {value!r}")
    print(f"digest: {digest}")
    print(f"tensors: {len(shapes)}")
    for key, shape in sorted(shapes.items()):
        print(f"  {key} ({', '.join(map(str, shape))})")
    return DONE


def _fetch(arguments: argparse.Namespace) -> int:
    network = save_weights(
        arguments.to, arguments.name, arguments.architecture, overwrite=arguments.overwrite
    )
    print(
        f"{arguments.to}: {network.architecture} weights from {network.source}, digest "
        f"{network.digest}"
    )
    return DONE


def _convert(arguments: argparse.Namespace) -> int:
    network = save_weights(
        arguments.to,
        load_flax(arguments.file, arguments.architecture),
        horizon=arguments.horizon,
        licence=arguments.licence,
        overwrite=arguments.overwrite,
    )
    print(
        f"{arguments.to}: {arguments.architecture} weights from {network.source}, digest "
        f"{network.digest}"
    )
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    if not Path(arguments.folder).is_dir():
        raise WeightsError(
            f"{arguments.folder} is no folder; wanted one that `python -m pylo_dist weights fetch` "
            "wrote"
        )
    network = load_weights(arguments.folder)  # compares, and says what differs
    stored = stored_digest(arguments.folder)
    if stored is None:
        raise WeightsError(
            f"folder {arguments.folder} holds {network.architecture} weights, digest "
            f"{network.digest}, and none to compare it with: write it with `python -m pylo_dist "
            "weights fetch` or pylo_dist.save_weights"
        )
    what = "weights" if stored == network.digest else "tensors"
    print(f"{arguments.folder}: {network.architecture} {what}, digest {stored} as written")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
