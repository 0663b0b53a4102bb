"""Checkpoint folders that somebody else may have written: nothing in them runs, what is odd is
refused by name before anything changes, and two writers never share one.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.optim import lr_scheduler as schedules

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.checkpoint import CheckpointError, archive, files, manifest
from pylo_dist.checkpoint import folder as checkpoint_folder
from pylo_dist.optimizer import sharded_state
from support.layouts import differing
from support.optimizers import small_fc
from support.permissions import permission_bits_hold
from support.pickles import Loud

SAVED = Path(__file__).parent / "saved" / "acc4d19"


def pair(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 4)
    optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights=small_fc())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def numbers(state: dict[str, Any]) -> dict[str, Any]:
    optimizer = state["optimizer"]
    return copy.deepcopy(
        {
            **dict(state["model"].named_parameters()),
            **{f"{i}.{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()},
        }
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "good"
    state = {**pair(), "run": {"name": "x", "seen": [1, 2.5, None]}}
    checkpoint.save(folder, state, meta={"step": 1})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder: Path, message: str) -> None:
    """Loading says so, and changes nothing."""
    state = pair(1)
    before = numbers(state)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder, {**state, "run": {"name": "", "seen": [0, 0.0, None]}})
    assert not differing(numbers(state), before)


def entry_of(path: Path) -> files.Entry:
    aside = path.with_suffix(".aside")
    with files.WrittenFile(aside.open("xb"), "sha256") as file:
        file.write(path.read_bytes())
    aside.unlink()
    return file.entry()


def seal(folder: Path, **more: Any) -> None:
    """Give a folder the manifest that fits what lies in it now."""
    (folder / "manifest.json").unlink(missing_ok=True)
    manifest.write(
        folder, {path.name: entry_of(path) for path in folder.iterdir()}, {"step": 1}, **more
    )


# ------------------------------------------------------------------------------------ nothing runs

LOOKED_UP = """
import sys, torch, pylo_dist
sys.path.insert(0, sys.argv[1])
import write
from pylo_dist import checkpoint
saved = sys.argv[2]
found = set()
model, optimizer = write.build("velo")
sys.addaudithook(lambda event, a: found.add(a[:2]) if event == "pickle.find_class" else None)
checkpoint.load(f"{saved}/velo/checkpoint", {"model": model, "optimizer": optimizer})
run = {"tuple": (1, "a"), "set": {1}, "counts": [{"x": torch.Size([2])}]}
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "run": run}
checkpoint.save(f"{sys.argv[3]}/new", state)
checkpoint.load(f"{sys.argv[3]}/new", state)
print(sorted(found))
"""


def test_no_global_is_looked_up_that_is_not_listed(tmp_path: Path) -> None:
    """Of folders of either format, with an optimizer, a scheduler and entries of other kinds; the
    audit hook sees every class and function that a pickle of the standard library asks for.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_UP, str(SAVED.parent), str(SAVED), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_index_that_names_anything_else_is_refused(copied: Path) -> None:
    (copied / ".metadata").write_bytes(pickle.dumps(Loud()))
    seal(copied)
    refused(copied, r"\.metadata .* it names .*was_read")
    assert not Loud.read


def test_the_torch_that_wrote_it_is_named_where_it_cannot_be_read(copied: Path) -> None:
    (copied / ".metadata").write_bytes(pickle.dumps(Loud()))
    seal(copied, torch="9.9.0")
    refused(
        copied, rf"no index needs \(torch 9.9.0 wrote it, this is {re.escape(torch.__version__)}"
    )


