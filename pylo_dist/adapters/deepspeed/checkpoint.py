"""DeepSpeed's checkpoint files on any number of ranks and in any layout. Reads the files; writes
the engine it is given.

engine.save_checkpoint writes one file per rank with flat float32 tensors and, from
`DeepSpeedOptimizer.state_dict`, where each parameter lies in them. So any rank can take its
elements out of all the files; they are mapped, not read, into memory. Nothing in them is run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import comm
from ...core.shards import TensorShard
from ...optimizer.schedules import check_scheduler_state
from ...optimizer.sharded_state import ShardedState, copy_elements
from .optimizer import STATE_KEY, DeepSpeedOptimizer

# what DeepSpeed's model file holds beside what the user gave to save_checkpoint
_OWN_KEYS = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
    *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
    *("dp_world_size", "mp_world_size", "ds_config", "ds_version"),
    "checkpoint_parallel_dimensions",
)


class _StandIn:
    """What a file says of an object of DeepSpeed's; never the object."""

    def __init__(self, *args: Any) -> None:
        pass


class _StaticScaler(_StandIn):
    pass


class _DynamicScaler(_StandIn):
    pass


def _named(kind: Any, name: str) -> _StandIn:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle a member of an enum."""
    return _StandIn()


_SCALERS = {"LossScaler": _StaticScaler, "DynamicLossScaler": _DynamicScaler}
# the classes that DeepSpeed's own entries are of
_STAND_INS: list[Any] = [
    *((kind, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name, kind in _SCALERS.items()),
    (_StandIn, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_named, "builtins.getattr"),
]


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank's file has of a parameter: float32 values (N,) from element `start` on, and its
    entries of state.
    """

    start: int
    values: Tensor
    state: dict[str, Any]


