"""Checkpoints: any layout loads what any other saved, damage is refused before anything changes, and no rank waits for another.

Real processes, real torch.distributed.checkpoint. One world of eight ranks serves all layouts: those on fewer ranks live on a
process group of the first of them, and the ranks without a part wait at the next collective of theirs.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import (
    LEARNED,
    MORE,
    STEPS,
    TIMEOUT,
    WORLD,
    Layout,
    Model,
    Run,
    Truth,
    all_layouts,
    differing,
    flat_state,
    load_one,
    new_groups,
    optimizer_kinds,
    save_all,
    small_fc,
)
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.checkpoint import CheckpointError
from pylo_dist.sharded_state import ShardedState, copy_elements
from pylo_dist.shards import PieceParameter, TensorShard, bind_shard

PLAIN = Layout("plain", 1)
DTENSORS = (("fsdp2", 3), ("hsdp", 4))  # in the suite
TARGETS = (PLAIN, Layout("zero1", 2), Layout("zero2", 3))  # for every source; in the suite, others are sampled
LAYOUTS = [known for known in all_layouts() if known.name not in ("fsdp2", "hsdp") or (known.name, known.ranks) in DTENSORS]
SAMPLES = 4
LONG = 50


# ------------------------------------------------------------------------------------------ any to any


def any_to_any(rank: int, world: int, folder: str) -> dict[str, Any]:
    groups = new_groups()
    layouts, errors = LAYOUTS, {}
    for kind in LEARNED:
        truths: dict[Layout, Truth | None] = {}
        for source in layouts:
            truths[source] = save_all(source, kind, groups, folder)
        pick = random.Random(f"{kind} 4")
        pairs = [(source, target) for source in layouts for target in TARGETS]
        pairs += [(source, Layout("fsdp2", 3)) for source in (PLAIN, Layout("zero2", 4), Layout("hsdp", 4))]
        pairs += [(source, Layout("hsdp", 4)) for source in (Layout("zero1", 3), Layout("fsdp2", 3))]
        pairs += [(pick.choice(layouts), pick.choice([t for t in layouts if t not in TARGETS])) for _ in range(SAMPLES)]
        for source, target in pairs:
            errors[f"{kind} {source} -> {target}"] = load_one(source, target, kind, groups, folder, truths[source])
    results = {"errors": errors, "long": {kind: resumed_bit_equal(kind, groups, folder) for kind in LEARNED}}
    dist.barrier(groups[WORLD])  # from here on all ranks meet in the world's own group, which waits a minute
    results["replicas"] = replicas(rank, groups, folder)
    results["elementwise"] = elementwise(groups, folder)
    results["torch"] = torch_functions(rank, groups, folder)
    results["folder"] = folders(rank, groups, folder)
    dist.barrier(groups[WORLD])
    return results


def resumed_bit_equal(kind: str, groups: dict[int, Any], folder: str) -> list[str]:
    """What differs after LONG steps between a run that was saved and loaded and one that was not, on the same layout."""
    layout = Layout("zero1", 2)
    if dist.get_rank() >= layout.ranks:
        return []
    run, resumed = Run(layout, kind, groups[2]), Run(layout, kind, groups[2], seed=1)
    run.advance(STEPS)
    run.save(f"{folder}/long-{kind}", groups[2])
    resumed.load(f"{folder}/long-{kind}", groups[2])
    return run_differences(run, resumed, LONG)


def run_differences(a: Run, b: Run, steps: int) -> list[str]:
    """What differs after the same further steps, this rank's pieces and all parameters."""
    for run in (a, b):
        run.advance(steps)
    ours, theirs = ({f"{i}.{n}": t for i, s in enumerate(r.optimizer.state.values()) for n, t in s.items()} for r in (a, b))
    groups = [{f"group {i}.{n}": v for i, g in enumerate(r.optimizer.param_groups) for n, v in g.items()} for r in (a, b)]
    for group in groups:
        for key in [key for key in group if key.endswith(".params")]:
            del group[key]
    return differing(ours, theirs) + differing(*groups) + differing(a.params(), b.params())