@pytest.mark.parametrize("fields", [5, 6, 7])
def test_tensor_properties_of_other_torch_versions(
    fields: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 2.14 torch pickles five of them, from 2.15 on six: each reads what the other wrote."""
    pickled = TensorProperties.__getstate__
    with monkeypatch.context() as other:
        other.setattr(
            TensorProperties,
            "__getstate__",
            lambda self: (*pickled(self), None, None)[:fields],
        )
        checkpoint.save(tmp_path / "other", pair())
    state = pair(1)
    checkpoint.load(tmp_path / "other", state)
    assert not differing(numbers(state), numbers(pair()))


def test_an_entry_that_names_anything_else_is_refused(copied: Path, tmp_path: Path) -> None:
    """On writing, with what to do, and on reading a folder that another program wrote."""
    with pytest.raises(CheckpointError, match=r"'run.name' holds .*add_safe_globals"):
        checkpoint.save(tmp_path / "new", {"run": {"name": Loud()}})
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    shutil.rmtree(copied)
    torch.distributed.checkpoint.save(
        {**{key: value.state_dict() for key, value in pair().items()}, "run": {"name": Loud()}},
        checkpoint_id=copied,
        no_dist=True,
    )
    seal(copied)
    with pytest.raises(CheckpointError, match=r"'run.name' names .*add_safe_globals"):
        checkpoint.load(copied, {"run": {"name": ""}})
    assert not Loud.read


def test_keys_that_are_no_texts(tmp_path: Path) -> None:
    state = {"run": {0: {"a": 1}, -2: torch.ones(2), True: "x", 2.5: torch.zeros(1), "3": 3}}
    checkpoint.save(tmp_path / "a", state)
    template = {"run": {0: {"a": 0}, -2: torch.zeros(2), True: "", 2.5: torch.ones(1), "3": 0}}
    loaded = checkpoint.load(tmp_path / "a", template)[0]["run"]
    assert loaded[0] == {"a": 1}
    assert (loaded[True], loaded["3"]) == ("x", 3)
    assert loaded[-2].tolist() == [1, 1]
    assert loaded[2.5].tolist() == [0]
    assert template["run"][-2].tolist() == [0, 0]


def test_what_the_user_allows_is_given_back(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([random.Random, Plain]):
        checkpoint.save(tmp_path / "a", {"run": {"own": Plain(3)}})
        entries, _ = checkpoint.load(tmp_path / "a", {"run": {"own": None}})
    assert entries["run"]["own"].n == 3


class Plain:
    def __init__(self, n: int) -> None:
        self.n = n


# ------------------------------------------------------------------------------- what is odd


def index_of(folder: Path) -> Metadata:
    found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


WEIGHT = MetadataIndex("model.weight", (0, 0))


def place(index: Metadata, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(index.storage_data[WEIGHT], name, value)


ODD_INDEXES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a file outside": (lambda i: place(i, relative_path="../good/__0_0.distcp"), "place of"),
    "a file that is not listed": (lambda i: place(i, relative_path="other"), "place of"),
    "the index itself as a number": (lambda i: place(i, relative_path=3), "place of"),
    "beyond the end": (lambda i: place(i, length=2**40), "place of"),
    "before the beginning": (lambda i: place(i, offset=-1), "place of"),
    "a filter": (lambda i: place(i, transform_descriptors=["x"]), "filters of"),
    "no place": (lambda i: i.storage_data.pop(WEIGHT), "place of a part"),
    "a text as a shape": (lambda i: setattr(entry(i), "size", "2"), "shape of"),
    "a larger shape": (
        lambda i: setattr(entry(i), "size", torch.Size((2**20, 2**20))),
        "number of elements",
    ),
    "a part that is larger than the file": (lambda i: enlarge(i), "place of a part"),
    "a part outside": (
        lambda i: setattr(entry(i).chunks[0], "sizes", torch.Size((5, 3))),
        "a part of",
    ),
    "no dtype": (lambda i: setattr(entry(i).properties, "dtype", None), "dtype of"),
    "no parts": (lambda i: setattr(entry(i), "chunks", None), "parts of"),
    "no table": (lambda i: setattr(i, "storage_data", None), "table of places"),
    "no path": (lambda i: i.planner_data.pop("model.weight"), "a path is"),
    "a list with a far end": (
        lambda i: i.planner_data.update({"run.name": ("run", 2**40)}),
        "path of 'run.name'",
    ),
    "a path through a leaf": (
        lambda i: i.planner_data.update({"run.name": ("model", "weight", "x")}),
        "path of",
    ),
    "two with one path": (
        lambda i: i.planner_data.update({"run.name": ("model", "weight")}),
        "path of",
    ),
    "an entry of nothing": (lambda i: i.state_dict_metadata.update({"run.name": 1}), "entry of"),
}


def entry(index: Metadata) -> Any:
    return index.state_dict_metadata["model.weight"]


def enlarge(index: Metadata) -> None:
    size = torch.Size((2**20, 2**20))
    entry(index).size = entry(index).chunks[0].sizes = size


def test_an_index_of_odd_shape_is_refused_by_name(copied: Path) -> None:
    whole = (copied / ".metadata").read_bytes()
    for what, (change, message) in ODD_INDEXES.items():
        index = index_of(copied)
        change(index)
        (copied / ".metadata").write_bytes(pickle.dumps(index))
        seal(copied)
        try:
            refused(copied, rf"\.metadata: .*{message}")
        except BaseException as error:
            raise AssertionError(what) from error
        (copied / ".metadata").write_bytes(whole)
    for data in (b"", whole[: len(whole) // 2], pickle.dumps([]), pickle.dumps({"a": 1})):
        (copied / ".metadata").write_bytes(data)
        seal(copied)
        refused(copied, r"\.metadata")


def test_entries_of_other_kinds_than_the_objects_have(tmp_path: Path) -> None:
    """Hyperparameters that are no groups, and state of no parameter."""
    state = pair()["optimizer"].state_dict()
    odd = {
        "groups": {**state, "param_groups": [{"params": 3}]},
        "no params": {**state, "param_groups": [{"lr": 1.0}]},
        "texts": {**state, "param_groups": "none"},
        "state": {**state, "state": {"first": {"m": torch.zeros(2)}}},
        "flat state": {**state, "state": torch.zeros(2)},
    }
    for name, content in odd.items():
        checkpoint.save(tmp_path / name, {"optimizer": content})
        own = pair(1)
        before = numbers(own)
        with pytest.raises(ValueError, match=r".") as raised:
            checkpoint.load(tmp_path / name, {"optimizer": own["optimizer"]})
        assert "Error" in type(raised.value).__name__, name
        assert not differing(numbers(own), before), name


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, [lambda step: 0.5**step]),
    "LambdaLR of an object": lambda o: schedules.LambdaLR(o, Halving()),
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o), schedules.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.1, 0.2),
    "WarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o),
}


class Halving:
    def __init__(self) -> None:
        self.by = 0.5

    def __call__(self, step: int) -> float:
        return self.by**step


def scheduled(name: str, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    return optimizer, scheduler


def test_schedulers_take_what_their_kind_saved_and_nothing_else(tmp_path: Path) -> None:
    for name in SCHEDULERS:
        optimizer, scheduler = scheduled(name, 3)
        checkpoint.save(tmp_path / name, {"optimizer": optimizer, "scheduler": scheduler})
    for name in SCHEDULERS:
        optimizer, scheduler = scheduled(name, 0)
        checkpoint.load(tmp_path / name, {"scheduler": scheduler, "optimizer": optimizer})
        first, same = scheduled(name, 3)
        assert scheduler.state_dict() == same.state_dict(), name
        for o, s in ((optimizer, scheduler), (first, same)):
            o.step()
            s.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert optimizer.param_groups[0]["lr"] == first.param_groups[0]["lr"], name
        own, before = scheduled(name, 0)[1], scheduled(name, 0)[1].state_dict()
        for other in SCHEDULERS.keys() - {name}:
            if {name, other} <= {"LambdaLR", "LambdaLR of an object"}:
                continue
            with pytest.raises(CheckpointError, match=r"'scheduler': '\w+"):
                checkpoint.load(tmp_path / other, {"scheduler": own})
            assert own.state_dict() == before, (name, other)


def test_odd_entries_of_a_scheduler_are_refused_by_key(tmp_path: Path) -> None:
    good = scheduled("StepLR", 3)[1].state_dict()
    odd: dict[str, tuple[dict[str, Any], str]] = {
        "a text": ({**good, "last_epoch": "x"}, "'last_epoch' is 'x'"),
        "none": ({**good, "gamma": None}, "'gamma' is None"),
        "infinite": ({**good, "step_size": float("inf")}, "'step_size' is inf"),
        "huge": ({**good, "step_size": 10**400}, "'step_size' is"),
        "a tensor": ({**good, "gamma": torch.ones(3)}, "'gamma' is tensor"),
        "two rates": ({**good, "base_lrs": [1.0, 2.0]}, "'base_lrs' has 2 entries"),
        "a text in a list": ({**good, "base_lrs": ["1"]}, "'base_lrs.0' is '1'"),
        "missing": ({k: v for k, v in good.items() if k != "gamma"}, "'gamma' is missing"),
        "the optimizer": ({**good, "optimizer": 1}, "'optimizer' is nothing that a StepLR"),
        "a method": ({**good, "step": 1}, "'step' is nothing that a StepLR saves"),
        "a private method": ({**good, "_initial_step": 1}, "'_initial_step' is nothing"),
    }
    run = pair(1)
    scheduler = schedules.StepLR(run["optimizer"], 2)
    for name, (state, message) in odd.items():
        saved = pair()  # whose groups have what a scheduler adds
        schedules.StepLR(saved["optimizer"], 2)
        checkpoint.save(tmp_path / name, {**saved, "scheduler": state})
        before, was = numbers(run), copy.deepcopy(scheduler.state_dict())
        with pytest.raises(CheckpointError, match=rf"{name}: 'scheduler': {message}"):
            checkpoint.load(tmp_path / name, {**run, "scheduler": scheduler})
        assert not differing(numbers(run), before), name
        assert scheduler.state_dict() == was, name


class Loader:
    """An object of a user, which takes what it gave and says nothing before."""

    def __init__(self, at: int) -> None:
        self.at, self.epoch = at, 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.epoch = int(state["epoch"])  # half of it changed where this raises


def test_an_object_that_refuses_its_state_leaves_nothing_changed(tmp_path: Path) -> None:
    saved = {**pair(), "first": Loader(3), "second": {"at": 4, "epoch": "x"}}
    checkpoint.save(tmp_path / "a", saved)
    run = {**pair(1), "first": Loader(1), "second": Loader(2)}
    before = numbers(run)
    with pytest.raises(CheckpointError, match=r"'second': Loader\.load_state_dict raised ValueErr"):
        checkpoint.load(tmp_path / "a", run)
    assert not differing(numbers(run), before)
    assert (run["first"].at, run["second"].at) == (1, 2)
    checkpoint.save(tmp_path / "b", {**saved, "second": Loader(4)})
    checkpoint.load(tmp_path / "b", run)
    assert not differing(numbers(run), numbers(saved))
    assert (run["first"].at, run["second"].at) == (3, 4)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest that was changed and has its own sha256 again."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("sha256")
    change(content)
    text = json.dumps(content, sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))


def test_a_manifest_of_odd_shape_is_refused(saved: Path, tmp_path: Path) -> None:
    def data(change: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        return lambda c: c["files"]["__0_0.distcp"].update(change)

    odd: dict[str, Callable[[dict[str, Any]], Any]] = {
        **{f"no {key}": (lambda c, key=key: c.pop(key)) for key in ("format", "meta", "files")},
        "no digest": lambda c: c.pop("digest"),
        "other digest": lambda c: c.update(digest="md5"),
        "no text as digest": lambda c: c.update(digest=["sha256"]),
        "format true": lambda c: c.update(format=True),
        "null": lambda c: c.update(files=None),
        "a list": lambda c: c.update(meta=[]),
        "a number": lambda c: c["files"].update({"__0_0.distcp": 1}),
        "no bytes": lambda c: c["files"]["__0_0.distcp"].pop("bytes"),
        "negative": data({"bytes": -1}),
        "a fraction": data({"bytes": 1.0}),
        "huge": data({"bytes": 10**400}),
        "infinite": lambda c: c["meta"].update(x=float("inf")),
        "no blocks": data({"blocks": []}),
        "no hex": data({"blocks": ["x" * 64]}),
        "a number for a block": data({"blocks": [1]}),
        "nothing listed": lambda c: c.update(files={}),
        "no index": lambda c: c["files"].pop(".metadata"),
        **{
            f"name {name!r}": (
                lambda c, name=name: c["files"].update({name: c["files"][".metadata"]})
            )
            for name in (
                "../x",
                "/etc/hostname",
                "..",
                ".",
                "",
                "a/b",
                "a\\b",
                "manifest.json",
                "a\0",
            )
        },
    }
    for what, change in odd.items():
        folder = Path(shutil.copytree(saved, tmp_path / "odd"))
        rewrite(folder, change)
        try:
            refused(folder, r"manifest\.json")
            with pytest.raises(CheckpointError):
                checkpoint.verify(folder)
        except BaseException as error:
            raise AssertionError(what) from error
        shutil.rmtree(folder)
    folder = Path(shutil.copytree(saved, tmp_path / "odd"))
    rewrite(folder, lambda c: c.update(digest="md5"))
    refused(folder, "its digest is 'md5', wanted one of sha256, blake2b, blake3")
    for text in ('{"meta": ' + "[" * 5000 + "]" * 5000 + "}", "[]", "", "\ufeff{}", "3"):
        (folder / "manifest.json").write_text(text)
        refused(folder, r"manifest\.json cannot be read")


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_only_regular_files_are_opened(copied: Path, name: str) -> None:
    """A FIFO would be waited for, a device read without end, a link leads out of the folder."""
    path = copied / name
    outside = path.rename(copied.parent / f"outside{name}")
    path.symlink_to(outside)
    refused(copied, f"{name} is a link")
    path.unlink()
    os.mkfifo(path)
    refused(copied, f"{name} is no regular file")
    path.unlink()
    path.mkdir()
    refused(copied, f"{name} is no regular file")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refused(copied, f"{name} is a link")


def test_meta_that_json_cannot_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="meta cannot be kept"):
        checkpoint.save(tmp_path / "a", {"run": {"n": 1}}, meta={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("algorithm", files.KNOWN_DIGESTS)
def test_every_block_is_compared_as_it_is_read(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "fastest_digests", lambda: (algorithm,))
    values = torch.arange(800_000, dtype=torch.int32)
    state = {"a": {"values": values, "few": torch.ones(3), "more": values.flip(0)[:300_000]}}
    checkpoint.save(tmp_path / "a", state)
    content = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert content["digest"] == algorithm
    assert len(content["files"]["__0_0.distcp"]["blocks"]) == 5
    template = {"a": {key: torch.zeros_like(value) for key, value in state["a"].items()}}
    loaded = checkpoint.load(tmp_path / "a", template)[0]
    assert not differing(loaded["a"], state["a"])
    path = tmp_path / "a" / "__0_0.distcp"
    good, pick = path.read_bytes(), random.Random(algorithm)
    for start in range(0, len(good), files.BLOCK):
        at = pick.randrange(start, min(start + files.BLOCK, len(good)))
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        for read in (
            lambda: checkpoint.load(tmp_path / "a", template),
            lambda: checkpoint.verify(tmp_path / "a"),
        ):
            with pytest.raises(CheckpointError, match=f"its {algorithm} from byte {start} on"):
                read()


def test_a_digest_that_cannot_be_taken_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its package another one is written, and a folder with it refused with the remedy;
    with it, folders of both load. Of ranks one of which lacks it none takes it.
    """
    assert set(manifest.fastest_digests()) == {*files.KNOWN_DIGESTS}  # what is required is here
    monkeypatch.setattr(manifest, "fastest_digests", lambda: ("blake3", "sha256"))
    state = {"run": {"x": torch.arange(3)}}

    def digest_of_new(name: str) -> Any:
        checkpoint.save(tmp_path / name, state)
        return json.loads((tmp_path / name / "manifest.json").read_text())["digest"]

    assert digest_of_new("with") == "blake3"
    with monkeypatch.context() as without:
        without.delitem(files.DIGESTS, "blake3")
        without.setattr(manifest, "fastest_digests", lambda: ("sha256",))
        for read in (checkpoint.verify, lambda folder: checkpoint.load(folder, state)):
            with pytest.raises(CheckpointError, match=r"is blake3, .*: pip install blake3$"):
                read(tmp_path / "with")
        assert digest_of_new("without") == "sha256"
    with monkeypatch.context() as other:
        gathered = checkpoint_folder.comm.gather_objects

        def with_another(value: Any, group: Any) -> Any:
            found = gathered(value, group)
            chosen = isinstance(value, tuple) and value[1:] == (("blake3", "sha256"),)
            return [*found, ("", ("blake2b", "sha256"))] if chosen else found

        other.setattr(checkpoint_folder.comm, "gather_objects", with_another)
        assert digest_of_new("ranks") == "sha256"
    for name in ("with", "without", "ranks"):
        checkpoint.verify(tmp_path / name)
        assert checkpoint.load(tmp_path / name, state)[0]["run"]["x"].tolist() == [0, 1, 2]


def test_crc32_is_left_out_while_saving_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], files.WrittenFile.write

    def note(file: Any, data: Any) -> int:
        written.append(torch.serialization.get_crc32_options())
        return write(file, data)

    monkeypatch.setattr(files.WrittenFile, "write", note)
    checkpoint.save(tmp_path / "a", {"run": {"x": torch.ones(3)}})
    assert not any(written[:-3])  # the last: the index, which is no torch.save
    assert torch.serialization.get_crc32_options()