class DeepSpeedFiles:
    """A checkpoint written by engine.save_checkpoint with one of our optimizers.

    Args:
        folder: what save_checkpoint was given.
        tag: the subfolder; None: the one that the file `latest` names.

    Attributes:
        path: folder / tag.
        model: the model file's entries.
        groups: the inner optimizer's parameter groups.
        shapes: per fqn, in the optimizer's order.
        parts: per fqn, over the ranks.

    Raises:
        ValueError: files that are missing, damaged, or of another optimizer.
    """

    def __init__(self, folder: str | Path, tag: str | None = None) -> None:
        with _as_value_error(folder):
            self._read(Path(folder), tag)

    def _read(self, folder: Path, tag: str | None) -> None:
        if tag is None:
            latest = folder / "latest"
            if not latest.is_file():
                raise ValueError(
                    f"{latest} is missing: pass tag=..., the name of the subfolder that "
                    "save_checkpoint wrote"
                )
            tag = latest.read_text().strip()
            if Path(tag).name != tag:
                raise ValueError(f"{latest} holds {tag!r:.80}, wanted the name of a subfolder")
        self.path = folder / tag
        if (self.path / "zero").is_dir():
            raise ValueError(
                f"{self.path} was written by DeepSpeed's ds_to_universal, which leaves the "
                "state of learned optimizers out: load what save_checkpoint wrote, which "
                "needs no conversion for another number of ranks or stage"
            )
        models = [
            *self.path.glob("mp_rank_*_model_states.pt"),
            *sorted(self.path.glob("zero_pp_rank_*_model_states.pt"), key=_rank),
        ]
        if not models:
            raise ValueError(
                f"{self.path} has no *_model_states.pt: it is no checkpoint of DeepSpeed"
            )
        if any(f"mp_rank_{i:02d}" in path.name for path in models for i in range(1, 100)):
            raise ValueError(f"{self.path} was saved with model parallelism, which is not served")
        self._models = [_open(path) for path in models]
        self.model: dict[str, Any] = self._models[0]
        optimizers = sorted(self.path.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
        self.states = [_open(path)["optimizer_state_dict"] for path in optimizers] or [
            self.model["optimizer"]
        ]
        held = [_held(state, self.path) for state in self.states]
        ranks = held[0]["layout"]["ranks"]
        if optimizers and held[0]["layout"]["kind"] != "whole" and len(held) != ranks:
            raise ValueError(f"{self.path} has files of {len(held)} ranks, it was saved by {ranks}")
        self.groups: list[dict[str, Any]] = held[0]["optimizer"]["param_groups"]
        self.shapes = {fqn: tuple(shape) for fqn, shape, *_ in held[0]["layout"]["pieces"]}
        self.parts: dict[str, list[Part]] = {fqn: [] for fqn in self.shapes}
        for state, entry in zip(self.states, held, strict=True):
            flats = [*_flats(state)]
            for i, place in enumerate(entry["layout"]["pieces"]):
                if len(place) != 6:
                    raise TypeError(f"place {i} of a tensor is {place!r:.80}")
                fqn, _, start, numel, number, offset = place
                if number < 0:
                    values = (flats[i] if flats else self.model["module"][fqn]).reshape(-1)
                else:
                    values = flats[number].reshape(-1)[offset : offset + numel]
                self.parts[fqn].append(Part(start, values, entry["optimizer"]["state"].get(i, {})))

    def values(self, fqn: str, start: int, numel: int) -> Tensor:
        """Elements of a trained parameter in float32, (numel,)."""
        return _gather([(part.start, part.values) for part in self.parts[fqn]], start, numel, fqn)

    def state_of(self, fqn: str, shard: TensorShard) -> dict[str, Tensor]:
        """The state of a parameter as LearnedOptimizer.load_state_dict takes it, with the elements
        of `shard`.
        """
        parts = self.parts[fqn]
        state: dict[str, Tensor] = {}
        for name, first in parts[0].state.items():
            if isinstance(first, dict) and "shape" in first:  # of the first rank that keeps it
                kept = (part.state[name]["local"] for part in parts)
                whole = next(local for local in kept if local.numel())
                state[name] = whole.view((*first["copies"], *first["shape"]))
            elif isinstance(first, dict):
                pieces = [(part.start, part.state[name]["local"]) for part in parts]
                copies = tuple(first["copies"])
                state[name] = ShardedState(
                    _gather(pieces, shard.start, shard.numel, fqn), copies, shard
                )
            else:
                state[name] = first
        return state

    def untrained(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers and frozen parameters, whole."""
        module = self.model["module"]
        fragments = [model.get("frozen_param_fragments") or {} for model in self._models]
        shapes = self.model.get("frozen_param_shapes") or {}
        for name in self.model["buffer_names"] or ():
            yield name, module[name]
        trained = set(self.shapes)
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            if name not in trained:
                whole = torch.cat([f[name].reshape(-1) for f in fragments])[:numel]
                yield name, whole.view(torch.Size(shape))
        for name, value in module.items():
            known = name in shapes or name in trained or name in (self.model["buffer_names"] or ())
            if not known and isinstance(value, Tensor) and value.numel():
                yield name, value


def _open(path: Path) -> dict[str, Any]:
    """A file's entries, mapped into memory. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            entries = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        known = {name for _, name in _STAND_INS}
        names = {*torch.serialization.get_unsafe_globals_in_checkpoint(path)} - known
        what = (
            f"names {', '.join(sorted(names))}, which is never run; keep such things out of "
            "client_state, or, if you trust whoever wrote the file, name the classes to "
            "torch.serialization.add_safe_globals"
            if names
            else f"cannot be read ({error})"
        )
        raise ValueError(f"{path} {what}") from error
    # of zip files and pickles there is nothing that damaged ones do not raise
    except Exception as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds {type(entries).__name__}, wanted what DeepSpeed saves")
    return entries


@contextmanager
def _as_value_error(folder: str | Path) -> Iterator[None]:
    """Around what reads entries, which may all be missing or of another kind."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{folder}: a file was not written by DeepSpeed with this optimizer: "
            f"{type(error).__name__}: {error}"
        ) from error


def _rank(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found.group(1)) if found else 0


def _held(state: dict[str, Any], path: Path) -> dict[str, Any]:
    for candidate in (state, state.get("base_optimizer_state"), state.get("optimizer_state_dict")):
        if isinstance(candidate, dict) and STATE_KEY in candidate:
            found: dict[str, Any] = candidate[STATE_KEY]
            return found
    raise ValueError(f"{path}: its optimizer state was not saved by an optimizer of pylo_dist")


def _flats(state: dict[str, Any]) -> Iterator[Tensor]:
    """The float32 tensors of a rank: flat partitions (stages 1 to 3), or one per parameter; none in
    stage 0 in float32.
    """
    for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        if key in state:
            yield from state[key]
            return
    for group in state.get("fp32_groups", ()):
        yield from group


def _gather(pieces: list[tuple[int, Tensor]], start: int, numel: int, fqn: str) -> Tensor:
    """Elements start .. start + numel of a tensor of which `pieces` are (first element, (..., n)),
    new memory (..., numel).
    """
    check_covered(pieces, start, numel, fqn)
    result = pieces[0][1].new_empty((*pieces[0][1].shape[:-1], numel))
    end = start
    for first, piece in sorted(pieces, key=lambda pair: pair[0]):
        low, high = max(end, first), min(start + numel, first + piece.shape[-1])
        if low < high:
            result[..., low - start : high - start] = piece[..., low - first : high - first]
            end = high
    return result


def check_covered(pieces: list[tuple[int, Tensor]], start: int, numel: int, fqn: str) -> None:
    """Raise ValueError where `pieces`, as of `_gather`, leave an element out or differ in kind."""
    end = start
    for first, piece in sorted(pieces, key=lambda pair: pair[0]):
        if (piece.dtype, piece.shape[:-1]) != (pieces[0][1].dtype, pieces[0][1].shape[:-1]):
            raise ValueError(f"{fqn!r}: the files hold pieces of different kinds")
        if first <= end:
            end = max(end, min(start + numel, first + piece.shape[-1]))
    if end < start + numel:
        raise ValueError(
            f"{fqn!r}: the files hold {end - start} of the {numel} elements from {start} on"
        )


@comm.during("the loading of a checkpoint")
def load_checkpoint(
    engine: Any,
    load_dir: str | Path,
    tag: str | None = None,
    *,
    load_lr_scheduler_states: bool = True,
) -> tuple[str, dict[str, Any]]:
    """Load what engine.save_checkpoint wrote on any number of ranks, in any stage. All ranks call
    it alike.

    Model, optimizer, scheduler and the engine's counters are restored as engine.load_checkpoint
    does.

    Returns:
        The path of the checkpoint, and the client_state of save_checkpoint.

    Raises:
        ValueError: no such checkpoint, or one of another model, optimizer or weights; on all ranks,
            and nothing has changed.
    """
    held: DeepSpeedOptimizer = engine.basic_optimizer
    group = comm.default_group()

    def read() -> tuple[DeepSpeedFiles, dict[str, Any]]:
        files = DeepSpeedFiles(load_dir, tag)
        with _as_value_error(files.path):
            state = _state_for(held, files)
            held.inner.check_state_dict(state)
            # all that is written below, before any of it is
            for _ in _untrained_pairs(engine, files.untrained()):
                pass
            _check_counters(files)
            if scheduled(files):
                _check_scheduler(files, engine.lr_scheduler)
        return files, state

    def scheduled(files: DeepSpeedFiles) -> bool:
        saved = files.model.get("lr_scheduler")
        return load_lr_scheduler_states and engine.lr_scheduler is not None and saved is not None

    files, state = comm.together(read, group, ValueError)
    held.inner.load_state_dict(state)
    _write_parameters(engine, files)
    _write_untrained(engine, files.untrained())
    model = files.model
    if scheduled(files):
        engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = model["global_steps"], model["skipped_steps"]
    engine.global_samples = model.get(
        "global_samples", engine.global_steps * engine.train_batch_size()
    )
    _load_scaler(engine, files.states[0].get("loss_scaler"))
    return str(files.path), {key: value for key, value in model.items() if key not in _OWN_KEYS}


def _check_counters(files: DeepSpeedFiles) -> None:
    for key in ("global_steps", "skipped_steps", "global_samples"):
        value = files.model.get(key, 0 if key == "global_samples" else None)
        if type(value) is not int or value < 0:
            raise ValueError(f"{files.path}: {key!r} is {value!r:.80}, wanted a count")


def _check_scheduler(files: DeepSpeedFiles, scheduler: Any) -> None:
    try:
        check_scheduler_state(scheduler, scheduler.state_dict(), files.model["lr_scheduler"])
    except ValueError as error:
        raise ValueError(f"{files.path}: the saved lr_scheduler: {error}") from None


def _load_scaler(engine: Any, saved: Any) -> None:
    """The numbers of a loss scaler of the same kind; one of another kind belongs to another
    precision, and the engine keeps its own.
    """
    own = getattr(engine.optimizer, "loss_scaler", None)
    if saved is not None and type(saved) is _SCALERS.get(type(own).__name__):
        for key, value in vars(saved).items():
            if isinstance(value, (int, float)) and isinstance(vars(own).get(key), (int, float)):
                setattr(own, key, value)


def _state_for(held: DeepSpeedOptimizer, files: DeepSpeedFiles) -> dict[str, Any]:
    """The state dict that the inner optimizer of this rank loads."""
    own = held.inner.state_dict()["param_groups"]
    mine = [name for group in own for name in group["param_names"]]
    if set(mine) != set(files.shapes) or len(own) != len(files.groups):
        odd = sorted(set(mine) ^ set(files.shapes))[:5]
        raise ValueError(
            f"{files.path} holds {len(files.shapes)} parameters in {len(files.groups)} groups, the "
            f"engine trains {len(mine)} in {len(own)}; only one of them knows {odd}"
        )
    groups = [
        {**saved, "params": group["params"], "param_names": group["param_names"]}
        for saved, group in zip(files.groups, own, strict=True)
    ]
    indices = {
        name: i
        for group in own
        for name, i in zip(group["param_names"], group["params"], strict=True)
    }
    state = {}
    for shard, _ in _own_parts(held):
        if shard.shape != files.shapes[shard.fqn]:
            raise ValueError(
                f"{shard.fqn!r} has shape {shard.shape}, in {files.path} {files.shapes[shard.fqn]}"
            )
        parts = [(part.start, part.values) for part in files.parts[shard.fqn]]
        check_covered(parts, shard.start, shard.numel, shard.fqn)
        state[indices[shard.fqn]] = files.state_of(shard.fqn, shard)
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def _write_parameters(engine: Any, files: DeepSpeedFiles) -> None:
    """Trained parameters: the float32 tensors first, then DeepSpeed's copies of them."""
    for shard, piece in _own_parts(engine.basic_optimizer):
        piece.copy_(files.values(shard.fqn, shard.start, shard.numel).view(piece.shape))
    publish_parameters(engine)


def _own_parts(held: DeepSpeedOptimizer) -> Iterator[tuple[TensorShard, Tensor]]:
    """This rank's elements of every trained parameter, float32: which they are, and the tensor
    DeepSpeed keeps them in.
    """
    for source in held.layout.sources:
        source.follow()
    for _, _, member in held.layout.members():
        yield member.shard, member.piece.detach()


@torch.no_grad()
def publish_parameters(engine: Any) -> None:
    """Bring the float32 tensors to the model's parameters on all ranks. All ranks call it alike."""
    held: DeepSpeedOptimizer = engine.basic_optimizer
    wrapper = engine.optimizer
    if held.layout.kind == "flat":
        wrapper.update_lp_params()
    elif held.layout.kind == "split":
        wrapper.checkpoint_event_prologue()
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        for source in held.layout.sources:
            assert source.publish is not None
            source.publish()
        wrapper.checkpoint_event_epilogue()
    else:
        for _, _, member in held.layout.members():
            if member.param is not member.piece:
                member.param.copy_(member.piece)


@torch.no_grad()
def _write_untrained(engine: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Buffers and frozen parameters; names of trained ones, which may be tied, are passed over."""
    layout = engine.basic_optimizer.layout
    for target, value in _untrained_pairs(engine, values):
        if isinstance(value, ShardedState):
            target.ds_tensor.view(-1)[: value.local.numel()].copy_(value.local)  # type: ignore[attr-defined]
        elif hasattr(target, "ds_tensor"):  # stage 3: this rank's part of a frozen parameter
            part = target.ds_tensor
            mine = value.reshape(-1)[layout.rank * part.numel() :][: part.numel()]
            part.view(-1)[: mine.numel()].copy_(mine)
        else:
            target.copy_(value)


def _untrained_pairs(
    engine: Any, values: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What of the engine's is written, and with what. Raises ValueError for another shape."""
    module, layout = engine.module, engine.basic_optimizer.layout
    targets: dict[str, Tensor] = {
        **dict(module.named_buffers()),
        **dict(module.named_parameters(remove_duplicate=False)),
    }
    trained = {id(member.param) for _, _, member in layout.members()}
    for name, value in values:
        target = targets.get(name)
        if target is None or id(target) in trained:
            continue
        wanted = tuple(getattr(target, "ds_shape", target.shape))
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            found = getattr(value, "shape", type(value).__name__)
            raise ValueError(f"{name!r} has shape {wanted}, in the checkpoint {found}")
        yield target, value


# ------------------------------------------------------------------------------ the canonical state


def read_checkpoint(load_dir: str | Path, tag: str | None = None) -> dict[str, Any]:
    """What engine.save_checkpoint wrote, whole, for runs without DeepSpeed (which must be installed
    all the same).

    Returns:
        "model": a state_dict for the model. "optimizer": one for the same optimizer in any layout.
        "masters": the trained parameters in float32, by name. "meta": global_steps and what else
        DeepSpeed counted.

    Raises:
        ValueError: no such checkpoint, or one that is damaged or of another optimizer.
    """
    files = DeepSpeedFiles(load_dir, tag)
    with _as_value_error(files.path):
        return _whole(files)


def _whole(files: DeepSpeedFiles) -> dict[str, Any]:
    masters = {
        fqn: files.values(fqn, 0, torch.Size(shape).numel()).view(shape)
        for fqn, shape in files.shapes.items()
    }
    module, shared = files.model["module"], dict(files.model.get("shared_params") or {})
    untrained = dict(files.untrained())
    model = {}
    for name, value in module.items():
        source = shared.get(name, name)
        model[name] = (
            masters[source].to(value.dtype)
            if source in masters
            else untrained.get(source, value).clone()
        )
    names = {
        i: fqn
        for group in files.groups
        for fqn, i in zip(group["param_names"], group["params"], strict=True)
    }
    state = {}
    for i, fqn in names.items():
        whole = TensorShard.whole(fqn, files.shapes[fqn])
        state[i] = {
            name: t.local.view((*t.copies, *whole.shape))
            if isinstance(t, ShardedState)
            else t.clone()
            for name, t in files.state_of(fqn, whole).items()
        }
    meta = {
        key: files.model[key]
        for key in ("global_steps", "global_samples", "skipped_steps")
        if key in files.model
    }
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": files.groups},
        "masters": masters,
        "meta": meta,
    }


def _take(value: Tensor, shard: TensorShard, piece: Tensor) -> None:
    """piece <- the elements of `shard`, whatever the layout and dtype of `value` (`piece` is
    modified in place).
    """
    local = piece.new_empty(shard.numel)
    copy_elements(value, ShardedState(local, (), shard))
    piece.copy_(local.view(piece.shape))


def states(engine: Any) -> dict[str, Any]:
    """The engine's model and optimizer for `pylo_dist.checkpoint.save` and `load`, whose folders
    every layout reads.

    Where the model is not float32 there is a third entry, "masters": its trained parameters in
    float32.
    """
    held: DeepSpeedOptimizer = engine.basic_optimizer
    found: dict[str, Any] = {"model": EngineModel(engine), "optimizer": held.inner}
    if any(member.param.dtype != member.piece.dtype for _, _, member in held.layout.members()):
        found["masters"] = EngineMasters(engine)
    return found


class EngineMasters:
    """The trained parameters of an engine in float32, sharded as DeepSpeed has them, by name."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of the parameters' own shapes; no collective."""
        whole = self._engine.basic_optimizer.layout.kind == "whole"
        parts = _own_parts(self._engine.basic_optimizer)
        return {
            shard.fqn: piece if whole else ShardedState(piece, (), shard) for shard, piece in parts
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's elements, and bring them to the model's parameters; all ranks alike."""
        for shard, piece in _own_parts(self._engine.basic_optimizer):
            _take(state[shard.fqn], shard, piece)
        publish_parameters(self._engine)


class EngineModel:
    """The module of an engine with the keys of its own state_dict; what stage 3 has sharded is
    sharded here too.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of the parameters' own shapes and dtypes; no collective."""
        module, layout = self._engine.module, self._engine.basic_optimizer.layout
        state: dict[str, Tensor] = dict(module.state_dict())
        if layout.kind != "split":
            return state
        pieces = {
            shard.fqn: (shard, piece) for shard, piece in _own_parts(self._engine.basic_optimizer)
        }
        names = {id(member.param): member.fqn for _, _, member in layout.members()}
        for name, param in module.named_parameters(remove_duplicate=False):
            if name not in state:
                continue
            if id(param) in names:
                shard, piece = pieces[names[id(param)]]
                local = piece.to(param.dtype)
            else:
                part, numel = param.ds_tensor, int(param.ds_numel)
                low, high = (
                    min(rank * part.numel(), numel) for rank in (layout.rank, layout.rank + 1)
                )
                shard, local = (
                    TensorShard.interval(name, tuple(param.ds_shape), low, high),
                    part.view(-1)[: high - low],
                )
            state[name] = ShardedState(local, (), shard)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's elements; alike on all ranks."""
        for shard, piece in _own_parts(self._engine.basic_optimizer):
            _take(state[shard.fqn], shard, piece)
        publish_parameters(self._engine)
        _write_untrained(self._engine, iter(state.items()))