def replicas(rank: int, groups: dict[int, Any], folder: str) -> list[str]:
    """Two replicas of two ranks: each element is on two ranks, of which one writes it."""
    pairs = [dist.new_group([0, 1], timeout=TIMEOUT), dist.new_group([2, 3], timeout=TIMEOUT)]
    if rank >= 4:
        return []
    model = Model()

    def build() -> tuple[list[tuple[str, nn.Parameter]], pylo_dist.AdafacLO]:
        pieces = []
        for fqn, p in model.trainable():
            cut = p.numel() // 3
            peers = [TensorShard.interval(fqn, p.shape, 0, cut), TensorShard.interval(fqn, p.shape, cut, p.numel())]
            piece = PieceParameter(peers[rank % 2].take(p.detach()), p)
            bind_shard(piece, peers, rank % 2, pairs[rank // 2], holders=groups[4], replicas=2)
            pieces.append((fqn, piece))
        return pieces, pylo_dist.AdafacLO(pieces, weights=small_fc(), process_group=groups[4])

    pieces, optimizer = build()
    for fqn, piece in pieces:
        piece.grad = torch.full_like(piece, 0.125 * (1 + len(fqn)))
    optimizer.step()
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/replicas", process_group=groups[4])
    _, other = build()
    state = {"optimizer": other.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/replicas", process_group=groups[4])
    other.load_state_dict(state["optimizer"])
    wrong = differing(*(flat_state(pylo_dist.full_state_dict(o, rank0_only=False)) for o in (optimizer, other)))
    truth = flat_state(pylo_dist.full_state_dict(optimizer))
    if rank:
        return wrong
    written = sum(path.stat().st_size for path in Path(f"{folder}/replicas").glob("*.distcp"))
    plain = Run(PLAIN, "AdafacLO", None)
    plain.optimizer = pylo_dist.AdafacLO(plain.model.trainable(), weights=small_fc(), process_group=False)
    once = Path(f"{folder}/once")
    dcp.save({"optimizer": plain.optimizer.state_dict()}, checkpoint_id=once, no_dist=True)
    alone = sum(path.stat().st_size for path in once.glob("*.distcp"))
    if not 0.8 * alone < written < 1.6 * alone:  # boxes have a header each; written twice it would be more than double
        wrong.append(f"{written} bytes, one process writes {alone}")
    state = {"optimizer": plain.optimizer.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/replicas", no_dist=True)
    plain.optimizer.load_state_dict(state["optimizer"])
    return wrong + differing(flat_state(pylo_dist.full_state_dict(plain.optimizer)), truth)


def elementwise(groups: dict[int, Any], folder: str) -> list[str]:
    """torch's AdamW, which makes its state in the first step: a fresh one loads it all the same."""
    source, wrong = Layout("zero1", 3), []
    kept: dict[str, Any] = {}
    if dist.get_rank() < 3:
        run = Run(source, "AdamW", groups[3])
        run.advance(STEPS)
        checkpoint.save(f"{folder}/adamw", {"model": run.model, "optimizer": run.optimizer}, process_group=groups[3])
        kept = run.state()
        end = run.advance(MORE)[-1]
    for target in (PLAIN, Layout("ddp", 2), Layout("zero1", 2), source):
        if dist.get_rank() >= target.ranks:
            continue
        group = groups[target.ranks]
        run = Run(target, "AdamW", group, seed=1)
        checkpoint.load(f"{folder}/adamw", {"model": run.model, "optimizer": run.optimizer}, process_group=group)
        run.taken, state = STEPS, run.state()
        if dist.get_rank() == 0:
            wrong += [f"{target}: {key}" for key in differing(state, kept)]
        after = run.advance(MORE)[-1]
        wrong += [f"{target}: after, {fqn}" for fqn in differing(after, end)]  # elementwise: the same bits in every layout
    return wrong


def torch_functions(rank: int, groups: dict[int, Any], folder: str) -> dict[str, Any]:
    """async_save, and get_ and set_optimizer_state_dict with their options, for ZeRO on all ranks."""
    layout, results = Layout("zero1", WORLD), {}
    run = Run(layout, "VeLO", None)
    run.advance(STEPS)
    local = copy.deepcopy(dict(enumerate(run.optimizer.state.values())))

    def loaded(fill: Callable[[Run], None]) -> list[str]:
        other = Run(layout, "VeLO", None, seed=1)
        fill(other)
        mine = dict(enumerate(other.optimizer.state.values()))
        wrong = [f"{i}.{key}" for i, state in local.items() for key in differing(state, mine[i])]
        return wrong + differing(*(tensors_of(r.optimizer.param_groups) for r in (run, other)))

    def read(contents: dict[str, Any], name: str) -> dict[str, Any]:
        dcp.load(contents, checkpoint_id=f"{folder}/{name}")
        return contents

    future = dcp.async_save(run.contents(), checkpoint_id=f"{folder}/async")
    for state in run.optimizer.state.values():  # the run goes on while the copy is written
        for tensor in state.values():
            tensor.add_(1.0)
    future.result()
    for i, state in enumerate(run.optimizer.state.values()):
        for name, tensor in state.items():
            tensor.copy_(local[i][name])
    results["async_save"] = loaded(lambda r: r.optimizer.load_state_dict(read(r.contents(), "async")["optimizer"]))
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        dcp.save(
            {"o": get_optimizer_state_dict(run.model, run.optimizer, options=options)}, checkpoint_id=f"{folder}/torch-{flat}"
        )

        def through_files(other: Run, options: StateDictOptions = options, name: str = f"torch-{flat}") -> None:
            contents = read({"o": get_optimizer_state_dict(other.model, other.optimizer, options=options)}, name)
            set_optimizer_state_dict(other.model, other.optimizer, contents["o"], options=options)

        results[f"sharded, flat {flat}"] = loaded(through_files)
        whole = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
        full = pylo_dist.get_optimizer_state_dict(run.model, run.optimizer, options=whole)
        results[f"full is whole, flat {flat}"] = [type(t).__name__ for t in tensors_in(full) if type(t) is not Tensor]
        # torch's own set_optimizer_state_dict takes no state that is flat and full: it is given as it is on every rank
        give = StateDictOptions(flatten_optimizer_state_dict=True) if flat else whole
        results[f"full, flat {flat}"] = loaded(
            lambda r, full=full, give=give: set_optimizer_state_dict(r.model, r.optimizer, full, options=give)
        )
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = pylo_dist.get_optimizer_state_dict(run.model, run.optimizer, options=whole)
    results["only the first rank has it"] = [] if bool(full) == (rank == 0) else [f"{len(full)} entries"]
    give = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    results["broadcast_from_rank0"] = loaded(lambda r: set_optimizer_state_dict(r.model, r.optimizer, full, options=give))
    missing = {**full, "state": {k: v for k, v in full["state"].items() if k != "square"}} if full else {}
    try:
        set_optimizer_state_dict(run.model, run.optimizer, missing or {"state": {"x": {}}, "param_groups": []})
        results["strict"] = ["nothing was raised"]
    except RuntimeError as error:
        results["strict"] = [] if "square" in str(error) or rank else [str(error)]
    gathered = pylo_dist.full_state_dict(run.optimizer)
    if rank == 0:
        torch.save(gathered, f"{folder}/full.pt")
    dist.barrier()
    results["torch.save"] = loaded(lambda r: r.optimizer.load_state_dict(torch.load(f"{folder}/full.pt", weights_only=True)))
    return results


def tensors_of(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"group {i}.{key}": value for i, group in enumerate(groups) for key, value in group.items() if key != "params"}


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors_in(value)]
    if isinstance(tree, list):
        return [t for value in tree for t in tensors_in(value)]
    return [tree] if isinstance(tree, Tensor) else []


class FailsOnOneRank:
    """State whose `state_dict` or `load_state_dict`'s check fails on the second rank."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        if self.fails and dist.get_rank() == 1:
            raise OSError("no more paper")
        return {"n": 1}

    def check_state_dict(self, _: Any) -> None:
        self.state_dict()

    def load_state_dict(self, _: Any) -> None:
        raise AssertionError("may not be loaded")


def folders(rank: int, groups: dict[int, Any], folder: str) -> dict[str, Any]:
    """`checkpoint.save` and `load` on three ranks: what one rank cannot do, none does."""
    if rank >= 3:
        return {}
    group, layout, results = groups[3], Layout("zero1", 3), {}
    run = Run(layout, "AdafacLO", group)
    run.advance(STEPS)
    contents = {"model": run.model, "optimizer": run.optimizer, "own": {str(rank): torch.full((2,), float(rank))}}
    checkpoint.save(f"{folder}/runs/a", contents, meta={"step": STEPS}, process_group=group)
    other = Run(layout, "AdafacLO", group, seed=1)
    before = copy.deepcopy(snapshot(other))
    target = {"model": other.model, "optimizer": other.optimizer, "own": {str(rank): torch.zeros(2)}}

    def outcome(action: Callable[[], Any]) -> str:
        try:
            action()
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "done"

    def tried(action: Callable[[], Any]) -> tuple[str, list[str]]:
        return outcome(action), differing(snapshot(other), before)

    def load() -> Any:
        return checkpoint.load(f"{folder}/runs/a", target, process_group=group)

    data = sorted(Path(f"{folder}/runs/a").glob("*.distcp"))[1]
    good = data.read_bytes()
    dist.barrier(group)
    if rank == 0:
        data.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    dist.barrier(group)
    results["flipped"] = tried(load)
    dist.barrier(group)
    if rank == 0:
        data.write_bytes(good)
    dist.barrier(group)
    fails = FailsOnOneRank(True)
    results["save fails"] = outcome(lambda: checkpoint.save(f"{folder}/runs/b", {"x": fails}, process_group=group))
    unwritable = {"own": {str(rank): (lambda: 0) if rank == 1 else 1}}  # found out when torch writes this rank's file
    results["write fails"] = outcome(lambda: checkpoint.save(f"{folder}/runs/d", unwritable, process_group=group))
    fails.fails = False
    checkpoint.save(f"{folder}/runs/c", {**contents, "x": fails}, process_group=group)
    fails.fails = True
    results["check fails"] = tried(lambda: checkpoint.load(f"{folder}/runs/c", {**target, "x": fails}, process_group=group))
    results["exists"] = outcome(lambda: checkpoint.save(f"{folder}/runs/a", contents, process_group=group))
    results["published"] = [path.name for path in checkpoint.published(f"{folder}/runs")]
    entries, meta = load()
    other.taken = STEPS
    results["loaded"] = (entries, meta, run_differences(run, other, MORE))
    return results


def snapshot(run: Run) -> dict[str, Any]:
    """This rank's parameters, state and settings."""
    state = {f"{i}.{name}": t for i, s in enumerate(run.optimizer.state.values()) for name, t in s.items()}
    return {**run.params(), **state, **tensors_of(run.optimizer.param_groups)}


def test_any_layout_loads_what_any_other_saved(tmp_path: Path, figures: list[str]) -> None:
    ranks = run_ranks(WORLD, any_to_any, str(tmp_path))
    first = ranks[0]
    assert len(first["errors"]) >= len(LEARNED) * len(LAYOUTS) * len(TARGETS)
    worst = max(first["errors"], key=lambda pair: first["errors"][pair])
    assert first["errors"][worst] <= 1.0, worst
    figures.append(
        f"checkpoints | {len(first['errors'])} loads | {MORE} steps: {first['errors'][worst]:.2g} of the layout tolerance"
    )
    for rank, result in enumerate(ranks):
        assert not any(result["long"].values()), (rank, result["long"])
        assert not result["replicas"], (rank, result["replicas"])
        assert not result["elementwise"], (rank, result["elementwise"])
        assert not any(result["torch"].values()), (rank, {k: v for k, v in result["torch"].items() if v})
    for rank, result in enumerate(ranks[:3]):
        got = result["folder"]
        said, changed = got["flipped"]
        assert "__1_0.distcp: its sha256 is not that of the manifest" in said
        assert not changed
        own = "CheckpointError: no more paper" if rank == 1 else "CheckpointError: rank 1: no more paper"
        assert got["save fails"] == own
        assert re.match(r"CheckpointError: rank 1: .*pickle", got["write fails"], re.DOTALL), got["write fails"]
        assert got["check fails"] == (own, [])
        assert "exists already" in got["exists"]
        assert got["published"] == ["a", "c"]
        entries, meta, different = got["loaded"]
        assert torch.equal(entries["own"][str(rank)], torch.full((2,), float(rank)))
        assert list(entries) == ["own"]
        assert meta == {"step": STEPS}
        assert not different


# ------------------------------------------------------------------------------------------- one process


def contents_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer, "run": {"seen": torch.tensor([3, 4]), "name": "x"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VeLO checkpoint of one process, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("saved") / "good"
    run = Run(PLAIN, "VeLO", None)
    run.advance(STEPS)
    checkpoint.save(folder, contents_of(run.model, run.optimizer), meta={"step": STEPS})
    return folder


def fresh(kind: str = "VeLO", **changes: Any) -> Run:
    return Run(PLAIN, kind, None, seed=1, **changes)


def refused(folder: Path, run: Run, message: str, **contents: Any) -> None:
    before = copy.deepcopy(snapshot(run))
    contents = {**contents_of(run.model, run.optimizer), **contents}
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder, contents)
    assert not differing(snapshot(run), before)
    assert contents["run"]["seen"].tolist() == [3, 4]


def damaged(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def test_a_folder_loads_and_says_what_it_was(saved: Path) -> None:
    run, other = Run(PLAIN, "VeLO", None), fresh()
    run.advance(STEPS)
    other.taken = STEPS
    template = contents_of(other.model, other.optimizer)
    template["run"] = {"seen": torch.zeros(2, dtype=torch.int64), "name": ""}
    entries, meta = checkpoint.load(saved, template)
    assert entries["run"]["seen"].tolist() == [3, 4]
    assert entries["run"]["name"] == "x"
    assert template["run"]["seen"].tolist() == [0, 0]  # a template is not written
    assert meta == {"step": STEPS} == checkpoint.verify(saved)
    assert checkpoint.published(saved.parent) == [saved]
    assert checkpoint.published(saved.parent / "nowhere") == []
    assert not list(saved.parent.glob(".*"))
    assert not run_differences(run, other, MORE)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_by_name(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder, pick = damaged(saved, tmp_path), random.Random(f"{name} {damage}")
    path = folder / name
    data = path.read_bytes()
    for _ in range(5 if damage == "flip" else 1):
        at = pick.randrange(len(data))
        path.write_bytes(
            data[:at] if damage == "truncate" else data[:at] + bytes([data[at] ^ (1 << pick.randrange(8))]) + data[at + 1 :]
        )
        if damage == "remove":
            path.unlink()
        refused(folder, fresh(), re.escape(name))


def test_nothing_is_unpickled_before_its_checksum_matched(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    folder = damaged(saved, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Loud()) + b"x")
    refused(folder, fresh(), "metadata")
    assert not Loud.read


class Loud:
    """Says so when it is unpickled."""

    read = False

    def __reduce__(self) -> Any:
        return (Loud.was_read, ())

    @staticmethod
    def was_read() -> None:
        Loud.read = True


def other_weights() -> dict[str, Tensor]:
    changed = optimizer_kinds()["VeLO"][1]["weights"]
    return {name: t + (1e-6 if name == "step_size.bias" else 0.0) for name, t in changed.items()}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fresh("AdafacLO"), "state_rule 'velo', this optimizer 'small_fc'"),
        (lambda: fresh("AdamW"), "group 0 of 'optimizer' has state_rule 'velo'"),
        (lambda: fresh(weights=other_weights()), "state_weights .*give the optimizer the weights it was saved with"),
        (lambda: wider(), r"'model.wide' is torch.float32 of shape \(5, 16\), wanted torch.float32 of \(5, 17\)"),
        (lambda: renamed(), "'wide' in the place of 'conv'"),
        (lambda: shorter(), "groups of \\[8\\] parameters, this optimizer groups of \\[7\\]"),
        (lambda: doubled(), "wanted torch.float64"),
    ],
    ids=["rule", "torch's optimizer", "weights", "shape", "name", "fewer", "dtype"],
)
def test_what_belongs_to_something_else_is_refused(saved: Path, build: Callable[[], Run], message: str) -> None:
    refused(saved, build(), message)


def rebuilt(run: Run) -> Run:
    run.optimizer = pylo_dist.VeLO(run.model.trainable(), process_group=False, **optimizer_kinds()["VeLO"][1])
    return run


def wider() -> Run:
    run = fresh()
    run.model.wide = nn.Parameter(torch.zeros(5, 17))
    return rebuilt(run)


def renamed() -> Run:
    run = fresh()
    run.model.other = run.model.wide
    del run.model.wide
    return rebuilt(run)


def shorter() -> Run:
    run = fresh()
    run.model.wide.requires_grad_(False)
    return rebuilt(run)


def doubled() -> Run:
    run = fresh()
    run.model.double()
    return rebuilt(run)


def test_entries_that_may_be_missing_are_left_out(saved: Path) -> None:
    run = fresh()
    more = {"rng": {"7": torch.zeros(2)}, **contents_of(run.model, run.optimizer)}
    refused(saved, run, r"has no 'rng.7'", rng=more["rng"])
    entries, _ = checkpoint.load(saved, more, optional=("rng",))
    assert entries["rng"] == {}


def test_a_run_that_was_killed_in_a_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fresh()
    contents = {"model": run.model, "optimizer": run.optimizer}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "a", contents)
    assert checkpoint.published(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [".a.partial"]
    (tmp_path / ".a.partial" / "__9_0.distcp").write_text("of a run on ten ranks")
    checkpoint.save(tmp_path / "a", contents)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    checkpoint.verify(tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(tmp_path / "a", contents)


def test_a_saved_folder_cannot_be_written_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        checkpoint.save(tmp_path / "file" / "a", {"x": {"n": 1}})
    with pytest.raises((TypeError, ValueError), match=r"JSON|serializable"):
        checkpoint.save(tmp_path / "a", {"x": {"n": 1}}, meta={"step": torch.ones(1)})


def test_schedulers_may_be_part_of_it(tmp_path: Path) -> None:
    """A scheduler adds `initial_lr` to the groups; a tensor as rate is loaded where there was a number."""
    run, other = fresh("AdafacLO", lr=torch.tensor(0.5)), fresh("AdafacLO")
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    run.advance(2)
    scheduler.step()
    checkpoint.save(tmp_path / "a", {"model": run.model, "optimizer": run.optimizer, "scheduler": scheduler})
    other.taken = 2
    late = torch.optim.lr_scheduler.StepLR(other.optimizer, 1, 0.1)
    checkpoint.load(tmp_path / "a", {"model": other.model, "optimizer": other.optimizer, "scheduler": late})
    assert isinstance(other.optimizer.param_groups[0]["lr"], Tensor)
    assert late.gamma == 0.5
    assert not run_differences(run, other, MORE)


def test_mulo_and_frozen_parameters_in_a_folder(tmp_path: Path) -> None:
    """Nested settings, and state of a parameter that was frozen before the optimizer was built again."""
    run, other = Model(), Model(1)
    mults = {"wide": 4.0, "square": 2.0}
    optimizers = [pylo_dist.MuLO(run.trainable(), weights=small_fc(), width_mults=mults, process_group=False)]
    for _, p in run.trainable():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    checkpoint.save(tmp_path / "a", {"model": run, "optimizer": optimizers[0]})
    named = other.trainable()
    other.wide.requires_grad_(False)
    optimizers.append(pylo_dist.MuLO(named, weights=small_fc(), width_mults=mults, process_group=False))
    checkpoint.load(tmp_path / "a", {"model": other, "optimizer": optimizers[1]})
    assert not differing(*(flat_state(pylo_dist.full_state_dict(o)) for o in optimizers))
    assert optimizers[1].state[other.wide]


# ------------------------------------------------------------------------------------------ state dicts


def pieces(cuts: list[int], rank: int) -> tuple[list[tuple[str, nn.Parameter]], Model]:
    """This rank's pieces of a model, each parameter cut at these shares of eight."""
    model, named = Model(), []
    for fqn, p in model.trainable():
        bounds = [0, *(p.numel() * cut // 8 for cut in cuts), p.numel()]
        peers = [TensorShard.interval(fqn, p.shape, a, b) for a, b in pairwise(bounds)]
        piece = PieceParameter(peers[rank].take(p.detach()), p)
        bind_shard(piece, peers, rank, FakeGroup())
        named.append((fqn, piece))
    return named, model


class FakeGroup:
    """Stands in for a process group where no collective is called."""

    def size(self) -> int:
        return 2


def sharded(cuts: list[int], rank: int) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(pieces(cuts, rank)[0], weights=small_fc(), process_group=False)


def filled(optimizer: torch.optim.Optimizer) -> Any:
    for i, state in enumerate(optimizer.state.values()):
        for name, tensor in state.items():
            values = torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            tensor.copy_(values + 1000 * i + 0.25 * len(name))
    return optimizer


def whole() -> Any:
    return filled(pylo_dist.AdafacLO(Model().trainable(), weights=small_fc(), process_group=False))


def test_a_rank_takes_its_elements_out_of_whole_tensors() -> None:
    donor = whole()
    for rank in (0, 1, 2):
        optimizer = sharded([3, 3], rank)  # the second rank has nothing
        optimizer.load_state_dict(donor.state_dict())
        for i, (fqn, p) in enumerate(Model().trainable()):
            if not p.numel():
                continue
            state = optimizer.state_dict()["state"][i]
            mine, theirs = state["momentum"], donor.state_dict()["state"][i]["momentum"]
            assert tuple(mine.shape) == tuple(theirs.shape), fqn
            flat = theirs.reshape(3, -1)
            start = mine.shard.start
            assert torch.equal(mine.local, flat[:, start : start + mine.shard.numel]), fqn
            assert type(state.get("row", state.get("diag"))) is (Tensor if "row" in state else ShardedState)


def test_another_cut_serves_where_it_covers() -> None:
    donor = whole()
    larger, smaller = sharded([6], 0), sharded([3], 0)
    larger.load_state_dict(donor.state_dict())
    smaller.load_state_dict(larger.state_dict())
    wanted = sharded([3], 0)
    wanted.load_state_dict(donor.state_dict())
    assert not differing(*(dict(flat_local(o)) for o in (smaller, wanted)))
    before = dict(flat_local(larger))
    with pytest.raises(ValueError, match=r"'momentum' of 'embedding': \d+ elements of this rank are on other ranks"):
        larger.load_state_dict(smaller.state_dict())
    assert not differing(dict(flat_local(larger)), before)


def flat_local(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [(f"{i}.{n}", t.clone()) for i, state in enumerate(optimizer.state.values()) for n, t in state.items()]


def test_sharded_state_refuses_what_it_cannot_do() -> None:
    state = filled(sharded([3], 0)).state_dict()["state"][0]["momentum"]
    assert repr(state).startswith("ShardedState(79 of 212 elements of (3, 53, 4)")
    with pytest.raises(TypeError, match="full_state_dict"):
        torch.add(state, 1.0)
    with pytest.raises(TypeError, match="full_state_dict"):
        state.view(-1)
    with pytest.raises(TypeError, match="part of it"):
        torch.save(state, io.BytesIO())
    with pytest.raises(TypeError, match="same shape"):
        state.new_empty((2, 2))
    with pytest.raises(TypeError, match="full_state_dict"):
        torch.zeros(state.shape).copy_(state)
    copied = copy.deepcopy({"a": state, "b": state})
    assert copied["a"] is copied["b"]
    assert torch.equal(copied["a"].local, state.local)
    assert copied["a"].local.data_ptr() != state.local.data_ptr()
    wide = state.to(torch.float64)
    assert isinstance(wide, ShardedState)
    assert wide.dtype == wide.local.dtype == torch.float64
    target = torch.zeros_like(state)
    assert not target.local.any()
    target.copy_(state.detach().clone())
    assert torch.equal(target.local, state.local)
    target.copy_(torch.ones(state.shape))
    assert bool((target.local == 1.0).all())
    with pytest.raises(ValueError, match="are on other ranks"):
        copy_elements(filled(sharded([3], 1)).state_dict()["state"][0]["momentum"], target)


def test_the_state_says_its_format_rule_and_weights() -> None:
    state = whole().state_dict()
    group = state["param_groups"][0]
    assert group["state_format"] == 1
    assert group["state_rule"] == "small_fc"
    assert re.fullmatch(r"[0-9a-f]{64}", group["state_weights"])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert json.dumps(
        {k: v for k, v in loaded["param_groups"][0].items() if k != "step"}
    )  # numbers and strings, no pickle of ours
    for key, message in (
        ("state_format", "state_format 7, this optimizer 1; it was saved by another version"),
        ("state_weights", "weights it was saved with"),
        ("state_rule", "build the optimizer that saved it"),
    ):
        broken = copy.deepcopy(loaded)
        broken["param_groups"][0][key] = 7
        with pytest.raises(ValueError, match=message):
            whole().load_state_dict(broken)
        del broken["param_groups"][0][key]
        with pytest.raises(ValueError, match=f"has no '{key}'"):
            whole().load_state_dict(broken)


def test_state_of_another_dtype_or_order_is_refused() -> None:
    state = copy.deepcopy(whole().state_dict())
    state["state"][0]["momentum"] = state["state"][0]["momentum"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'momentum' of 'embedding': found torch.bfloat16, wanted torch.float32"):
        whole().load_state_dict(state)
    state = whole().state_dict()
    names = state["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]
    with pytest.raises(ValueError, match="'row' in the place of 'embedding'"):
        whole().load_state_dict(state)
    state["param_groups"][0]["param_names"] = [f"module._orig_mod.{fqn}" for fqn, _ in Model().trainable()]
    optimizer = whole()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["param_names"] == [fqn for fqn, _ in Model().trainable()]


@pytest.mark.parametrize("kind", LEARNED)
def test_torch_functions_on_a_plain_optimizer(kind: str) -> None:
    """With a frozen, a tied, a 0-d and an empty parameter, strict, in every option that needs no second rank."""
    run = Run(PLAIN, kind, None)
    run.advance(STEPS)
    wanted = copy.deepcopy(snapshot(run))
    for options in (
        {},
        {"flatten_optimizer_state_dict": True},
        {"cpu_offload": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
    ):
        given = StateDictOptions(**options)
        theirs = get_optimizer_state_dict(run.model, run.optimizer, options=given)
        ours = pylo_dist.get_optimizer_state_dict(run.model, run.optimizer, options=given)
        assert repr(theirs) == repr(ours)
        other = fresh(kind)
        set_optimizer_state_dict(other.model, other.optimizer, theirs, options=given)
        other.model.load_state_dict(run.model.state_dict())
        assert not differing(snapshot(other), wanted), options
        assert not differing(snapshot(run), wanted), options  # reading it, and torch's step with zero gradients, changed nothing


def test_parameters_without_names_load_by_position(tmp_path: Path) -> None:
    """`AdafacLO(model.parameters())` has no names to save; ZeroOptimizer always has them."""
    model = Model()
    unnamed = filled(pylo_dist.AdafacLO([p for _, p in model.trainable()], weights=small_fc(), process_group=False))
    sharded_one = pylo_dist.ZeroOptimizer(Model(1), pylo_dist.AdafacLO, weights=small_fc(), process_group=False)
    for source, target in ((unnamed, sharded_one), (filled(sharded_one), unnamed)):
        folder = tmp_path / type(source).__name__
        dcp.save({"o": source.state_dict()}, checkpoint_id=folder, no_dist=True)
        for state in target.state.values():
            for tensor in state.values():
                tensor.zero_()
        contents = {"o": target.state_dict()}
        dcp.load(contents, checkpoint_id=folder, no_dist=True)
        target.load_state_dict(contents["o"])
        assert not differing(*(dict(flat_local(o)) for o in (source, target)))
    assert "param_names" not in unnamed.param_groups[0]
    assert sharded_one.param_groups[0]["param_names"] == [fqn for fqn, _ in model.trainable()]


def with_masters(model: nn.Module, **kwargs: Any) -> Any:
    try:
        return pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights=small_fc(), process_group=False, master_weights=True, **kwargs
        )
    except TypeError:
        pytest.skip("ZeroOptimizer keeps no masters yet")


def test_masters_travel_where_both_sides_have_them(tmp_path: Path) -> None:
    """Only some layouts keep float32 masters of bfloat16 parameters: others ignore them; who misses them takes the parameter."""

    def stepped(optimizer: Any, model: Model) -> None:
        for fqn, p in model.trainable():
            p.grad = torch.full_like(p, 0.125 * (1 + len(fqn)))
        optimizer.step()

    def masters(optimizer: Any) -> dict[str, Tensor]:
        state = optimizer.state_dict()["state"]
        return {str(i): entry["master"].clone() for i, entry in state.items() if "master" in entry}

    models = {name: Model(i).to(torch.bfloat16) for i, name in enumerate(("sharded", "again", "plain", "back"))}
    first = with_masters(models["sharded"])
    stepped(first, models["sharded"])
    assert {t.dtype for t in masters(first).values()} == {torch.float32}
    checkpoint.save(tmp_path / "a", {"model": models["sharded"], "optimizer": first})

    again = with_masters(models["again"])
    checkpoint.load(tmp_path / "a", {"model": models["again"], "optimizer": again})
    assert not differing(masters(again), masters(first))
    rounded = {i: t.to(torch.bfloat16).to(torch.float32) for i, t in masters(first).items()}
    assert differing(masters(first), rounded)  # they hold more than the parameters

    plain = pylo_dist.AdafacLO(models["plain"].trainable(), weights=small_fc(), process_group=False)
    checkpoint.load(tmp_path / "a", {"model": models["plain"], "optimizer": plain})
    assert not differing(models["plain"].state_dict(), models["sharded"].state_dict())
    checkpoint.save(tmp_path / "b", {"model": models["plain"], "optimizer": plain})
    back = with_masters(models["back"])
    checkpoint.load(tmp_path / "b", {"model": models["back"], "optimizer": back})
    stepped(back, models["back"])
    fresh_model = Model(7).to(torch.bfloat16)
    fresh_model.load_state_dict(models["plain"].state_dict())
    wanted = with_masters(fresh_model)
    wanted.load_state_dict(plain.state_dict())
    stepped(wanted, fresh_model)
    assert not differing(masters(back), masters(wanted))


def test_a_piece_is_its_parameter_as_a_key() -> None:
    named, model = pieces([3], 0)
    piece, param = named[0][1], model.embedding
    assert {param: "whole"}[piece] == "whole"
    assert {piece: "piece"}[param] == "piece"
    assert piece in {param}
    assert named[1][1] not in {param}
    assert torch.equal(piece == piece.detach().clone(), torch.ones(piece.shape, dtype=torch.bool))
