"""DeepSpeed: `{"optimizer": {"type": "VeLO", "params": {...}}}` in its JSON. Importing this module
registers the optimizers.

    import pylo_dist.deepspeed
    engine, *_ = deepspeed.initialize(model=model, config="zero2.json")

DeepSpeed has no hook for optimizers of others, so the import touches these names of other packages
(`unregister()` takes all of it back, and `initialize()` here does without any of it):

    torch.optim                               AdafacLO, MuLO, VeLO, ELO, CELO2, ELO_CELO2: where DeepSpeed looks a "type" up
    deepspeed.runtime.zero.utils              ZERO_SUPPORTED_OPTIMIZERS: the same six classes appended
    deepspeed.runtime.engine.DeepSpeedEngine  _configure_optimizer: checks the JSON before it, calls
    `attach` after it

On an engine of its own, `attach` hooks the parameters, to know which of them have a gradient, and
for optimizers that read the loss sets `engine.backward`, which keeps the loss it is given.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapters.deepspeed.checkpoint import load_checkpoint, read_checkpoint, states
from .adapters.deepspeed.optimizer import DeepSpeedOptimizer
from .optim.adafac import AdafacLO
from .optim.celo2 import CELO2, ELO_CELO2
from .optim.elo import ELO
from .optim.mulo import MuLO
from .optim.velo import VeLO
from .optimizer import LearnedOptimizer

try:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import utils as zero_utils
except ImportError as error:
    raise ImportError(
        f"pylo_dist.deepspeed needs DeepSpeed 0.19 or newer ({error}): pip install "
        "'deepspeed>=0.19'"
    ) from error

__all__ = [
    "OPTIMIZERS",
    "attach",
    "initialize",
    "load_checkpoint",
    "read_checkpoint",
    "register",
    "states",
    "unregister",
]

if (deepspeed.__version_major__, deepspeed.__version_minor__) < (0, 19):
    raise ImportError(
        f"pylo_dist.deepspeed needs DeepSpeed 0.19 or newer, this is {deepspeed.__version__}, "
        "whose bfloat16 optimizer takes steps of its own: pip install 'deepspeed>=0.19'"
    )

FACES: tuple[type[LearnedOptimizer], ...] = (AdafacLO, MuLO, VeLO, ELO, CELO2, ELO_CELO2)
OPTIMIZERS: dict[str, type[DeepSpeedOptimizer]] = {
    face.__name__: type(
        face.__name__,
        (DeepSpeedOptimizer,),
        {"face": face, "__doc__": face.__doc__, "__module__": __name__},
    )
    for face in FACES
}

_registered: Any = None  # DeepSpeed's own _configure_optimizer while ours is in its place


def register() -> None:
    """Make the names in OPTIMIZERS known to DeepSpeed's JSON. Done by the import; again it does
    nothing.

    Raises:
        RuntimeError: torch.optim has an optimizer of one of these names already.
    """
    global _registered
    if _registered is not None:
        return
    taken = [name for name in OPTIMIZERS if hasattr(torch.optim, name)]
    if taken:
        raise RuntimeError(
            f"torch.optim has {', '.join(taken)} already; use pylo_dist.deepspeed.initialize, "
            "which needs no name"
        )
    for name, held in OPTIMIZERS.items():
        setattr(torch.optim, name, held)
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(held)
    original = DeepSpeedEngine._configure_optimizer

    @functools.wraps(original)
    def configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if isinstance(client_optimizer, LearnedOptimizer):
            name = type(client_optimizer).__name__
            raise ValueError(
                f"DeepSpeed was given a {name} that was built before it partitioned the "
                f'parameters; name it in the JSON instead: "optimizer": {{"type": "{name}", '
                '"params": {...}}'
            )
        if client_optimizer is None and self.optimizer_name() in OPTIMIZERS:
            refuse(self.config, self.module)
        original(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, DeepSpeedOptimizer):
            attach(self)

    DeepSpeedEngine._configure_optimizer = configure_optimizer
    _registered = original


def unregister() -> None:
    """Take back what `register` did; engines that exist go on."""
    global _registered
    if _registered is None:
        return
    for name, held in OPTIMIZERS.items():
        delattr(torch.optim, name)
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.remove(held)
    DeepSpeedEngine._configure_optimizer = _registered
    _registered = None


def attach(engine: Any) -> DeepSpeedOptimizer:
    """Build the learned optimizer on the engine's partitions, if that has not been done; the
    engine's basic optimizer.

    Its `report()`, `stats()`, `set_loss()` and `extend()` are what users may want of it;
    `engine.basic_optimizer` is the same object.

    Raises:
        ValueError: the engine's optimizer is none of OPTIMIZERS, or its settings cannot be served.
    """
    held = engine.basic_optimizer
    if not isinstance(held, DeepSpeedOptimizer):
        raise ValueError(
            f"the engine's optimizer is {type(held).__name__}; wanted one of "
            f"{', '.join(OPTIMIZERS)}, named in the JSON or through pylo_dist.deepspeed.initialize"
        )
    if not held.attached:
        refuse(engine.config, engine.module)
        held.attach(engine)
    return held


def initialize(args: Any = None, model: Any = None, **kwargs: Any) -> Any:
    """`deepspeed.initialize` for a JSON that names one of OPTIMIZERS, touching no other package.

    Arguments and result are those of deepspeed.initialize, without `optimizer`.

    Raises:
        ValueError: the JSON names another optimizer, or a setting that is not served.
    """
    given = [
        kwargs.pop("config", None),
        kwargs.pop("config_params", None),
        getattr(args, "deepspeed_config", None),
    ]
    config = _read(next((c for c in given if c is not None), None))
    entry = config.pop("optimizer", None) or {}
    held = OPTIMIZERS.get(entry.get("type", ""))
    if held is None or kwargs.get("optimizer") is not None:
        raise ValueError(
            f'"optimizer.type" is {entry.get("type")!r}; wanted one of {", ".join(OPTIMIZERS)}, '
            "and no other optimizer"
        )
    refuse(config, model)
    params = dict(entry.get("params") or {})
    # what DeepSpeed asks for before it takes an optimizer that it did not make
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args.deepspeed_config = None
    made = deepspeed.initialize(
        args=args, model=model, optimizer=lambda p: held(p, **params), config=config, **kwargs
    )
    attach(made[0])
    return made


def _read(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if config is None:
        raise ValueError("no DeepSpeed JSON: pass config=PATH or a dict")
    loaded: dict[str, Any] = json.loads(Path(config).read_text())
    return loaded


def refuse(config: Mapping[str, Any], module: Any) -> None:
    """Raise ValueError for what is not served, by its JSON key."""
    zero = _section(config, "zero_optimization")
    moments, params = (
        _section(zero, key, "zero_optimization.") for key in ("offload_optimizer", "offload_param")
    )
    autocast, checkpoint = (_section(config, key) for key in ("torch_autocast", "checkpoint"))
    _section(_section(config, "optimizer"), "params", "optimizer.")
    half = autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", "half")
    found = {
        "zero_optimization.offload_optimizer.device": moments.get("device") == "nvme",
        "zero_optimization.offload_optimizer.ratio": _number(moments, "ratio", 1.0) < 1.0,
        "zero_optimization.offload_optimizer.super_offload": bool(moments.get("super_offload")),
        "zero_optimization.offload_param.device": params.get("device") == "nvme",
        "zero_optimization.zero_hpz_partition_size": _number(zero, "zero_hpz_partition_size", 1)
        > 1,
        "zero_optimization.mics_shard_size": _number(zero, "mics_shard_size", -1) > 0,
        "zero_optimization.elastic_checkpoint": bool(zero.get("elastic_checkpoint")),
        "zero_optimization.zenflow": bool(zero.get("zenflow")),
        "tensor_parallel.autotp_size": _number(
            _section(config, "tensor_parallel"), "autotp_size", 0
        )
        > 1,
        "sequence_parallel_size": _number(config, "sequence_parallel_size", 1) > 1,
        "checkpoint.load_universal": bool(checkpoint.get("load_universal")),
        # its GradScaler judges a step flat tensor by flat tensor
        "torch_autocast.dtype": bool(half),
    }
    for key, is_set in found.items():
        if is_set:
            value: Any = config
            for step in key.split("."):
                value = value[step]
            raise ValueError(
                f'"{key}": {value!r} is not served by pylo_dist under DeepSpeed; leave it out'
            )
    if isinstance(module, deepspeed.PipelineModule):
        raise ValueError(
            "a PipelineModule is not served by pylo_dist under DeepSpeed; use ZeRO, stages 0 to 3"
        )
    expert = _first_moe(module)
    if expert is not None:
        raise ValueError(
            f"{expert!r} is a mixture of experts, which is not served by pylo_dist under DeepSpeed"
        )


def _section(config: Mapping[str, Any], key: str, inside: str = "") -> Mapping[str, Any]:
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f'"{inside}{key}" is {section!r}; wanted an object of settings')
    return section


def _number(section: Mapping[str, Any], key: str, default: float) -> float:
    value = section.get(key)
    if value in (None, "auto"):  # which DeepSpeed and its callers fill in
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f'"{key}" is {value!r}; wanted a number') from None


def _first_moe(module: Any) -> str | None:
    from deepspeed.moe.layer import MoE

    named = module.named_modules() if hasattr(module, "named_modules") else ()
    return next((name for name, child in named if isinstance(child, MoE)), None)


register()
