"""What VeLO and Celo know of a run, and the LSTM that they read it with. Writes the entries of the
parameter groups that belong to the run.

Source: HyperV2 in google/learned_optimization (research/general_lopt/hyper_v2.py), whose loss
features and LSTM Celo (amoudgl/celo) has too.

Legend: H hidden units, I inputs, O outputs of the linear heads, R rows: one per tensor, or one for
the run; K of them computed or kept on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.rule import Batch
from . import reference

# of the run, where its tanh features switch
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
NUM_LOSS_MEANS = 10
LARGEST_MINIMUM = 999999999999.0  # what the minima begin with


def shapes(inputs: int, heads: Mapping[str, int | str]) -> dict[str, tuple[int | str, ...]]:
    """The tensors of an LSTM that reads `inputs` numbers, as an `Architecture` has them.

    Args:
        heads: the linear layers that read its hidden units, and how many numbers each gives.
    """
    mix: dict[str, tuple[int | str, ...]] = {}
    # the first is in the files, and in the reference's, but without effect
    for name in ("mix_layer1", "mix_layer2", "final_mix_layer"):
        mix |= {f"{name}.weight": ("H", inputs), f"{name}.bias": ("H",)}
    return {
        **mix,
        "lstm.linear.weight": ("4H", "2H"),
        "lstm.linear.bias": ("4H",),
        **{f"{name}.weight": (outputs, "H") for name, outputs in heads.items()},
        **{f"{name}.bias": (outputs,) for name, outputs in heads.items()},
        "lstm_init_state.0": (1, "H"),
        "lstm_init_state.1": (1, "H"),
    }


def published(heads: Sequence[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Where the tensors of `shapes` stand in the reference's files, see `FlaxNames`."""
    layers = {
        "mix_layer1": "linear",
        "mix_layer2": "linear_1",
        "final_mix_layer": "linear_2",
        "lstm.linear": "rnn/linear",  # one key
        **{name: name for name in heads},
    }
    found: dict[str, tuple[tuple[str, ...], bool]] = {}
    for ours, theirs in layers.items():
        found[f"{ours}.weight"] = (("rnn_params", theirs, "w"), True)
        found[f"{ours}.bias"] = (("rnn_params", theirs, "b"), False)
    for i, state in enumerate(("hidden", "cell")):
        found[f"lstm_init_state.{i}"] = (("lstm_init_state", state), False)
    return found


# --------------------------------------------------------------------------------------- of the run


