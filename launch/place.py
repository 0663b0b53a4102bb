"""Where this rank stands: its number among the others, its device, and what ranks tell each other.

The launcher's own collectives are here; model and optimizer bring theirs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import environment
import torch
import torch.distributed as dist
from environment import Environment
from options import Options, WrongInput
from torch import Tensor

from pylo_dist.comm import GRACE, within

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """This rank among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def find(cls, options: Options, found: Environment | None = None) -> Place:
        """The place that a launcher gave. Raises WrongInput."""
        found = environment.find() if found is None else found
        has_cuda = torch.cuda.is_available()
        if options.device == "cpu" or (options.device == "auto" and not has_cuda):
            return cls(found.rank, found.world_size, torch.device("cpu"))
        if not has_cuda:
            raise WrongInput("--device cuda, but PyTorch sees no CUDA device; use --device cpu.")
        count = torch.cuda.device_count()
        # each rank may see another, as by srun --gpus-per-task=1
        own = count == 1 and found.launcher not in environment.SHARING
        if found.local_size is not None and found.local_size > count and not own:
            raise WrongInput(
                f"{found.local_size} ranks on a machine with {count} CUDA device(s); start {count} "
                "there, or use --device cpu."
            )
        index = found.rank if found.local_rank is None else found.local_rank
        return cls(found.rank, found.world_size, torch.device("cuda", index % count))

    def join(self, timeout_s: int) -> None:
        """Meet the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            limit = timedelta(seconds=timeout_s)
            within(timeout_s + GRACE, lambda: self._meet(backend, limit))

    def _meet(self, backend: str, limit: timedelta) -> None:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        store, *_ = next(dist.rendezvous("env://", **ranks, timeout=limit))
        store = dist.PrefixStore(f"attempt {environment.attempt()}", store)
        dist.init_process_group(backend, store=store, timeout=limit, **ranks)

    def leave(self) -> None:
        """Part from the other ranks, once nothing of the run is held by name any more."""
        if self.world_size > 1:
            # a hook and its optimizer hold each other, and so the group
            gc.collect()
            dist.destroy_process_group()

    def together(self, work: Callable[[], T]) -> T:
        """`work()` of this rank, which calls no collective. A ValueError or OSError on any rank is
        WrongInput on all.
        """
        problem, result = None, None
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = " ".join(str(error).split())
        problems = [problem]
        if self.world_size > 1:
            problems *= self.world_size
            dist.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise WrongInput(found)
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, on all ranks. A ValueError or OSError there is WrongInput on all."""
        results = [self.together(work if self.rank == 0 else lambda: None)]
        if self.world_size > 1:
            dist.broadcast_object_list(results, src=0)
        return results[0]  # type: ignore[return-value]

    def agree(self, values: dict[str, Any]) -> None:
        """Raise WrongInput, on all ranks, where a rank has others than rank 0 has."""
        if self.world_size > 1:
            found: list[Any] = [None] * self.world_size
            dist.all_gather_object(found, values)
            for rank, theirs in enumerate(found):
                for name, value in theirs.items():
                    if value != found[0][name]:
                        raise WrongInput(
                            f"{name} of rank {rank}: {value}, of rank 0: {found[0][name]}; all "
                            "ranks need the same."
                        )

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks (`value` is modified in place)."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value
