"""Odd files, servers, arguments and command lines, one by one, for campaign.py: what is made of
each, and what came of it. Writes the folders it is given.

Nothing here does harm where a check is missing: a pickle names a class and calls none, a server
lies about names and sizes, but names no place on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # by the first optimizer otherwise, in the middle of a case: it makes a folder
from outcomes import BARE, GLOBAL, HALF, OUTSIDE, RIGHT, WRONG, Case, Outcome
from torch import Tensor, nn

import pylo_dist
import pylo_dist.checkpoint
import pylo_dist.weights

VERBOSE = False  # whether errors are printed with their tracebacks

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**70, -0.0, 0.5, 1e-300, 1e300),
    *(float("inf"), float("nan"), "", "x", "0", "1e400", "../x", "a/b", "\0", "é" * 40),
    *([], {}, [[]], [None], {"x": 1}, [1, 2, 3], [0.1, "x"], {"": None}),
)

# ---------------------------------------------------------------------------------- what is watched


class _Seen:
    """What a process was seen to do while it was watched."""

    def __init__(self) -> None:
        self.globals: set[str] = set()
        self.written: set[str] = set()


_WATCHED: list[_Seen] = []
_WRITES = {"os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHED:
        return
    seen = _WATCHED[-1]
    if event == "pickle.find_class":
        seen.globals.add(f"{arguments[0]}.{arguments[1]}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        seen.written.add(str(arguments[0]))
    elif event in _WRITES:
        seen.written.add(str(arguments[_WRITES[event]]))
    elif event in ("os.system", "os.exec"):
        seen.globals.add(event)


@contextlib.contextmanager
def watched() -> Iterator[_Seen]:
    seen = _Seen()
    if not hasattr(sys, "_pylo_dist_audited"):
        sys.addaudithook(_audit)
        sys._pylo_dist_audited = True  # type: ignore[attr-defined]
    _WATCHED.append(seen)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield seen
    finally:
        _WATCHED.remove(seen)


def place_of(error: BaseException) -> str:
    """The error's class, and the last function of ours on its way."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/pylo_dist/" in frame.filename or "/launch/" in frame.filename
    ]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "outside"
    return f"{type(error).__name__} in {where}"


def attempt(
    what: str,
    act: Callable[[], Any],
    *,
    inside: Sequence[Path],
    named: Callable[[str], bool],
    allowed: frozenset[str] = frozenset(),
    refusals: tuple[type[BaseException], ...] = (ValueError, TypeError),
) -> tuple[Any, BaseException | None, Outcome | None]:
    """What `act` gave, how it refused, and what was wrong with either.

    Args:
        inside: the folders in which it may write.
        named: whether a message says what was wrong.
        allowed: the globals that it may look up.
        refusals: errors that are meant for users.
    """
    result, error = None, None
    with watched() as seen:
        try:
            result = act()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as caught:  # torch has errors that are no Exception
            error = caught
            if VERBOSE:
                traceback.print_exception(caught)
    said = f"{what}: {type(error).__name__ if error else 'accepted'}: {str(error or '')[:200]}"
    homes = [folder.resolve() for folder in inside] + [Path("/dev")]
    outside = {
        path
        for path in seen.written
        if not path.isdigit()
        and not any(Path(path).resolve().is_relative_to(home) for home in homes)
    }
    if outside:
        return result, error, Outcome(OUTSIDE, f"{said}; wrote {sorted(outside)[:3]}", what)
    if beyond := seen.globals - allowed:
        names = sorted(beyond)[:3]
        kind = "forged" if any(name.startswith("fractions.") for name in beyond) else "damaged"
        return result, error, Outcome(GLOBAL, f"{said}; looked up {names}", kind)
    if error is not None:
        text = str(error)
        if not isinstance(error, refusals) or not named(text):
            return result, error, Outcome(BARE, said, place_of(error))
    return result, error, None


# -------------------------------------------------------------------------------------- bytes, JSON


def flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """A file as a disk or a person may leave it."""
    what = rng.choice(("flip", "flip", "flip", "truncate", "extend", "empty", "zeros", "repeat"))
    cut = rng.randrange(len(content) + 1)
    return what, {
        "flip": lambda: flip(rng, content),
        "truncate": lambda: content[:cut],
        "extend": lambda: content + rng.randbytes(rng.randint(1, 64)),
        "empty": lambda: b"",
        "zeros": lambda: content[:cut] + bytes(min(64, len(content) - cut)) + content[cut + 64 :],
        "repeat": lambda: content[:cut] + content,
    }[what]()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def edit(rng: random.Random, content: Any) -> str:
    """Change one value somewhere in a JSON-able object (modified in place); what was done."""
    places: list[tuple[Any, Any, str]] = []

    def walk(value: Any, path: str) -> None:
        items = (
            list(value.items())
            if isinstance(value, dict)
            else list(enumerate(value))
            if isinstance(value, list)
            else []
        )
        for key, entry in items:
            places.append((value, key, f"{path}/{key}"))
            walk(entry, f"{path}/{key}")

    walk(content, "")
    holder, key, path = rng.choice(places)
    action = rng.choice(("replace", "replace", "replace", "remove", "add", "rename", "text"))
    value = rng.choice((*ODD, nested(40)))
    if action == "remove":
        del holder[key]
    elif action == "text":
        holder[key] = str(holder[key])
    elif isinstance(holder, dict) and action == "add":
        holder[rng.choice(("x", "../x", "..", "", "a/b", "/x"))] = rng.choice((value, holder[key]))
    elif isinstance(holder, dict) and action == "rename":
        holder[rng.choice(("x", "../x", "..", "", "a/b", "/x"))] = holder.pop(key)
    else:
        holder[key] = value
    return f"{action} {path} {str(value)[:20] if action == 'replace' else ''}".strip()


def odd_text(rng: random.Random, text: bytes) -> tuple[str, bytes]:
    """JSON that is none, or just about."""
    return rng.choice(
        (
            ("deep", b"[" * 100_000 + b"]" * 100_000),
            ("no object", b"[1]"),
            ("number", b"1"),
            ("null", b"null"),
            ("infinity", text.replace(b"1", b"Infinity", 1)),
            ("nan", text.replace(b"1", b"NaN", 1)),
            ("digits", text.replace(b"1", b"1" * 5000, 1)),
            ("latin", text.replace(b'"', b'"\xe9', 1)),
            ("utf-16", text.decode("latin-1").encode("utf-16")),
            ("twice", text + text),
            ("bom", b"\xef\xbb\xbf" + text),
        )
    )


# -------------------------------------------------------------------------------------- checkpoints

MANIFEST, INDEX = "manifest.json", ".metadata"


def seal(folder: Path, content: dict[str, Any] | None = None) -> None:
    """Make the manifest true of the files that are there, and of itself."""
    if content is None:
        content = json.loads((folder / MANIFEST).read_text())
        for name, entry in content["files"].items():
            path = folder / name
            if not path.is_file():
                continue
            data = path.read_bytes()
            entry["bytes"] = len(data)
            if "sha256" in entry:
                entry["sha256"] = hashlib.sha256(data).hexdigest()
            else:
                from pylo_dist.checkpoint.files import DIGESTS  # which earlier commits have not

                digest = DIGESTS[content["digest"]]
                blocks = [data[i : i + 2**20] for i in range(0, len(data), 2**20)]
                entry["blocks"] = [digest(block).hexdigest() for block in blocks]
    content.pop("sha256", None)
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**content, "sha256": own}))