# ------------------------------------------------------------------------------- single tensors


@pytest.mark.parametrize(
    "dtype", [*archive._STORAGES, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_elements_are_found_or_left_to_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    """Those of a contiguous tensor, of the dtype and shape that are wanted, and no others."""
    many = torch.arange(6).to(dtype)
    cases = {
        "vector": (many, dtype in archive._STORAGES),
        "matrix": (many.view(2, 3), dtype in archive._STORAGES),
        "scalar": (many[1].clone(), dtype in archive._STORAGES),
        "none": (many[:0].clone(), dtype in archive._STORAGES),
        "transposed": (many.view(2, 3).T, False),
        "a part": (many[1:], False),
        "expanded": (many[:1].expand(4), False),
        "a parameter": (nn.Parameter(many, requires_grad=False), False),
    }
    for name, (tensor, wanted) in cases.items():
        torch.save(tensor, tmp_path / name)
        data = (tmp_path / name).read_bytes()
        with files.open_verified(tmp_path / name, entry_of(tmp_path / name)) as file:
            start = archive.elements(file, dtype, tensor.shape)
            assert (start is not None) == wanted, name
            if start is not None:
                assert data[start : start + tensor.nbytes] == bytes(
                    tensor.view(-1).view(torch.uint8).numpy()
                )
            assert archive.elements(file, dtype, (7,)) is None
            other = torch.float32 if dtype != torch.float32 else torch.int32
            assert archive.elements(file, other, tensor.shape) is None


def test_what_is_no_single_tensor_is_left_to_torch_and_not_run(tmp_path: Path) -> None:
    pick, tensor = random.Random(3), torch.arange(6.0)
    torch.save(tensor, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    torch.save(Loud(), tmp_path / "loud")
    torch.save({"a": tensor}, tmp_path / "dict")
    for name in ("loud", "dict"):
        with files.open_verified(tmp_path / name, entry_of(tmp_path / name)) as file:
            assert archive.elements(file, torch.float32, (6,)) is None
    start = good.index(bytes(tensor.numpy()))
    far = bytearray(good)  # a head that leads beyond the end
    far[good.rindex(b"PK\3\4", 0, start) + 29] = 255
    (tmp_path / "far").write_bytes(far)
    with files.open_verified(tmp_path / "far", entry_of(tmp_path / "far")) as file:
        assert archive.elements(file, torch.float32, (6,)) is None
    for case in range(300):  # damage that the digests are true of
        data = bytearray(good[: pick.choice((len(good), pick.randrange(len(good))))])
        for _ in range(pick.randrange(3)):
            if data:
                data[pick.randrange(len(data))] = pick.randrange(256)
        path = tmp_path / f"{case}"
        path.write_bytes(data)
        with files.open_verified(path, entry_of(path)) as file:
            found = archive.elements(file, torch.float32, (6,))
        assert found is None or 0 <= found <= len(data) - tensor.nbytes
        assert found in (None, start) or data != good
    assert not Loud.read


def test_plain_tensors_are_read_to_where_they_belong(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory in between, and no second copy in the optimizer's load_state_dict."""
    loads, load = [], torch.load

    def counted(file: Any, **settings: Any) -> Any:
        loads.append(type(file))
        return load(file, **settings)

    def no_copies(*_: Any) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(torch, "load", counted)
    monkeypatch.setattr(sharded_state, "copy_elements", no_copies)
    state = pair(1)
    checkpoint.load(saved, state)
    assert set(loads) <= {io.BytesIO}  # entries that are no tensors
    assert not differing(numbers(state), numbers(pair()))
    monkeypatch.undo()
    matrix = {"run": {"x": torch.arange(6.0).view(2, 3).T}}  # not as it lies in memory
    checkpoint.save(tmp_path / "a", matrix)
    assert torch.equal(
        checkpoint.load(tmp_path / "a", {"run": {"x": torch.zeros(3, 2)}})[0]["run"]["x"],
        matrix["run"]["x"],
    )


def test_what_a_hook_keeps_of_a_state_is_its_own(tmp_path: Path) -> None:
    param, kept = nn.Parameter(torch.ones(3, 4)), []
    optimizer = pylo_dist.AdafacLO([("w", param)], weights="demo")
    checkpoint.save(tmp_path / "c", {"optimizer": optimizer})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: kept.append(state))
    checkpoint.load(tmp_path / "c", {"optimizer": optimizer})
    theirs = {t.data_ptr() for t in kept[0]["state"][0].values()}
    assert not theirs & {t.data_ptr() for t in optimizer.state[param].values()}


def test_memory_that_is_given_away_has_one_taker() -> None:
    def places(*optimizers: Any) -> list[set[int]]:
        return [{t.data_ptr() for s in o.state.values() for t in s.values()} for o in optimizers]

    one, other, last = (pair(seed)["optimizer"] for seed in range(3))
    given = copy.deepcopy(one.state_dict())
    tensors = [t for entries in given["state"].values() for t in entries.values()]
    with sharded_state.given(tensors):
        one.load_state_dict(given)
        other.load_state_dict(given)
    last.load_state_dict(given)
    found = places(one, other, last)
    assert found[0] == {t.data_ptr() for t in tensors}
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not differing(*(numbers({"model": nn.Identity(), "optimizer": o}) for o in (one, last)))


def test_no_mark_stays_on_what_torchs_optimizers_load(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "a", {"optimizer": optimizer})
    checkpoint.load(tmp_path / "a", {"optimizer": optimizer})
    assert not [t for s in optimizer.state.values() for t in s.values() if vars(t)]


def test_a_verified_file_reads_like_any_other(tmp_path: Path) -> None:
    path, pick = tmp_path / "x", random.Random(4)
    content = random.Random(5).randbytes(3 * files.BLOCK + 1234)
    path.write_bytes(content)
    with files.open_verified(path, entry_of(path)) as file:
        for _ in range(200):
            at = pick.randrange(len(content) + 10)
            count = pick.choice((1, 100, files.BLOCK, 2 * files.BLOCK + 7, -1))
            assert file.seek(at) == file.tell() == at
            assert file.read(count) == content[at:][: count if count >= 0 else None]
        assert file.seek(-5, io.SEEK_END) == len(content) - 5
        assert file.read() == content[-5:]
        part = file.part(files.BLOCK - 3, 10)
        assert (part.read(), part.read(1)) == (content[files.BLOCK - 3 :][:10], b"")
        assert (part.seek(-2, io.SEEK_END), part.tell(), part.read(9)) == (
            8,
            8,
            content[files.BLOCK + 5 :][:2],
        )
        with pytest.raises(ValueError, match="before the beginning"):
            part.seek(-1)
        part.close()
        assert file.seek(1) == 1  # the whole stays open
        assert file.read(2) == content[1:3]


# ------------------------------------------------------------------------------ one writer


def test_of_two_saves_of_one_name_one_wins_and_the_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and ends while the first is writing."""
    name, write = tmp_path / "a", checkpoint_folder._write

    def write_after_another(*args: Any) -> Any:
        monkeypatch.setattr(checkpoint_folder, "_write", write)
        checkpoint.save(name, {"run": {"n": 2}}, meta={"job": 2})
        return write(*args)

    monkeypatch.setattr(checkpoint_folder, "_write", write_after_another)
    with pytest.raises(CheckpointError, match=f"{name} exists already"):
        checkpoint.save(name, {"run": {"n": 1}}, meta={"job": 1})
    assert checkpoint.verify(name) == {"job": 2}
    assert checkpoint.load(name, {"run": {"n": 0}})[0] == {"run": {"n": 2}}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_killed_saves_left_is_cleared_and_nothing_that_lives(tmp_path: Path) -> None:
    def left(token: str, host: str) -> Path:
        partial = tmp_path / f".b.{token * 32}.partial"
        partial.mkdir()
        (partial / "__0_0.distcp").write_text("half")
        partial.with_suffix(".lock").write_text(host)
        return partial

    here = checkpoint_folder._machine()
    assert here.startswith(f"{os.uname().nodename} ")
    dead, live, stranger = left("0", here), left("1", here), left("2", os.uname().nodename)
    with live.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        checkpoint.save(tmp_path / "a", {"run": {"n": 1}})
        assert not dead.exists()
        assert not dead.with_suffix(".lock").exists()
        assert (live / "__0_0.distcp").exists()
        assert stranger.exists()  # perhaps locks are not seen from here
    os.utime(stranger.with_suffix(".lock"), (1, 1))
    checkpoint.save(tmp_path / "c", {"run": {"n": 1}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: writing beyond fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_disk_that_is_full_is_said_in_one_line(tmp_path: Path, size: int) -> None:
    state = {"run": {"x": torch.zeros(3_000)}}
    checkpoint.save(tmp_path / "a", state)
    with pytest.raises(CheckpointError, match="File too large") as raised, files_of_at_most(size):
        checkpoint.save(tmp_path / "b", {**state, "more": {"y": torch.zeros(2_000)}})
    assert str(tmp_path / "b") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    checkpoint.verify(tmp_path / "a")


def test_folders_that_may_not_be_read_or_written(saved: Path, tmp_path: Path) -> None:
    folder, state = tmp_path / "runs", pair(1)
    shutil.copytree(saved, folder / "a")
    with permission_bits_hold():
        folder.chmod(0o555)
        with pytest.raises(
            CheckpointError, match=rf"{folder}/b was not written: {folder} cannot be"
        ):
            checkpoint.save(folder / "b", {"run": {"n": 1}})
        with pytest.raises(CheckpointError, match=rf"{folder}/c.*Permission denied"):
            checkpoint.save(folder / "c" / "d", {"run": {"n": 1}})
        assert [path.name for path in folder.iterdir()] == ["a"]
        checkpoint.load(folder / "a", {"model": state["model"]}, optional=("optimizer", "run"))
        assert checkpoint.published(folder) == [folder / "a"]
        for path in (folder / "a", folder):
            bits = path.stat().st_mode
            path.chmod(0)
            refused(folder / "a", f"Permission denied.*{folder}/a/manifest.json")
            with pytest.raises(PermissionError):  # and not: there is none
                checkpoint.published(folder)
            path.chmod(bits)
        folder.chmod(0o755)
    assert torch.equal(state["model"].weight, pair()["model"].weight)


def test_ctrl_c_is_no_fault_of_the_checkpoint(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    state = pair(1)
    before = numbers(state)
    with monkeypatch.context() as patch:
        # the manifest and the index have been read then
        patch.setattr(archive, "elements", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.load(copied, {"model": state["model"]})
    assert not differing(numbers(state), before)
    monkeypatch.setattr(files.WrittenFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "new", state)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
