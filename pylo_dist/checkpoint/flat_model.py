"""A model that FSDP1 has sharded, as a checkpoint sees it: whole tensors by the names it has
without its wrappers, of which this rank holds intervals. Loading writes parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import comm
from ..layouts import fsdp1
from ..layouts.flat import pieces_of
from ..optimizer.sharded_state import ShardedState, copy_elements


class FlatModel:
    """Stands for the model where its `state_dict`, which gathers every unit, is not wanted."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @classmethod
    def of(cls, value: Any) -> Any:
        """`value` itself unless it is a model with sharded units, or with flat parameters alone."""
        if not isinstance(value, nn.Module):
            return value
        units = any(fsdp1.is_flat(p) or fsdp1.is_sharded(p) for p in value.parameters())
        return cls(value) if units else value

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name; they share the model's memory.

        Raises:
            ValueError: a module with extra state, or that is not in its shards now.
        """
        return dict(self._each())

    def _each(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._model.named_modules(remove_duplicate=False):
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise ValueError(
                    f"{prefix!r} has extra state (get_extra_state), which cannot be saved of a "
                    "model in FullyShardedDataParallel: save it as an entry of its own"
                )
            named: list[tuple[str, Tensor | None]] = [*module._parameters.items()]
            named += [
                (name, buffer)
                for name, buffer in module._buffers.items()
                if name not in module._non_persistent_buffers_set
            ]
            inside = f"{prefix}." if prefix else ""
            for name, tensor in named:
                if tensor is not None and fsdp1.is_flat(tensor):
                    pieces = dict(pieces_of(tensor))
                    places = list(pieces)
                    for tied, place in fsdp1.tied_in(fsdp1.unit_of(tensor)):
                        pieces[tied] = pieces[places[place]]
                    named += pieces.items()
                elif tensor is not None:
                    yield from self._entry(fsdp1.bare(inside + name), tensor)

    def _entry(self, fqn: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if not fsdp1.is_sharded(tensor):
            yield fqn, tensor.detach()
            return
        peers, group = fsdp1.shards_of(fqn, tensor)
        yield fqn, ShardedState(tensor.detach(), (), peers[comm.rank(group)])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over tensors of the same names and global shapes. Raises ValueError, by name, with
        nothing changed.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            names = sorted(own.keys() ^ state.keys())
            raise ValueError(
                f"{names[0]!r} is in the model or in the state, but not in both; {len(names)} such "
                "names"
            )
        for fqn, tensor in own.items():
            if tensor.shape != state[fqn].shape:
                raise ValueError(
                    f"{fqn!r} has shape {tuple(state[fqn].shape)} in the state, wanted "
                    f"{tuple(tensor.shape)}"
                )
        for fqn, tensor in own.items():
            if isinstance(tensor, ShardedState):
                copy_elements(state[fqn], tensor)
            else:
                tensor.copy_(state[fqn])