def spoil_checkpoint(rng: random.Random, folder: Path, other: Path) -> tuple[str, bool]:
    """Change a copy of a checkpoint; what was done, and whether other values are now its own."""
    files = sorted(path.name for path in folder.iterdir())
    name = rng.choice(files)
    path = folder / name
    kind = rng.choice(("bytes",) * 6 + ("manifest",) * 6 + ("place",) * 3 + ("swap", "forge"))
    sealing = rng.random() < 0.6
    if kind == "manifest":
        text = (folder / MANIFEST).read_bytes()
        if rng.random() < 0.25:
            what, text = odd_text(rng, text)
            (folder / MANIFEST).write_bytes(text)
            return f"manifest {what}", False
        content = json.loads(text)
        what = edit(rng, content)
        if sealing:
            seal(folder, content)
        else:
            (folder / MANIFEST).write_text(json.dumps(content))
        return f"manifest {what}{', sealed' if sealing else ''}", False
    if kind == "bytes":
        what, content = damage(rng, path.read_bytes())
        path.write_bytes(content)
    elif kind == "swap":
        if rng.random() < 0.5:
            second = rng.choice([entry for entry in files if entry != name])
            mine, theirs = path.read_bytes(), (folder / second).read_bytes()
            path.write_bytes(theirs)
            (folder / second).write_bytes(mine)
            what = f"swapped with {second}"
        else:
            shutil.copy(other / name, path)
            what = "of another checkpoint"
    elif kind == "forge":
        name, path = INDEX, folder / INDEX
        index = pickle.loads(path.read_bytes())
        index.planner_data = {**(index.planner_data or {}), "extra.forged": (Fraction,)}
        path.write_bytes(pickle.dumps(index))
        what, sealing = "names a class of nobody", True
    else:
        what = rng.choice(("gone", "a folder", "a FIFO", "a link", "a dead link", "one more"))
        if what == "one more":
            (folder / "__9_0.distcp").write_bytes(b"x")
        else:
            path.unlink()
            if what == "a folder":
                path.mkdir()
            elif what == "a FIFO":
                os.mkfifo(path)
            elif what == "a link":
                path.symlink_to(other / name)
            elif what == "a dead link":
                path.symlink_to(folder / "nowhere")
        return f"{name} is {what}", False
    if sealing and name != MANIFEST:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            seal(folder)
            return f"{name} {what}, sealed", True
    return f"{name} {what}", False


