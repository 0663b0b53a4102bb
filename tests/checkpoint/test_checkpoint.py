"""Checkpoints: any layout loads what any other saved, damage is refused before anything changes,
and no rank waits for another.

Real processes, real torch.distributed.checkpoint. One world of eight ranks serves all layouts:
those on fewer ranks live on a process group of the first of them, and the ranks without a part wait
at the next collective of theirs.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.core.pieces import PieceParameter, bind_shard
from pylo_dist.core.shards import TensorShard
from support.layouts import (
    LEARNED,
    MORE,
    PLAIN,
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
    run_differences,
    save_all,
    snapshot,
    tensors_of,
)
from support.optimizers import small_fc
from support.ranks import run_ranks

DTENSORS = (("fsdp2", 3), ("hsdp", 4))  # in the suite
# for every source; in the suite, others are sampled
TARGETS = (PLAIN, Layout("zero1", 2), Layout("zero2", 3))
LAYOUTS = [
    known
    for known in all_layouts()
    if known.name not in ("fsdp2", "hsdp") or (known.name, known.ranks) in DTENSORS
]
SAMPLES = 2
LONG = 50


# --------------------------------------------------------------------------------------- any to any


def any_to_any(rank: int, world: int, folder: str) -> dict[str, Any]:
    groups = new_groups()
    layouts, errors = LAYOUTS, {}
    for kind in LEARNED:
        truths: dict[Layout, Truth | None] = {}
        for source in layouts:
            truths[source] = save_all(source, kind, groups, folder)
        pick = random.Random(f"{kind} 4")
        pairs = [(source, target) for source in layouts for target in TARGETS]
        pairs += [
            (source, Layout("fsdp2", 3))
            for source in (PLAIN, Layout("zero2", 4), Layout("hsdp", 4))
        ]
        pairs += [
            (source, Layout("hsdp", 4)) for source in (Layout("zero1", 3), Layout("fsdp2", 3))
        ]
        pairs += [
            (pick.choice(layouts), pick.choice([t for t in layouts if t not in TARGETS]))
            for _ in range(SAMPLES)
        ]
        for source, target in pairs:
            errors[f"{kind} {source} -> {target}"] = load_one(
                source, target, kind, groups, folder, truths[source]
            )
    results = {
        "errors": errors,
        "long": {kind: resumed_bit_equal(kind, groups, folder) for kind in LEARNED},
    }
    # from here on all ranks meet in the world's own group, which waits a minute
    dist.barrier(groups[WORLD])
    results["replicas"] = replicas(rank, groups, folder)
    results["elementwise"] = elementwise(groups, folder)
    results["torch"] = torch_functions(rank, groups, folder)
    results["folder"] = folders(rank, groups, folder)
    dist.barrier(groups[WORLD])
    return results


def resumed_bit_equal(kind: str, groups: dict[int, Any], folder: str) -> list[str]:
    """What differs after LONG steps between a run that was saved and loaded and one that was not,
    on the same layout.
    """
    layout = Layout("zero1", 2)
    if dist.get_rank() >= layout.ranks:
        return []
    run, resumed = Run(layout, kind, groups[2]), Run(layout, kind, groups[2], seed=1)
    run.advance(STEPS)
    run.save(f"{folder}/long-{kind}", groups[2])
    resumed.load(f"{folder}/long-{kind}", groups[2])
    return run_differences(run, resumed, LONG)


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
            peers = [
                TensorShard.interval(fqn, p.shape, 0, cut),
                TensorShard.interval(fqn, p.shape, cut, p.numel()),
            ]
            piece = PieceParameter(peers[rank % 2].take(p.detach()), p)
            bind_shard(piece, peers, rank % 2, pairs[rank // 2], holders=groups[4], replicas=2)
            pieces.append((fqn, piece))
        return pieces, pylo_dist.AdafacLO(pieces, weights=small_fc(), process_group=groups[4])

    pieces, optimizer = build()
    for fqn, piece in pieces:
        piece.grad = torch.full_like(piece, 0.125 * (1 + len(fqn)))
    optimizer.step()
    dcp.save(
        {"optimizer": optimizer.state_dict()},
        checkpoint_id=f"{folder}/replicas",
        process_group=groups[4],
    )
    _, other = build()
    state = {"optimizer": other.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/replicas", process_group=groups[4])
    other.load_state_dict(state["optimizer"])
    wrong = differing(
        *(flat_state(pylo_dist.full_state_dict(o, rank0_only=False)) for o in (optimizer, other))
    )
    truth = flat_state(pylo_dist.full_state_dict(optimizer))
    if rank:
        return wrong
    written = sum(path.stat().st_size for path in Path(f"{folder}/replicas").glob("*.distcp"))
    plain = Run(PLAIN, "AdafacLO", None)
    plain.optimizer = pylo_dist.AdafacLO(
        plain.model.trainable(), weights=small_fc(), process_group=False
    )
    once = Path(f"{folder}/once")
    dcp.save({"optimizer": plain.optimizer.state_dict()}, checkpoint_id=once, no_dist=True)
    alone = sum(path.stat().st_size for path in once.glob("*.distcp"))
    # boxes have a header each; written twice it would be more than double
    if not 0.8 * alone < written < 1.6 * alone:
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
        checkpoint.save(
            f"{folder}/adamw",
            {"model": run.model, "optimizer": run.optimizer},
            process_group=groups[3],
        )
        kept = run.state()
        end = run.advance(MORE)[-1]
    for target in (PLAIN, Layout("ddp", 2), Layout("zero1", 2), source):
        if dist.get_rank() >= target.ranks:
            continue
        group = groups[target.ranks]
        run = Run(target, "AdamW", group, seed=1)
        checkpoint.load(
            f"{folder}/adamw", {"model": run.model, "optimizer": run.optimizer}, process_group=group
        )
        run.taken, state = STEPS, run.state()
        if dist.get_rank() == 0:
            wrong += [f"{target}: {key}" for key in differing(state, kept)]
        after = run.advance(MORE)[-1]
        # elementwise: the same bits in every layout
        wrong += [f"{target}: after, {fqn}" for fqn in differing(after, end)]
    return wrong


def torch_functions(rank: int, groups: dict[int, Any], folder: str) -> dict[str, Any]:
    """async_save, and get_ and set_optimizer_state_dict with their options, for ZeRO on all
    ranks.
    """
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
    results["async_save"] = loaded(
        lambda r: r.optimizer.load_state_dict(read(r.contents(), "async")["optimizer"])
    )
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        dcp.save(
            {"o": get_optimizer_state_dict(run.model, run.optimizer, options=options)},
            checkpoint_id=f"{folder}/torch-{flat}",
        )

        def through_files(
            other: Run, options: StateDictOptions = options, name: str = f"torch-{flat}"
        ) -> None:
            contents = read(
                {"o": get_optimizer_state_dict(other.model, other.optimizer, options=options)}, name
            )
            set_optimizer_state_dict(other.model, other.optimizer, contents["o"], options=options)

        results[f"sharded, flat {flat}"] = loaded(through_files)
        whole = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
        full = pylo_dist.get_optimizer_state_dict(run.model, run.optimizer, options=whole)
        results[f"full is whole, flat {flat}"] = [
            type(t).__name__ for t in tensors_in(full) if type(t) is not Tensor
        ]
        # torch's own set_optimizer_state_dict takes no state that is flat and full: it is given as
        # it is on every rank
        give = StateDictOptions(flatten_optimizer_state_dict=True) if flat else whole
        results[f"full, flat {flat}"] = loaded(
            lambda r, full=full, give=give: set_optimizer_state_dict(
                r.model, r.optimizer, full, options=give
            )
        )
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = pylo_dist.get_optimizer_state_dict(run.model, run.optimizer, options=whole)
    results["only the first rank has it"] = (
        [] if bool(full) == (rank == 0) else [f"{len(full)} entries"]
    )
    give = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    results["broadcast_from_rank0"] = loaded(
        lambda r: set_optimizer_state_dict(r.model, r.optimizer, full, options=give)
    )
    missing = (
        {**full, "state": {k: v for k, v in full["state"].items() if k != "square"}} if full else {}
    )
    try:
        set_optimizer_state_dict(
            run.model, run.optimizer, missing or {"state": {"x": {}}, "param_groups": []}
        )
        results["strict"] = ["nothing was raised"]
    except RuntimeError as error:
        results["strict"] = [] if "square" in str(error) or rank else [str(error)]
    gathered = pylo_dist.full_state_dict(run.optimizer)
    if rank == 0:
        torch.save(gathered, f"{folder}/full.pt")
    dist.barrier()
    results["torch.save"] = loaded(
        lambda r: r.optimizer.load_state_dict(torch.load(f"{folder}/full.pt", weights_only=True))
    )
    return results


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
    contents = {
        "model": run.model,
        "optimizer": run.optimizer,
        "own": {str(rank): torch.full((2,), float(rank))},
    }
    checkpoint.save(f"{folder}/runs/a", contents, meta={"step": STEPS}, process_group=group)
    other = Run(layout, "AdafacLO", group, seed=1)
    before = copy.deepcopy(snapshot(other))
    target = {
        "model": other.model,
        "optimizer": other.optimizer,
        "own": {str(rank): torch.zeros(2)},
    }

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
    results["save fails"] = outcome(
        lambda: checkpoint.save(f"{folder}/runs/b", {"x": fails}, process_group=group)
    )
    # found out when torch writes this rank's file
    unwritable = {"own": {str(rank): (lambda: 0) if rank == 1 else 1}}
    results["write fails"] = outcome(
        lambda: checkpoint.save(f"{folder}/runs/d", unwritable, process_group=group)
    )
    fails.fails = False
    checkpoint.save(f"{folder}/runs/c", {**contents, "x": fails}, process_group=group)
    fails.fails = True
    results["check fails"] = tried(
        lambda: checkpoint.load(f"{folder}/runs/c", {**target, "x": fails}, process_group=group)
    )
    # as with a disk of its own on each machine, or a cache of what was there before
    name = "a" if rank == 0 else "c"
    results["ranks see others"] = tried(
        lambda: checkpoint.load(f"{folder}/runs/{name}", target, process_group=group)
    )
    results["ranks save elsewhere"] = outcome(
        lambda: checkpoint.save(f"{folder}/other{rank}/e", contents, process_group=group)
    )
    results["exists"] = outcome(
        lambda: checkpoint.save(f"{folder}/runs/a", contents, process_group=group)
    )
    results["published"] = [path.name for path in checkpoint.published(f"{folder}/runs")]
    entries, meta = load()
    other.taken = STEPS
    results["loaded"] = (entries, meta, run_differences(run, other, MORE))
    return results


def test_any_layout_loads_what_any_other_saved(tmp_path: Path, figures: list[str]) -> None:
    ranks = run_ranks(WORLD, any_to_any, str(tmp_path))
    first = ranks[0]
    assert len(first["errors"]) >= len(LEARNED) * len(LAYOUTS) * len(TARGETS)
    worst = max(first["errors"], key=lambda pair: first["errors"][pair])
    assert first["errors"][worst] <= 1.0, worst
    figures.append(
        f"checkpoints | {len(first['errors'])} loads | {MORE} steps: {first['errors'][worst]:.2g} "
        "of the layout tolerance"
    )
    for rank, result in enumerate(ranks):
        assert not any(result["long"].values()), (rank, result["long"])
        assert not result["replicas"], (rank, result["replicas"])
        assert not result["elementwise"], (rank, result["elementwise"])
        assert not any(result["torch"].values()), (
            rank,
            {k: v for k, v in result["torch"].items() if v},
        )
    for rank, result in enumerate(ranks[:3]):
        got = result["folder"]
        said, changed = got["flipped"]
        assert re.search(r"__1_0\.distcp: its \w+ from byte 0 on is not that of the", said), said
        assert not changed
        own = (
            "CheckpointError: no more paper"
            if rank == 1
            else "CheckpointError: rank 1: no more paper"
        )
        assert got["save fails"] == own
        assert re.match(r"CheckpointError: rank 1: .*pickle", got["write fails"], re.DOTALL), got[
            "write fails"
        ]
        assert got["check fails"] == (own, [])
        said, changed = got["ranks see others"]
        assert "the ranks see different checkpoints, rank 0" in said
        assert not changed
        assert re.search("which rank 0 has made, is not there", got["ranks save elsewhere"])
        assert "exists already" in got["exists"]
        assert got["published"] == ["a", "c"]
        entries, meta, different = got["loaded"]
        assert torch.equal(entries["own"][str(rank)], torch.full((2,), float(rank)))
        assert list(entries) == ["own"]
        assert meta == {"step": STEPS}
        assert not different
