"""A model and its optimizer on the ranks of a benchmark, by the name of a layout; trains, measures
nothing itself.

Layouts are those of launch/gpt2.py (`--parallel`) and, beside them: "plain", one process; "torch
zero", DDP with torch's ZeroRedundancyOptimizer; "deepspeed1", "deepspeed2" and "deepspeed3",
DeepSpeed's stages.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# imported later it would keep the process group alive beyond its end
import torch.distributed.nn.functional
from bench_step import random_weights
from model import build
from options import parse
from parallel import spread
from presets import GPTConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import pylo_dist
from support.golden import velo_weights
from support.ranks import run_ranks

OPTIMIZERS = ("AdafacLO", "VeLO", "AdamW")
DEEPSPEED = {"deepspeed1": 1, "deepspeed2": 2, "deepspeed3": 3}
LAYOUTS = ("plain", "ddp", "zero1", "zero2", "fsdp2", "hsdp", "tp", "torch zero", *DEEPSPEED)
# for tests: the way through the code and little else
TINY = GPTConfig(vocab_size=256, block_size=64, n_layer=1, n_head=2, n_embd=32, init_std=0.05)
NUM_STEPS = 10_000  # what VeLO and Celo are told of the run


def optimizer_of(name: str) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of an optimizer. What weights know costs no time: VeLO's are those of the
    golden files, Celo's random in the released sizes.
    """
    return {
        "AdafacLO": (pylo_dist.AdafacLO, {"weights": "demo"}),
        "VeLO": (pylo_dist.VeLO, {"weights": velo_weights("release"), "num_steps": NUM_STEPS}),
        "Celo": (pylo_dist.Celo, {"weights": random_weights("celo"), "num_steps": NUM_STEPS}),
        "CeloAdam": (
            pylo_dist.CeloAdam,
            {"weights": random_weights("celo_adam"), "num_steps": NUM_STEPS},
        ),
        "AdamW": (torch.optim.AdamW, {"fused": True}),
    }[name]