class LossBuffer:
    """Ten running means of the loss, from 10 steps to the whole run long, and their minima; all
    float64 (10,).

    Args:
        num_steps: length of the run.
        step: steps taken before this one, int64 0-d.
    """

    def __init__(self, num_steps: int, step: Tensor) -> None:
        half_lives = torch.logspace(
            1.0, math.log10(num_steps), NUM_LOSS_MEANS, dtype=torch.float64, device=step.device
        )
        self.decays = torch.exp(-1.0 / half_lives)
        self.step = step

    def updated(self, means: Tensor, minima: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """(means, minima) after `loss`, which counts as at most twice the largest mean."""
        correction = 1.0 - self.decays ** (self.step + 1)
        top = torch.where(self.step == 0, loss, (means / correction).max())
        loss = torch.minimum(2.0 * top.abs(), loss)
        means = self.decays * means + (1.0 - self.decays) * loss
        return means, torch.minimum(minima, means / correction)

    def features(self, means: Tensor, minima: Tensor) -> Tensor:
        """Nine numbers in [-1, 1]: how far each mean is above its minimum, measured by the next
        longer one; 0 at the start.
        """
        means = means / (1.0 - self.decays ** (self.step + 1))
        above = (means[:-1] - minima[:-1]) / (means[1:] - minima[:-1]).clamp_min(1e-8)
        return torch.where(self.step + 1 <= 2, 0.0, (above - 1.0).clamp(-1.0, 1.0))


def loss_state() -> dict[str, Tensor]:
    """What `read_loss` keeps in every parameter group, see `LearnedRule.group_state`."""
    means = torch.zeros(NUM_LOSS_MEANS, dtype=torch.float64)
    return {"loss_means": means, "loss_minima": torch.full_like(means, LARGEST_MINIMUM)}


def read_loss(batch: Batch) -> Tensor:
    """Take the loss of this step into the buffer of all groups (modified in place, if
    `batch.taken`); its nine features, float64 (9,).
    """
    run = batch.groups[0]
    buffer = LossBuffer(run["num_steps"], run["step"])
    means, minima = buffer.updated(run["loss_means"], run["loss_minima"], batch.loss)
    write_run(batch, {"loss_means": means, "loss_minima": minima})
    return buffer.features(means, minima)


def write_run(batch: Batch, entries: Mapping[str, Tensor]) -> None:
    """Write what belongs to the run into all groups alike (modified in place, if `batch.taken`)."""
    for group in batch.groups:
        for name, value in entries.items():
            reference.commit(group[name], value, batch.taken)


def progress(hyper: Mapping[str, Any]) -> Tensor:
    """t / num_steps with t steps taken before this one, float32 0-d as in the reference."""
    share: Tensor = hyper["step"].to(torch.float32) / hyper["num_steps"]
    return share


def fractions(share: Tensor, at: Tensor) -> Tensor:
    """tanh(10 (share - w)) for the nine w of FRACTIONS in `at`, float32 as in the reference,
    (9,).
    """
    return torch.tanh(10.0 * (share - at))


def fractions_at(batch: Batch) -> Tensor:
    """FRACTIONS on the device of a batch, float32 (9,)."""
    return batch.on_device("fractions", FRACTIONS, torch.float32)


# ----------------------------------------------------------------------------------------- networks


class LSTM:
    """A mix layer, an LSTM cell and linear heads. In any dtype and on any device, where it keeps a
    copy of its tensors.

    Args:
        tensors: by the names of `shapes`.
        heads: the linear layers whose outputs are wanted, in order.
    """

    def __init__(self, tensors: Mapping[str, Tensor], heads: Sequence[str]) -> None:
        self._tensors, self._heads = tensors, tuple(heads)
        self._joined: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}

    @cached_property
    def initial(self) -> tuple[Tensor, Tensor]:
        """Hidden units and cell before the first step, each float32 (H,)."""
        hidden, cell = (self._tensors[f"lstm_init_state.{i}"][0] for i in (0, 1))
        return hidden, cell

    def mixed(self, inputs: Tensor) -> Tensor:
        """What the cell reads of `inputs` (R, I), (R, H); here alone rows know of each other, by
        the largest of what each says to all.
        """
        w = self._weights(inputs.dtype, inputs.device)
        # x W2 + b2 + max over rows of relu(x W1 + b1)
        mix, x = linear(inputs, w["mix.weight"], w["mix.bias"]).chunk(2, dim=1)
        return x + torch.relu(mix).amax(0)

    def step(self, mixed: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, cell) of some rows after what `mixed` says of them; all are (K, H)."""
        w = self._weights(mixed.dtype, mixed.device)
        gates = linear(torch.cat([mixed, hidden], dim=1), w["lstm.weight"], w["lstm.bias"])
        i, g, f, o = gates.chunk(4, dim=1)
        cell = torch.sigmoid(f + 1.0) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell

    def outputs(self, hidden: Tensor) -> Tensor:
        """What the heads make of `hidden` (K, H), side by side: (K, O)."""
        w = self._weights(hidden.dtype, hidden.device)
        return linear(hidden, w["heads.weight"], w["heads.bias"])

    def _weights(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The two matrices that read the inputs as one, the heads as one, and the cell's."""
        if (dtype, device) not in self._joined:
            layers = {
                "mix": ("mix_layer2", "final_mix_layer"),
                "lstm": ("lstm.linear",),
                "heads": self._heads,
            }
            self._joined[dtype, device] = {
                f"{name}.{kind}": torch.cat(
                    [self._tensors[f"{part}.{kind}"].to(device, dtype) for part in parts]
                )
                for name, parts in layers.items()
                for kind in ("weight", "bias")
            }
        return self._joined[dtype, device]


FEW = 8  # rows from which on a matrix product tends to be computed like one over many


