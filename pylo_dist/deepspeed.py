"""DeepSpeed: `{"optimizer": {"type": "VeLO", "params": {...}}}` in its JSON, or an optimizer
object. Importing this module registers the optimizers.

    import pylo_dist.deepspeed
    engine, *_ = deepspeed.initialize(model=model, config="zero2.json")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config="zero2.json")

A "type" is the name under which an optimizer is registered with pylo_dist, also one of a user's own
(`pylo_dist.register_optimizer`), before the import or after it.

DeepSpeed has no hook for optimizers of others, so the import touches these names of other packages
(`unregister()` takes all of it back, and `initialize()` here does without any of it):

    torch.optim
        AdafacLO, MuLO, VeLO, ... : a class for each "type", where DeepSpeed looks it up
    deepspeed.runtime.zero.utils
        ZERO_SUPPORTED_OPTIMIZERS: the same classes appended
    deepspeed.runtime.engine.DeepSpeedEngine
        _is_supported_optimizer: registers what is new before an engine looks at its JSON
        _configure_optimizer: checks the JSON before it and makes of an optimizer object what the
            JSON's entry is, calls `attach` after it
    deepspeed.comm.torch
        build_shm_op: gives none, unless DeepSpeed was installed with it. On CPUs DeepSpeed compiles
            this faster all-reduce in the first run, minutes in which it says nothing, waits forever
            where an earlier build was killed, and fails without a compiler; gloo serves as well

On an engine of its own, `attach` hooks the parameters, to know which of them have a gradient, and
for optimizers that read the loss sets `engine.backward`, which keeps the loss it is given.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .adapters.deepspeed.checkpoint import load_checkpoint, read_checkpoint, states
from .adapters.deepspeed.client import become
from .adapters.deepspeed.optimizer import DeepSpeedOptimizer
from .adapters.zero import ZeroOptimizer
from .optimizer import LearnedOptimizer, registered_optimizers
from .optimizer.checks import shown
from .weights.texts import read_json

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

# by "type" in the JSON; brought up to date by `register` and `initialize`
OPTIMIZERS: dict[str, type[DeepSpeedOptimizer]] = {}

_shown: dict[str, type[DeepSpeedOptimizer]] = {}  # those that torch.optim holds now
# DeepSpeed's own functions, by where they are, while ours are in their place
_replaced: dict[tuple[Any, str], Any] = {}
# not as an attribute of deepspeed.comm, which has torch itself under this name
_backend = importlib.import_module("deepspeed.comm.torch")


def register() -> None:
    """Make the registered optimizers known to DeepSpeed's JSON. Done by the import, and whenever an
    engine looks at its JSON, for those that are new; again it does nothing.

    Raises:
        RuntimeError: DeepSpeed or torch.optim has an optimizer of one of these names already.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    _follow_registry()
    new = {name: held for name, held in OPTIMIZERS.items() if _shown.get(name) is not held}
    taken = [name for name in new if name not in _shown and hasattr(torch.optim, name)]
    if taken:
        raise RuntimeError(
            f"torch.optim has {', '.join(taken)} already; use pylo_dist.deepspeed.initialize, "
            "which needs no name"
        )
    # which DeepSpeed would build in place of ours
    taken = [name for name in new if name.lower() in DEEPSPEED_OPTIMIZERS]
    if taken:
        raise RuntimeError(
            f"DeepSpeed has {', '.join(taken)} already; register under another name "
            "(deepspeed=...), or use pylo_dist.deepspeed.initialize"
        )
    for name, held in new.items():
        _take_back(name)
        setattr(torch.optim, name, held)
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(held)
        _shown[name] = held
    if not _replaced:
        _replace(DeepSpeedEngine, "_is_supported_optimizer", _is_supported_optimizer)
        _replace(DeepSpeedEngine, "_configure_optimizer", _configure_optimizer)
        _replace(_backend, "build_shm_op", _shm_op)


def unregister() -> None:
    """Take back what `register` did; engines that exist go on."""
    for name in list(_shown):
        _take_back(name)
    while _replaced:
        (owner, name), original = _replaced.popitem()
        setattr(owner, name, original)


def _follow_registry() -> None:
    """Bring OPTIMIZERS up to date."""
    for entry in registered_optimizers().values():
        held = OPTIMIZERS.get(entry.deepspeed)
        if held is None or held.face is not entry.face:
            parts = {"face": entry.face, "__doc__": entry.face.__doc__, "__module__": __name__}
            OPTIMIZERS[entry.deepspeed] = type(entry.deepspeed, (DeepSpeedOptimizer,), parts)


def _take_back(name: str) -> None:
    held = _shown.pop(name, None)
    if held is not None:
        delattr(torch.optim, name)
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.remove(held)


def _replace(owner: Any, name: str, own: Callable[..., Any]) -> None:
    """Call `own(original, ...)` in place of a function of DeepSpeed, a method with its engine."""
    original = _replaced[owner, name] = getattr(owner, name)

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        return own(original, *args, **kwargs)

    setattr(owner, name, called)


def _shm_op(original: Callable[[], Any]) -> Any:
    from deepspeed.git_version_info import installed_ops

    return original() if installed_ops.get("deepspeed_shm_comm", False) else None


def _is_supported_optimizer(original: Callable[..., bool], engine: Any, name: str) -> bool:
    register()
    return original(engine, name)


