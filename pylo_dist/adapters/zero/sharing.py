"""Who shares the buckets, and what these ranks must have alike. Reads only.

A disagreement would later be a hang, or parameters that drift apart; here it is an error on every
rank, by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import comm
from ...core import trace
from ...optimizer import checks


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who shares the buckets.

    Attributes:
        group: the ranks a bucket is cut over; None: this one alone.
        rank: this one's place among them.
        ranks: how many they are.
        replicate_group: the ranks that hold the same part, one of every replica; None: there is one
            replica.
        holders: the ranks of all replicas together; `group` where there is one, None for a single
            process.
        replicas: how many there are.
    """

    group: Any
    rank: int
    ranks: int
    replicate_group: Any = None
    holders: Any = None
    replicas: int = 1

    @classmethod
    def of(cls, process_group: Any, replicate_group: Any) -> Sharing:
        """From the arguments of `ZeroOptimizer`; collective where there are replicas.

        Raises:
            ValueError: replicas of nothing, groups that form no grid (see `comm.union`), or no
                process group although a launcher has started other ranks.
        """
        comm.check_group("process_group", process_group)
        comm.check_group("replicate_group", replicate_group)
        group = comm.default_group() if process_group is None else (process_group or None)
        if process_group is None and group is None:
            _check_alone()
        # a single rank holds everything: nothing to communicate
        alone = group if comm.size(group) > 1 else None
        rank, ranks = comm.rank(group), comm.size(group)
        if not replicate_group:
            return cls(alone, rank, ranks, None, alone)
        if process_group is None or group is None:
            raise ValueError(
                "replicate_group without process_group: wanted the ranks that share the parameters "
                "of one replica, too"
            )
        replicas = comm.size(replicate_group)
        if replicas == 1:
            return cls(alone, rank, ranks, None, alone)
        holders = comm.union(group, replicate_group)
        return cls(alone, rank, ranks, replicate_group, holders, replicas)


def _check_alone() -> None:
    """Raise ValueError where the environment says that this process is one of several: each would
    train a model of its own.
    """
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and ranks.isdecimal() and int(ranks) > 1:
        raise ValueError(
            f"this is rank {rank}, one of {ranks} by the environment (RANK, WORLD_SIZE), and they "
            "have no process group: call torch.distributed.init_process_group() first, or pass "
            "process_group=False for a model of this rank alone"
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of `ZeroOptimizer` of the same names.

    Raises:
        ValueError: one that cannot be served.
    """

    bucket_cap_mb: float | None
    reduce_dtype: torch.dtype | None
    stage: int
    overlap: bool
    master_weights: bool
    check_replicas_every: int | None
    timeout: float | None

    def __post_init__(self) -> None:
        every, dtype = self.check_replicas_every, self.reduce_dtype
        if type(self.stage) is not int or self.stage not in (1, 2):
            raise checks.refused("stage", self.stage, "1 or 2; for sharded parameters use FSDP2")
        if self.bucket_cap_mb is not None:
            wanted = "a number > 0, or None"
            checks.number("bucket_cap_mb", self.bucket_cap_mb, wanted, most=math.inf, above=True)
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        ):
            wanted = "a floating-point dtype of 16 bits or more, or None"
            raise checks.refused("reduce_dtype", dtype, wanted)
        checks.switch("overlap", self.overlap)
        checks.switch("master_weights", self.master_weights)
        if every is not None:
            checks.whole("check_replicas_every", every, "a number of steps > 0, or None", 1)
        if self.timeout is not None:
            wanted = f"seconds > 0, at most {checks.LONGEST_WAIT:g}, or None"
            checks.number("timeout", self.timeout, wanted, most=checks.LONGEST_WAIT, above=True)

    def shared(self) -> str:
        """Those that must be the same on all ranks, as text."""
        names = ("bucket_cap_mb", "reduce_dtype", "stage", "overlap", "master_weights")
        return ", ".join(f"{n}={getattr(self, n)}" for n in (*names, "check_replicas_every"))


def check_same_parameters(
    groups: Sequence[dict[str, Any]],
    settings: Settings,
    sharing: Sharing,
    device: torch.device | None = None,
) -> None:
    """Compare names, shapes, dtypes and groups of the parameters, and the settings. Collective.

    Args:
        groups: with their parameters as (fqn, tensor) pairs.
        device: to compare on; None: that of the first parameter.

    Raises:
        ValueError: on all ranks, naming the first that differs.
    """
    if sharing.holders is None:
        return
    named = [(i, fqn, p) for i, group in enumerate(groups) for fqn, p in group["params"]]
    specs = [[fqn, list(p.shape), str(p.dtype), i] for i, fqn, p in named]
    device = device or named[0][2].device
    comm.check_equal("parameter", [settings.shared(), *specs], sharing.holders, device)


def check_same_settings(
    settings: Callable[[], list[str]], sharing: Sharing, device: torch.device
) -> None:
    """Compare what the inner optimizer was told: ranks with other weights or hyperparameters would
    not fail, they would drift apart. Collective.

    Args:
        settings: asked only where there is somebody to compare with.

    Raises:
        ValueError: on all ranks, naming the first that differs.
    """
    if sharing.holders is not None:
        comm.check_equal("setting", settings(), sharing.holders, device)


def check_same_state(
    entries: Sequence[tuple[str, Tensor | None]], sharing: Sharing, num_steps: int
) -> None:
    """Compare replicated state bit by bit. Collective.

    Args:
        entries: what each is called, and its tensor; None where this rank keeps none.
        num_steps: how many steps were taken, for the error.

    Raises:
        RuntimeError: on all ranks, naming what differs.
    """
    if sharing.holders is None or not entries:
        return
    different = comm.differing(comm.checksums([tensor for _, tensor in entries]), sharing.holders)
    if different:
        raise RuntimeError(
            f"replicated state differs between ranks after {num_steps} steps: "
            f"{', '.join(entries[i][0] for i in different[:5])}; some rank computes differently "
            "(hardware fault, another library): go back to the last checkpoint"
        )


def raise_alike(
    problem: Exception | None,
    sharing: Sharing,
    device: torch.device,
    timeout: float | None,
    further: Tensor | None,
) -> None:
    """Raise `problem` here and a PeerError on the ranks that have none; waits for the device.
    Collective.

    Args:
        further: float64 (n,), added over the ranks with it (modified in place).
    """
    if sharing.holders is None:
        if problem is not None:
            raise problem
        return
    failed = torch.tensor([float(problem is not None)], dtype=torch.float64, device=device)
    if further is not None:
        failed = torch.cat([failed, further])
    pending = comm.all_reduce(failed, sharing.holders, "the agreement on a step", timeout)
    with trace.phase("sums: wait"):
        pending.wait()
    if further is not None:
        further.copy_(failed[1:])
    if problem is not None:
        raise problem
    if float(failed[0]):
        raise comm.PeerError