class TensorRows:
    """VeLO's: one row per tensor of a batch, `lstm_hidden` and `lstm_cell` of its state, computed
    where it is kept.

    Ranks that keep the same row compute it among others, and a matrix product may round otherwise
    over fewer rows. So it is tried once whether the rows of this rank by themselves have the bits
    that they have among all; where not, they are computed in their places among all, which hold
    zeros where others keep them. So a row has the same bits in every layout.

    Args:
        lstm: of all rows.
        batch: whose items have them.
        networks: what is made of that which the heads say, (rows, O), by a matrix product too.

    Attributes:
        dtype: that of the widest state, in which all is computed: one float64 tensor makes the run
            a float64 one.
        kept: the items whose rows are here, in order.
        at: their places among the rows that are computed.
        places: of every item its place there; 0 of those that are not kept.
        all: whether all items are kept, and `at` is their order.
    """

    def __init__(self, lstm: LSTM, batch: Batch, networks: Callable[[Tensor], Tensor]) -> None:
        self.lstm, self._threads = lstm, torch.get_num_threads()
        states = [item.state for item in batch.items]
        self.dtype = max((s["lstm_hidden"].dtype for s in states), key=lambda d: d.itemsize)
        self.kept = tuple(i for i, s in enumerate(states) if s["lstm_hidden"].numel())
        self.all = len(self.kept) == len(states)
        # whose rows are computed: these, or with the first as often as it takes, or all
        filled = self.kept + self.kept[:1] * (FEW - len(self.kept))
        everything = tuple(range(len(states)))
        tried = [items for items in dict.fromkeys((self.kept, filled)) if len(items) < len(states)]
        alike = (i for i in tried if self._rounds_alike(i, len(states), batch, networks))
        chosen = next(alike, everything)
        self._items = torch.tensor(chosen).to(batch.device)
        place_of = dict(zip(reversed(chosen), reversed(range(len(chosen))), strict=True))
        self.at = tuple(place_of[i] for i in self.kept)
        places = dict(zip(self.kept, self.at, strict=True))
        self.places = tuple(places.get(i, 0) for i in range(len(states)))
        nothing = torch.zeros_like(self.lstm.initial[0], dtype=self.dtype, device=batch.device)
        mine = {*self.at}
        self._state = [
            [states[i][name] if at in mine else nothing for at, i in enumerate(chosen)]
            for name in ("lstm_hidden", "lstm_cell")
        ]

    def stands(self) -> bool:
        """Whether what was tried still holds: on a CPU, products round by the number of threads."""
        return self._items.device.type != "cpu" or self._threads == torch.get_num_threads()

    def _rounds_alike(
        self,
        items: Sequence[int],
        rows: int,
        batch: Batch,
        networks: Callable[[Tensor], Tensor],
    ) -> bool:
        """Whether these of so many rows have the same bits by themselves, of random numbers; drawn
        three times, since where threads split the work only a few numbers may be rounded otherwise.
        """
        if not items or batch.device.type == "meta":
            return True
        size = (3, rows, len(self.lstm.initial[0]))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.tensor(items).to(batch.device)
        for _ in range(3):
            drawn = torch.randn(size, generator=generator, dtype=self.dtype).to(batch.device)
            whole, alone = self._said(*drawn), self._said(*drawn.index_select(1, chosen))
            for part, together in (
                *zip(alone, whole, strict=True),
                (networks(alone[-1]), networks(whole[-1])),
            ):
                if not torch.equal(part, together.index_select(0, chosen)):
                    return False
        return True

    def _said(self, mixed: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden units and cell of the next step, and what the heads say."""
        hidden, cell = self.lstm.step(mixed, hidden, cell)
        return hidden, cell, self.lstm.outputs(hidden)

    def advance(self, batch: Batch, mixed: Tensor) -> Tensor:
        """Go on by a step (the state is modified in place, if `batch.taken`); what the heads say of
        the rows that are computed, those of `kept` at `at`, (K, O).

        Args:
            mixed: of all tensors, (R, H), see `LSTM.mixed`.
        """
        if not self.kept:
            return self.lstm.outputs(mixed[:0])
        here = mixed if len(self._items) == len(mixed) else mixed.index_select(0, self._items)
        old = [torch.stack(part).to(self.dtype) for part in self._state]
        *now, said = self._said(here, *old)
        for part, before, after in zip(self._state, old, now, strict=True):
            new = torch.where(batch.taken, after, before).unbind()
            torch._foreach_copy_([part[at] for at in self.at], [new[at] for at in self.at])
        return said


class RunLSTM:
    """Celo's: one row for the run. It reads the loss and how far the run is, and no tensor; its
    state is in the parameter groups, and all of it is float64, so that what it says does not depend
    on the parameters.

    Args:
        lstm: of 18 inputs.
    """

    def __init__(self, lstm: LSTM) -> None:
        self.lstm = lstm

    def group_state(self) -> dict[str, Tensor]:
        hidden, cell = (row.to(torch.float64) for row in self.lstm.initial)
        return {**loss_state(), "lstm_hidden": hidden, "lstm_cell": cell}

    def advance(self, batch: Batch) -> Tensor:
        """Take this step's loss in and go on by a step (the groups are modified in place, if
        `batch.taken`); what the heads say, float64 (O,).
        """
        loss, run = read_loss(batch), batch.groups[0]
        share = fractions(progress(run), fractions_at(batch)).to(torch.float64)
        inputs = torch.cat([share, loss])[None]
        before = run["lstm_hidden"][None], run["lstm_cell"][None]
        hidden, cell = self.lstm.step(self.lstm.mixed(inputs), *before)
        write_run(batch, {"lstm_hidden": hidden[0], "lstm_cell": cell[0]})
        return self.lstm.outputs(hidden)[0]