def _configure_optimizer(
    original: Callable[..., None], engine: Any, client_optimizer: Any, model_parameters: Any
) -> None:
    client = client_optimizer
    if callable(client):
        client = client_optimizer(model_parameters)
    if client is not None:
        _check_client(client)
    if isinstance(client, LearnedOptimizer):
        register()
        refuse(engine.config, engine.module)
        become(client, _kind_of(type(client)), engine.param_names)
    elif client is None and engine.optimizer_name() in OPTIMIZERS:
        refuse(engine.config, engine.module)
    if isinstance(client, DeepSpeedOptimizer):
        # the JSON's way, on which DeepSpeed asks for no CPU optimizer of its own
        engine._configure_basic_optimizer = lambda _: client
        try:
            original(engine, None, model_parameters)
        finally:
            del engine._configure_basic_optimizer
        attach(engine)
        return
    original(engine, None if client is None else lambda _: client, model_parameters)
    if isinstance(engine.basic_optimizer, DeepSpeedOptimizer):
        attach(engine)


def _check_client(client: Any) -> None:
    """Raise ValueError for an object that would take other steps than its owner meant."""
    if isinstance(client, ZeroOptimizer):
        raise ValueError(
            "DeepSpeed was given a ZeroOptimizer, and shards parameters and state itself: give it "
            "the optimizer inside, such as AdafacLO(model.parameters(), ...)"
        )
    if isinstance(client, DeepSpeedOptimizer) and client.attached:
        raise ValueError(
            f"{client.face.__name__} belongs to another DeepSpeed engine already, whose partitions "
            "it updates: give every engine an optimizer of its own"
        )
    groups = () if isinstance(client, LearnedOptimizer) else getattr(client, "param_groups", ())
    if any("state_rule" in group for group in groups):
        raise ValueError(
            f"{type(client).__name__} was made of the parameter groups of a learned optimizer, "
            'which would not step: with "offload_optimizer" accelerate exchanges optimizers so, '
            'unless the JSON has "zero_force_ds_cpu_optimizer": false'
        )


def _kind_of(face: type[LearnedOptimizer]) -> type[DeepSpeedOptimizer]:
    for held in OPTIMIZERS.values():
        if held.face is face:
            return held
    raise ValueError(
        f"DeepSpeed was given a {face.__name__}, which is not registered: "
        "pylo_dist.register_optimizer makes it known"
    )


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
    """`deepspeed.initialize` for a JSON that names a registered optimizer, or for the object of
    one, touching no other package.

    Arguments and result are those of deepspeed.initialize.

    Raises:
        ValueError: another optimizer, two of them, or a setting that is not served.
    """
    given = [
        kwargs.pop("config", None),
        kwargs.pop("config_params", None),
        getattr(args, "deepspeed_config", None),
    ]
    config = _read(next((c for c in given if c is not None), None))
    entry = _section(config, "optimizer")
    refuse(config, model)
    config.pop("optimizer", None)
    _follow_registry()
    held = next((held for name, held in OPTIMIZERS.items() if name == entry.get("type")), None)
    client = kwargs.pop("optimizer", None)
    offered: Any = client
    if client is None and held is not None:
        offered = functools.partial(_built, held, dict(entry.get("params") or {}))
    elif entry or not isinstance(client, LearnedOptimizer):
        raise ValueError(
            f'"optimizer.type" is {shown(entry.get("type"))}; wanted one of '
            f"{', '.join(OPTIMIZERS)}, and no other optimizer, or none and a learned optimizer "
            "object"
        )
    if client is not None:
        names = {param: name for name, param in model.named_parameters()}
        become(client, _kind_of(type(client)), names)
    # what DeepSpeed asks for before it takes an optimizer that it did not make
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args.deepspeed_config = None
    made = deepspeed.initialize(args=args, model=model, optimizer=offered, config=config, **kwargs)
    attach(made[0])
    return made


def _built(
    held: type[DeepSpeedOptimizer], arguments: dict[str, Any], params: Any
) -> DeepSpeedOptimizer:
    return held(params, **arguments)


def _read(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if config is None:
        raise ValueError("no DeepSpeed JSON: pass config=PATH or a dict")
    try:
        loaded = read_json(Path(config))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"DeepSpeed JSON {config} cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"DeepSpeed JSON {config}: wanted an object")
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
            remedy = "leave it out"
            if key == "checkpoint.load_universal":
                remedy += (
                    "; pylo_dist.deepspeed.load_checkpoint(engine, folder) loads what "
                    "save_checkpoint wrote on any number of ranks and in any stage"
                )
            raise ValueError(
                f'"{key}": {value!r} is not served by pylo_dist under DeepSpeed; {remedy}'
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
        raise ValueError(f'"{inside}{key}" is {shown(section)}; wanted an object of settings')
    return section


def _number(section: Mapping[str, Any], key: str, default: float) -> float:
    value = section.get(key)
    if value is None or value == "auto":  # which DeepSpeed and its callers fill in
        return default
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'"{key}" is {shown(value)}; wanted a number') from None


def _first_moe(module: Any) -> str | None:
    from deepspeed.moe.layer import MoE

    named = module.named_modules() if hasattr(module, "named_modules") else ()
    return next((name for name, child in named if isinstance(child, MoE)), None)


register()