def import_deepspeed() -> Any:
    """DeepSpeed, of which nothing is compiled at run time. Raises ImportError."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed asks for what launchers set
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % max(1, torch.cuda.device_count()))
    import deepspeed
    from deepspeed.utils import logger

    import pylo_dist.deepspeed  # noqa: F401

    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", module="deepspeed")  # it calls what newer torch deprecates
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


class Trainee:
    """A GPT and its optimizer on this rank. Every rank builds the same ones in the same order.

    Args:
        layout: one of LAYOUTS. optimizer: one of OPTIMIZERS.
        bucket_cap_mb: of gradients, where the layout has buckets.

    Attributes:
        model: what holds the parameters. optimizer: whose `step` and `zero_grad` are called
            (DeepSpeed: the engine).
    """

    def __init__(
        self,
        layout: str,
        optimizer: str,
        config: GPTConfig,
        *,
        bucket_cap_mb: float,
        device: torch.device,
    ) -> None:
        self.layout, self.name, self.config, self.device = (
            layout,
            f"{optimizer}, {layout}",
            config,
            device,
        )
        kind, arguments = optimizer_of(optimizer)
        self.learned = issubclass(kind, pylo_dist.LearnedOptimizer)
        self.model: nn.Module = build(config, 0).to(device)
        self.called: Any = self.model
        self.optimizer: Any
        if layout in DEEPSPEED:
            self._attach_deepspeed(DEEPSPEED[layout], kind, arguments, bucket_cap_mb)
        elif layout == "plain":
            self.optimizer = self.inner = kind(self.model.named_parameters(), **arguments)
        elif layout == "torch zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self.called = nn.parallel.DistributedDataParallel(
                self.model, bucket_cap_mb=bucket_cap_mb
            )
            self.optimizer = ZeroRedundancyOptimizer(self.model.parameters(), kind, **arguments)
            self.inner = self.optimizer.optim
        else:
            options = parse(["--preset", "micro", "--parallel", layout, "--qkv", config.qkv])
            if layout == "tp" and not self.learned:
                arguments = {}  # a fused step takes no DTensors beside other tensors
            if layout in ("zero1", "zero2"):
                arguments = {**arguments, "bucket_cap_mb": bucket_cap_mb}
            self.called, self.optimizer = spread(
                self.model,
                kind,
                arguments,
                lambda named: named,
                options,
                device,
                dist.get_world_size(),
            )
            self.inner = getattr(self.optimizer, "inner", self.optimizer)

    def _attach_deepspeed(
        self, stage: int, kind: Any, arguments: dict[str, Any], bucket_cap_mb: float
    ) -> None:
        deepspeed = import_deepspeed()
        params = {"torch_adam": True} if kind is torch.optim.AdamW else dict(arguments)
        # its JSON takes weights by name, not as tensors
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(params.get("weights"), dict):
                params["weights"] = f"{folder}/weights.safetensors"
                save_file(arguments["weights"], params["weights"])
            self._initialize(
                deepspeed, {"type": kind.__name__, "params": params}, stage, bucket_cap_mb
            )

    def _initialize(
        self, deepspeed: Any, optimizer: dict[str, Any], stage: int, bucket_cap_mb: float
    ) -> None:
        bucket = int(bucket_cap_mb * 2**20 / 4)  # DeepSpeed counts elements
        config = {
            "optimizer": optimizer,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            },
        }
        self.called = self.optimizer = deepspeed.initialize(
            model=self.model, model_parameters=self.model.parameters(), config=config
        )[0]
        self.inner = self.optimizer.basic_optimizer

    # ------------------------------------------------------------------------------------- training

    def tokens(self, sequences: int, length: int) -> Tensor:
        """(sequences, length + 1) random tokens, others on every rank that reads data of its
        own.
        """
        other = dist.get_rank() if dist.is_initialized() and self.layout != "tp" else 0
        generator = torch.Generator().manual_seed(1 + other)
        return torch.randint(
            0, self.config.vocab_size, (sequences, length + 1), generator=generator
        ).to(self.device)

    def forward(self, idx: Tensor) -> Tensor:
        loss: Tensor = self.called(idx[:, :-1], idx[:, 1:])[1]
        return loss

    def backward(self, loss: Tensor) -> None:
        if self.layout in DEEPSPEED:
            self.optimizer.backward(loss)
        else:
            loss.backward()

    def step(self, loss: Tensor) -> None:
        """Move the parameters and let go of the gradients."""
        if self.layout in DEEPSPEED:
            self.optimizer.step()
            return
        if self.learned:
            self.optimizer.step(loss=loss)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, idx: Tensor) -> Tensor:
        """One step on `idx`; its loss."""
        loss = self.forward(idx)
        self.backward(loss)
        self.step(loss)
        return loss.detach()

    def parameter_bytes(self) -> int:
        """Of what this rank holds of the parameters between steps."""
        return sum(
            num_bytes(getattr(param, "ds_tensor", param)) for param in self.model.parameters()
        )

    def state_bytes(self) -> int:
        """Of what this rank holds of the optimizer's state, 0-d step counts left out."""
        if self.layout in DEEPSPEED and self.learned:
            return sum(row["state_bytes"] for row in self.inner.report())
        entries = self.inner.state.values()
        return sum(
            num_bytes(t)
            for entry in entries
            for t in entry.values()
            if isinstance(t, Tensor) and t.dim()
        )

    def settle(self) -> None:
        """Until all parameters are there."""
        if self.layout in ("zero1", "zero2"):
            self.model.state_dict()


def num_bytes(tensor: Tensor) -> int:
    """Of a tensor, or of this rank's part of a DTensor."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def device_of(rank: int) -> torch.device:
    """Where this rank trains; a GPU of its own where there are some."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def on_ranks(
    worlds: Sequence[int], measure: Callable[..., Any], *args: Any
) -> Iterator[tuple[int, list[Any]]]:
    """(ranks, what `measure(rank, ranks, *args)` returned on each): gloo processes of our own, or
    torchrun's ranks.

    Under torchrun `worlds` is not read, and ranks other than the first get nothing: NCCL where each
        has a GPU, else gloo.
    """
    if "RANK" not in os.environ:
        for world in worlds:
            yield world, run_ranks(world, measure, *args)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    nccl = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ.get("LOCAL_WORLD_SIZE", world)
    )
    dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(minutes=10))
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, measure(rank, world, *args))
    dist.destroy_process_group()
    if rank == 0:
        yield world, gathered


class Stopwatch:
    """Seconds since `start` on a device: wall clock, and on a CPU this process's CPU time beside
    it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: Any = None

    def start(self) -> None:
        if self._cuda:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        else:
            self._begin = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        """(wall, CPU) seconds; of a GPU twice those between device events."""
        if not self._cuda:
            wall, cpu = self._begin
            return time.perf_counter() - wall, time.process_time() - cpu
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        seconds = 1e-3 * self._begin.elapsed_time(end)
        return seconds, seconds
