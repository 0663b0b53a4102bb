"""gpt2.py under DeepSpeed: `--deepspeed FILE`. The JSON says how to shard, the flags say what to
train.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import texts
import torch
import torch.distributed as dist
from model import GPT, build
from options import Options, WrongInput
from torch import Tensor

# What the flags decide; in the JSON it would say the same thing twice.
FLAGS = {
    "optimizer": "--optimizer and its flags",
    "scheduler": "--schedule and --warmup",
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--batch-size and --micro-batch-size",
    "gradient_clipping": "--max-grad-norm",
}


def read(path: Path) -> dict[str, Any]:
    """The JSON of --deepspeed. Raises WrongInput."""
    try:
        config = texts.read_json(path)
    except (OSError, ValueError) as error:
        raise WrongInput(f"--deepspeed {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise WrongInput(f"--deepspeed {path}: wanted a JSON object.")
    for key, flags in FLAGS.items():
        if key in config:
            raise WrongInput(
                f'--deepspeed {path} holds "{key}", which follows from {flags}; drop it there.'
            )
    return config


def package() -> Any:
    """DeepSpeed, which pylo_dist.deepspeed keeps from compiling. Raises WrongInput where one of
    the two is missing or too old.
    """
    try:
        import deepspeed

        import pylo_dist.deepspeed  # noqa: F401
    except ImportError as error:
        raise WrongInput(
            f"--deepspeed: {error}; install it: launch/setup.sh launch,deepspeed"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # names it calls, by the thousand
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


class DeepSpeedLearner:
    """As learner.Learner, with the model and its optimizer in a DeepSpeed engine."""

    def __init__(self, options: Options, place: Any, accumulation: int, micro_batch: int) -> None:
        """Raises WrongInput for a JSON, arguments or weights that are refused."""
        assert options.deepspeed is not None
        place.together(package)
        config = place.together(lambda: read(options.deepspeed))  # type: ignore[arg-type]
        import pylo_dist.deepspeed

        self._nonfinite = pylo_dist.NonFiniteGradientError
        self._package = pylo_dist.deepspeed
        if not dist.is_initialized():  # DeepSpeed wants a process group, also of one
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if place.device.type == "cuda":
            # from which DeepSpeed takes its device
            os.environ["LOCAL_RANK"] = str(place.device.index)
        os.environ.setdefault("LOCAL_RANK", "0")
        model = build(options.config(), options.seed).to(place.device)
        arguments = options.learned_arguments()
        for key in ("max_grad_norm", "clip_grad", "clip_norm"):
            arguments.pop(key, None)
        if "width_mults" in arguments:
            arguments["width_mults"] = model.width_mults()
        config |= {
            "optimizer": {"type": options.chosen().entry.deepspeed, "params": arguments},
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": options.clip_norm() or 0.0,
            "steps_per_print": None,
        }
        try:
            self.engine, *_ = pylo_dist.deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=config
            )
        except ValueError as error:  # on all ranks
            raise WrongInput(f"--deepspeed {options.deepspeed}: {error}") from None
        self.model: GPT = self.engine.module
        self.optimizer = self.engine.basic_optimizer
        self.weights = {"name": self.optimizer.weights.name, "hash": self.optimizer.weights.digest}
        self._stage = self.engine.zero_optimization_stage()
        self._accumulation, self._micro, self._device = accumulation, 0, place.device

    def loss(self, windows: np.ndarray) -> Tensor:
        """Mean loss of windows (n, tokens + 1)."""
        tokens = torch.from_numpy(windows).to(self._device)
        forward = self.engine if torch.is_grad_enabled() else self.engine.module
        loss: Tensor = forward(tokens[:, :-1], tokens[:, 1:])[1]
        return loss.float()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """DeepSpeed counts the micro-batches by itself."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch's share of the loss of a step."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self._micro += 1
        if self._micro < self._accumulation:
            self.engine.step()  # DeepSpeed counts micro-batches by it

    def step(self, loss: Tensor) -> None:
        """Update the parameters; the engine has seen the loss. Raises FloatingPointError for
        gradients that are no numbers.
        """
        self._micro = 0
        try:
            self.engine.step()
        except self._nonfinite as error:
            raise FloatingPointError(str(error)) from None

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        found: dict[str, Any] = self._package.states(self.engine)
        return found

    def num_parameters(self) -> int:
        """Elements of the model, each counted once."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())

    def whole_model(self, options: Options) -> GPT:
        """The model on this rank with all its parameters; call it on all ranks."""
        if self._stage < 3:
            return self.model
        import deepspeed

        named = dict(self.model.named_parameters())
        whole = build(options.config(), options.seed).to(self._device)
        with deepspeed.zero.GatheredParameters(list(named.values())), torch.no_grad():
            for name, param in whole.named_parameters():
                param.copy_(named[name])
        return whole