def _tensors(*owners: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            found += [tensor.detach().clone() for tensor in owner.state_dict().values()]
        else:
            saved = owner.state_dict()
            for state in saved["state"].values():
                found += [value.detach().clone() for value in state.values()]
            for group in saved["param_groups"]:
                found += [
                    torch.as_tensor(value).detach().clone()
                    for value in group.values()
                    if isinstance(value, (Tensor, float, int))
                ]
    return found


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
    for _ in range(2):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def checkpoints(prepared: Path) -> Case:
    """Folders of checkpoints, damaged or made to lie, with and without matching checksums."""
    checkpoint = pylo_dist.checkpoint
    wanted = None
    for seed in (1, 2):
        model, optimizer = _trained(seed)
        extra = {"numbers": {"loss": 1.5, "name": "x"}, "tensor": torch.full((3,), float(seed))}
        state = {"model": model, "optimizer": optimizer, "extra": extra}
        checkpoint.save(prepared / str(seed), state, meta={"step": seed, "1": [1, {"a": 1}]})
        wanted = wanted or _tensors(model, optimizer)
    model, optimizer = _trained(3)
    blank_model, blank = (
        {key: value.clone() for key, value in model.state_dict().items()},
        optimizer.state_dict(),
    )
    before = _tensors(model, optimizer)
    template = {"numbers": {"loss": 0.0, "name": ""}, "tensor": torch.zeros(3)}
    state = {"model": model, "optimizer": optimizer, "extra": template}
    with watched() as seen:
        checkpoint.load(prepared / "1", state)
    allowed = frozenset(seen.globals | {"torch.Size", "collections.OrderedDict"})

    def case(rng: random.Random, folder: Path) -> Outcome:
        model.load_state_dict(blank_model)
        optimizer.load_state_dict(blank)
        place = folder / "saved"
        shutil.copytree(prepared / "1", place)
        what, own_values = spoil_checkpoint(rng, place, prepared / "2")
        reads = (
            (lambda: checkpoint.verify(place), False),
            (lambda: checkpoint.load(place, state), True),
        )
        for read, loads in reads[rng.random() < 0.9 :]:
            _, error, fault = attempt(
                what,
                read,
                inside=[folder],
                named=lambda text: (
                    str(place) in text or bool(re.search(r"'[\w.]+'|\w+\.\w+", text))
                ),
                allowed=allowed,
                refusals=(checkpoint.CheckpointError, ValueError, TypeError),
            )
            after = _tensors(model, optimizer)
            if fault is None and error is not None and not _alike(before, after):
                fault = Outcome(HALF, f"{what}: {error}", place_of(error))
            if fault is None and loads and error is None and not own_values:
                fault = None if _alike(wanted, after) else Outcome(WRONG, what, "loaded")
            if fault is not None:
                return fault
            if error is not None:
                break
        return Outcome(RIGHT, what)

    return case


# ------------------------------------------------------------------------------------------ weights


def _network(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"H": 8, "2H": 16, "4H": 32, "P": 5}
    return {
        name: 0.1 * torch.randn([sizes.get(n, n) for n in shape], generator=generator)
        for name, shape in pylo_dist.weights.SMALL_FC.shapes.items()
    }


def _learned(network: Any) -> tuple[list[Tensor], Any]:
    tensors = [network.tensors[name] for name in sorted(network.tensors)]
    return tensors, {name: tuple(map(float, v)) for name, v in network.decays.items()}


def _unlike(what: str, network: Any, wanted: tuple[list[Tensor], Any]) -> Outcome | None:
    """The fault of weights that loaded without an error, and are not those that were written."""
    tensors, decays = _learned(network)
    if _alike(tensors, wanted[0]) and decays == wanted[1]:
        return None
    return Outcome(WRONG, what, "loaded")


def header_of(content: bytes) -> tuple[Any, bytes]:
    """The JSON of a safetensors file, and what follows it."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def spoil_safetensors(rng: random.Random, content: bytes) -> tuple[str, bytes, bool]:
    """What was done, the file, and whether it has other values of its own."""
    kind = rng.choice(
        ("bytes", "bytes", "header", "header", "metadata", "metadata", "text", "size")
    )
    if kind == "bytes":
        what, changed = damage(rng, content)
        return what, changed, False
    header, rest = header_of(content)
    if kind == "header":
        what = edit(rng, header)
        return f"header {what}", with_header(header, rest), "digest" in what or "metadata" in what
    if kind == "metadata":
        entries = header["__metadata__"]
        key = rng.choice(sorted(entries))
        entries[key] = rng.choice(
            (flip(rng, entries[key].encode()).decode("latin-1"), "", "x", "[]")
        )
        return f"metadata {key}={entries[key][:30]!r}", with_header(header, rest), "digest" in key
    if kind == "text":
        what, text = odd_text(rng, json.dumps(header).encode())
        return f"header {what}", len(text).to_bytes(8, "little") + text + rest, False
    size = rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(content) - 8, len(content)))
    return f"header of {size} bytes", size.to_bytes(8, "little") + content[8:], False


def weights(prepared: Path) -> Case:
    """Folders and files of weights."""
    architecture = pylo_dist.weights.SMALL_FC
    for seed in (1, 2):
        pylo_dist.save_weights(prepared / str(seed), _network(seed), "small_fc")
        torch.save(_network(seed), prepared / f"{seed}.pt")
    load = pylo_dist.weights.load_weights
    wanted = _learned(load(str(prepared / "1"), architecture))

    def case(rng: random.Random, folder: Path) -> Outcome:
        form = rng.choice(("folder", "folder", "folder", "file", "pickle", "config"))
        own_values = form == "pickle"
        if form == "pickle":
            place = folder / "w.pt"
            if rng.random() < 0.1:
                torch.save({**_network(1), "extra": Fraction}, place)
                what = "names a class of nobody"
            else:
                what, content = damage(rng, (prepared / "1.pt").read_bytes())
                place.write_bytes(content)
        else:
            place = folder / "w"
            shutil.copytree(prepared / "1", place)
            file = place / "model.safetensors"
            if form == "config":
                settings: dict[str, Any] = {"architecture": "small_fc", "decays": {"a": [1.0, 2.0]}}
                what = edit(rng, settings)
                text = json.dumps(settings).encode()
                if rng.random() < 0.3:
                    what, text = odd_text(rng, text)
                (place / "config.json").write_bytes(text)
                own_values = True
            elif rng.random() < 0.1:
                what = rng.choice(("gone", "a folder", "a FIFO", "a dead link"))
                file.unlink()
                if what == "a folder":
                    file.mkdir()
                elif what == "a FIFO":
                    os.mkfifo(file)
                elif what == "a dead link":
                    file.symlink_to(folder / "nowhere")
            else:
                what, content, own_values = spoil_safetensors(rng, file.read_bytes())
                file.write_bytes(content)
            if form == "file":
                place = file
        what = f"{form}: {what}"
        network, error, fault = attempt(
            what,
            lambda: load(str(place), architecture),
            inside=[folder],
            named=lambda text: str(place) in text,
            allowed=frozenset({"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}),
        )
        if fault is None and error is None and not own_values:
            fault = _unlike(what, network, wanted)
        return fault or Outcome(RIGHT, what)

    return case


# ---------------------------------------------------------------------------------------------- hub

_ID = "0123456789abcdef" * 4
TEXTS = ("", "x", "g" * 40, _ID[:39], _ID[:40], _ID, _ID[:40].upper(), f" {_ID[:40]} ", "a b", "é")
SIZES = ("-1", "0", "x", "1e9", "9" * 30, "7", "")
LIES: dict[str, tuple[str, ...]] = {
    "X_Repo_Commit": TEXTS,
    "ETag": TEXTS,
    "X_Linked_Etag": TEXTS,
    "X_Linked_Size": SIZES,
    "Content_Length": SIZES[3:6],
    "Location": ("", "/nowhere", "http://127.0.0.1:1/x", "x", "//", "http://localhost:99999/"),
}


def hub(prepared: Path) -> Case:
    """A server on loopback that lies, breaks off, or serves damaged files."""
    import support.hub_server as server

    cache = prepared / "cache"
    os.environ.pop("HF_HUB_OFFLINE", None)
    pylo_dist.save_weights(prepared / "w", _network(1), "small_fc")
    content = (prepared / "w" / "model.safetensors").read_bytes()
    lies: dict[str, Any] = {}

    class Liar(server._Handler):
        def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
            for name, value in lies.items():
                if name in headers:
                    headers[name] = value
            if "status" in lies and self.command == lies["command"]:
                status = lies["status"]
            self.close_connection = self.close_connection or "Content_Length" in lies
            with contextlib.suppress(OSError, UnicodeError):
                super()._send(status, content, **headers)

    server._Handler = Liar  # type: ignore[misc]
    serving = server.serving()
    served = serving.__enter__()
    os.environ.update(
        HF_ENDPOINT=served.endpoint,
        HF_HOME=str(cache),
        HF_HUB_CACHE=str(cache / "hub"),
        HF_HUB_ETAG_TIMEOUT="1",
        HF_HUB_DOWNLOAD_TIMEOUT="1",
    )
    wanted = _learned(
        pylo_dist.weights.load_weights(str(prepared / "w"), pylo_dist.weights.SMALL_FC)
    )

    def case(rng: random.Random, folder: Path) -> Outcome:
        repository = f"org/case{rng.getrandbits(60)}"
        file, own_values = content, False
        lies.clear()
        served.drops = served.spoils = False
        served.status.clear()
        what = rng.choice(("header",) * 6 + ("status", "drops", "spoils", "file", "file", "api"))
        if what == "header":
            for name in rng.sample(sorted(LIES), rng.choice((1, 1, 2))):
                lies[name] = rng.choice(LIES[name])
        elif what == "status":
            lies.update(
                status=rng.choice((204, 206, 302, 304, 400, 401, 403, 404, 418, 429, 500, 503)),
                command=rng.choice(("HEAD", "GET")),
            )
        elif what == "file":
            said, file, own_values = spoil_safetensors(rng, content)
            own_values = True
            what = f"file {said}"
        elif what == "api":
            served.status[repository] = rng.choice((401, 403, 404, 418, 500))
        else:
            setattr(served, what, True)
        served.commit(repository, {"model.safetensors": file})
        what = f"{what} {lies}"
        network, error, fault = attempt(
            what,
            lambda: pylo_dist.weights.load_weights(repository, pylo_dist.weights.SMALL_FC),
            inside=[cache, prepared.parent / "tmp"],
            named=lambda text: repository in text,
        )
        if fault is None and error is None and not own_values:
            fault = _unlike(what, network, wanted)
        return fault or Outcome(RIGHT, what)

    return case


# ---------------------------------------------------------------------------------------- arguments

ARGUMENTS: tuple[Any, ...] = (
    *ODD,
    *(1j, b"x", (), (1, 2), (0.1, 0.2, 0.3), 10**30, 10**400, object, range(3)),
    *(torch.tensor(0.5), torch.tensor([1.0, 2.0]), torch.tensor(1 + 2j), torch.zeros(0)),
    *(np.float64(0.5), np.array([1, 2]), "float32", torch.float16, torch.int8, np.inf, -1e300),
)
FACES = ("AdafacLO", "MuLO", "VeLO", "CELO2", "ELO", "ELO_CELO2")
ZERO = ("module", "stage", "process_group", "replicate_group", "bucket_cap_mb", "reduce_dtype")
ZERO += ("overlap", "master_weights", "check_replicas_every", "timeout")


def _offline(prepared: Path) -> None:
    """No name of weights asks a network; called before the Hub's client is imported."""
    os.environ.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    os.environ["HF_HOME"] = str(prepared / "cache")
    os.environ["HF_HUB_CACHE"] = str(prepared / "cache" / "hub")


def _arguments_of(face: str) -> list[str]:
    own = inspect.signature(getattr(pylo_dist, face).__init__).parameters
    keys = [key for key in own if key not in ("self", "params", "kwargs")]
    if face in ("MuLO", "ELO_CELO2"):  # which hand the rest on
        base = {"MuLO": "AdafacLO", "ELO_CELO2": "CELO2"}[face]
        keys += [key for key in _arguments_of(base) if key not in keys]
    return keys


def _settings(face: str, networks: dict[str, Any]) -> dict[str, Any]:
    own = {"MuLO": {"width_mults": {}}, "VeLO": {"num_steps": 10}}.get(face, {})
    return {"weights": networks[face], **own}


def _networks() -> dict[str, Any]:
    known = pylo_dist.weights
    generator = torch.Generator().manual_seed(0)
    sizes = {"H": 8, "2H": 16, "4H": 32, "P": 3}

    def made(architecture: Any) -> dict[str, Tensor]:
        return {
            name: 0.05 * torch.randn([sizes.get(n, n) for n in shape], generator=generator)
            for name, shape in architecture.shapes.items()
        }

    shapes = {"VeLO": known.VELO, "CELO2": known.CELO2, "ELO_CELO2": known.CELO2}
    return {face: made(shapes.get(face, known.SMALL_FC)) for face in FACES}


def _odd_params(rng: random.Random, model: nn.Module) -> tuple[str, Any]:
    weight = model[0].weight
    return rng.choice(
        (
            ("nothing", []),
            ("None", None),
            ("text", "x"),
            ("numbers", [1]),
            ("one tensor", weight),
            ("twice", [weight, weight]),
            ("a generator", (p for p in model.parameters())),
            ("groups", [{"params": [weight]}, {"params": []}]),
            ("no params", [{"lr": 1.0}]),
            ("params None", [{"params": None}]),
            ("integers", [nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)]),
            ("complex", [nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
            ("no leaf", [weight * 2]),
            ("named and not", [("a", weight), model[1].weight]),
            ("odd group", [{"params": [weight], "lr": rng.choice(ARGUMENTS)}]),
        )
    )


def _built_and_stepped(
    what: str, build: Callable[[nn.Module], Any], keys: Sequence[str], folder: Path
) -> Outcome:
    """An optimizer is built, or refused by name; then a step is taken, or refused by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    def named(text: str) -> bool:
        return any(key in text for key in keys)

    inside = [folder, folder.parent / "prepared"]
    optimizer, error, fault = attempt(what, lambda: build(model), inside=inside, named=named)
    if fault is not None or error is not None:
        return fault or Outcome(RIGHT, what)
    before = [param.detach().clone() for param in model.parameters()]

    def step() -> None:
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step(loss=1.0)

    _, error, fault = attempt(
        f"{what}, in step",
        step,
        inside=inside,
        named=named,
        refusals=(ValueError, TypeError, pylo_dist.NonFiniteGradientError),
    )
    after = [param.detach() for param in model.parameters()]
    if error is not None and not _alike(before, after):
        return Outcome(HALF, f"{what}: {error}", place_of(error))
    if fault is None and not all(bool(torch.isfinite(param).all()) for param in after):
        return Outcome(WRONG, f"{what}: parameters that are no numbers", "not finite")
    return fault or Outcome(RIGHT, what)


def constructors(prepared: Path) -> Case:
    """Arguments of optimizers and of ZeroOptimizer."""
    _offline(prepared)
    networks = _networks()

    def case(rng: random.Random, folder: Path) -> Outcome:
        face, zero = rng.choice(FACES), rng.random() < 0.3
        settings = _settings(face, networks)
        choices = [*_arguments_of(face), *(ZERO if zero else ())]
        odd = {
            key: rng.choice(ARGUMENTS) for key in rng.sample(choices, rng.choice((1, 1, 1, 2, 3)))
        }
        keys = list(odd)
        params: tuple[str, Any] | None = None
        made = getattr(pylo_dist, face)

        def build(model: nn.Module) -> Any:
            given = model.parameters() if params is None else params[1]
            if zero:
                return pylo_dist.ZeroOptimizer(given, made, **{**settings, **odd})
            return made(given, **{**settings, **odd})

        if rng.random() < 0.1:
            odd, keys = {}, ["param", "tensor", "lr", "names"]
            torch.manual_seed(0)
            params = _odd_params(rng, nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
        told = {key: str(value)[:20] for key, value in odd.items()}
        what = f"{face}{' in ZeRO' if zero else ''} {told or params[0]}"  # type: ignore[index]
        return _built_and_stepped(what, build, keys, folder)

    return case


def json_parameters(prepared: Path) -> Case:
    """The "params" of an optimizer in a JSON, recipes, and DeepSpeed's other settings."""
    import options

    _offline(prepared)
    networks = _networks()
    try:
        import pylo_dist.deepspeed as ours
    except ImportError:
        ours = None
    known = (
        *("zero_optimization", "optimizer", "torch_autocast", "checkpoint", "tensor_parallel"),
        *("sequence_parallel_size", "zero_hpz_partition_size", "mics_shard_size", "ratio"),
        *(
            "offload_optimizer",
            "offload_param",
            "autotp_size",
            "device",
            "load_universal",
            "params",
        ),
    )

    def as_json(value: Any) -> Any:
        return json.loads(json.dumps(value))

    def parameters(rng: random.Random, folder: Path) -> Outcome:
        face = rng.choice(FACES)
        choices = [key for key in _arguments_of(face) if key != "weights"] + ["unknown"]
        odd = {key: as_json(rng.choice(ODD)) for key in rng.sample(choices, rng.choice((1, 1, 2)))}
        if rng.random() < 0.1:
            odd["weights"] = as_json(rng.choice(ODD))
        settings = {**_settings(face, networks), **odd}
        return _built_and_stepped(
            f"{face} {odd}",
            lambda model: getattr(pylo_dist, face)(model.parameters(), **settings),
            [*odd, "loss"],
            folder,
        )

    def config(rng: random.Random, folder: Path) -> Outcome:
        made: dict[str, Any] = {}
        for _ in range(rng.randint(1, 4)):
            inner = {rng.choice(known): as_json(rng.choice(ODD)) for _ in range(rng.randint(1, 2))}
            made[rng.choice(known)] = inner if rng.random() < 0.7 else as_json(rng.choice(ODD))
        what = f"refuse {made}"
        _, _, fault = attempt(
            what,
            lambda: ours.refuse(made, nn.Linear(1, 1)),
            inside=[folder],
            named=lambda text: any(key in text for key in known),
        )
        return fault or Outcome(RIGHT, what)

    def recipe(rng: random.Random, folder: Path) -> Outcome:
        flags: dict[str, Any] = {"steps": "3", "preset": "nano", "batch_size": "4"}
        for _ in range(rng.randint(1, 3)):
            flags[rng.choice(("steps", "lr", "batch_size", "seed", "x", "compile", "data"))] = (
                rng.choice(ODD)
            )
        text = json.dumps({"about": "a", "cost": "b", "flags": flags}).encode()
        what = f"recipe {flags}"
        if rng.random() < 0.3:
            what, text = odd_text(rng, text)
        path = folder / "recipe.yaml"
        path.write_bytes(text)
        _, _, fault = attempt(
            what,
            lambda: options.parse(["--recipe", str(path)]).plan(1),
            inside=[folder],
            named=lambda text: str(path) in text or "--" in text,
        )
        return fault or Outcome(RIGHT, what)

    sorts = [parameters] * 6 + [recipe] * 2 + ([config] * 3 if ours is not None else [])
    return lambda rng, folder: rng.choice(sorts)(rng, folder)


# ------------------------------------------------------------------------------------ command lines

WORDS = (
    *("", "0", "1", "-1", "3", "nan", "inf", "1e400", "1" * 400, "x", "none", "auto", "demo"),
    *("../x", "\0", "é", "a b", "--", "-", "1.5", "nano", "124m", "velo", "adamw", "celo2", "cpu"),
    *("zero2", "fsdp2", "tp", "float32", "true", "[]", "{}", "=", "/dev/null", "%s", "{0}"),
)


def command_lines(prepared: Path) -> Case:
    """Of launch/gpt2.py and of `python -m pylo_dist`."""
    import options

    from pylo_dist.__main__ import main

    source = Path(options.__file__).read_text()
    flags = sorted(set(re.findall(r'"(--[a-z][a-z-]+)"', source)))
    _offline(prepared)
    pylo_dist.save_weights(prepared / "w", _network(1), "small_fc")

    def launch(rng: random.Random, folder: Path) -> Outcome:
        words: list[str] = []
        for flag in rng.sample(flags, rng.randint(1, 5)):
            joined = rng.random() < 0.3
            value = rng.choice(WORDS)
            words += [f"{flag}={value}"] if joined else [flag, *([value] * (rng.random() < 0.8))]
        words += [rng.choice(WORDS)] * (rng.random() < 0.1)

        def read() -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                options.parse(words).plan(rng.choice((1, 2, 3, 8)))

        what = f"gpt2.py {words}"
        given = [flag[2:] for flag in flags if any(word.startswith(flag) for word in words)]
        _, _, fault = attempt(
            what,
            read,
            inside=[folder],
            named=lambda text: "--" in text or any(name in text for name in given),
        )
        return fault or Outcome(RIGHT, what)

    def package(rng: random.Random, folder: Path) -> Outcome:
        names = ("demo", str(prepared / "w"), str(prepared), "org/x", "org/x@y", "adafaclo", *WORDS)
        words = [rng.choice(("weights", "weights", "weights", "doctor", rng.choice(WORDS)))]
        words += [rng.choice(("show", "fetch", "verify", "list", rng.choice(WORDS)))]
        words += [rng.choice(names) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        if rng.random() < 0.5:
            (folder / "there").mkdir()
            place = str(rng.choice((folder / "to", folder / "there", folder / "a" / "b")))
            place = rng.choice((place, place, place, "/dev/null"))
            words += ["--to", place]
        if rng.random() < 0.3:
            words += ["--architecture", rng.choice(("small_fc", "velo", "elo", "x", ""))]
        words += ["--overwrite"] * (rng.random() < 0.2)
        if rng.random() < 0.1:
            words += [rng.choice(("--require", "--plugin", "--to")), rng.choice(WORDS)]
        said = io.StringIO()

        def run() -> int:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    return main(words)
                except SystemExit as end:  # argparse's
                    return int(end.code or 0)

        before = os.getcwd()
        os.chdir(folder)
        try:
            what = f"python -m pylo_dist {words}"
            code, _, fault = attempt(
                what, run, inside=[folder, prepared], named=lambda _: False, refusals=()
            )
        finally:
            os.chdir(before)
        if fault is None and (code not in (0, 1, 2) or (code and "error: " not in said.getvalue())):
            fault = Outcome(BARE, f"{what}: {code}, {said.getvalue()[-200:]}", "no line on stderr")
        return fault or Outcome(RIGHT, what)

    return lambda rng, folder: (launch if rng.random() < 0.7 else package)(rng, folder)
