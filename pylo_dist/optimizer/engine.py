"""Drive learned rules in lock step: bring the sums they ask for and judge the gradients. Writes no
parameter itself.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import comm
from ..comm import Collective, PeerError, Reduction
from ..core import trace
from ..core.devices import event_behind
from ..core.requests import (
    AUDIT_SLOTS,
    FAILED,
    NONFINITE,
    PRESENT,
    SQUARES,
    UPDATE,
    Exchange,
    Request,
    Sum,
)
from ..core.rule import Batch, LearnedRule, is_capturing
from .settings import GroupNumbers

Nonfinite = Literal["error", "skip", "allow"]
Clip = Literal["global", "per_tensor"]


class LossSum:
    """The loss of this rank, to be averaged over those of `group`: its sum, how many gave one, how
    many there are, and failed.
    """

    def __init__(self, loss: Tensor | None, group: Any) -> None:
        self.group = group
        self.loss = loss

    @classmethod
    def over(cls, process_group: Any, loss: Tensor | None) -> LossSum:
        """As an optimizer's user says it: None for the world once torch.distributed is initialised,
        False for this rank alone.
        """
        group = comm.default_group() if process_group is None else process_group or None
        return cls(loss, group)

    def buffer(self, device: torch.device, failed: bool) -> Tensor:
        """A new buffer, float64 (4,); what the host knows is written without a copy from its
        memory.
        """
        counts = torch.ones(4, dtype=torch.float64, device=device)
        counts[3].fill_(float(failed))
        if self.loss is None:
            counts[:2].zero_()
        elif self.loss.device.type == "cpu" != device.type:
            counts[0].fill_(float(self.loss))
        else:
            counts[0].copy_(self.loss.reshape(()))
        return counts


class NonFiniteGradientError(RuntimeError):
    """A gradient holds inf or NaN under `nonfinite="error"`. No parameter and no state was
    changed.
    """


class Engine:
    """Runs one step of several rules with two packed reductions per process group, however many
    tensors there are.

    Args:
        work: each rule with the batch it drives. All ranks hold the same items in the same order.
        nonfinite: what to do about inf and NaN in raw gradients. "error" and "skip" leave all
            parameters and state as they were.
        clip: whether `max_grad_norm` of a group bounds the norm over all tensors or that of each.

    Attributes:
        taken: bool 0-d, whether the last step was taken.
        idle: whether a step is known in which no tensor had a gradient on any rank; on a GPU with
            the step that follows, as errors are.
        grad_norm: float64 0-d, norm of the raw gradients of the last step over all tensors.
        begun: whether a step was begun, which makes tables and buffers that outlive it.
        captured: whether a CUDA graph holds a step, which then reads and writes this engine's
            memory whenever it is replayed.
    """

    def __init__(
        self, work: Sequence[tuple[LearnedRule, Batch]], nonfinite: Nonfinite, clip: Clip
    ) -> None:
        self.work = list(work)
        self.nonfinite = nonfinite
        self.clip = clip
        for _, batch in work:
            batch.allows_nonfinite = nonfinite == "allow"
        device = work[0][1].device if work else torch.device("cpu")
        self.taken = torch.ones((), dtype=torch.bool, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self._false = torch.zeros((), dtype=torch.bool, device=device)
        self._stats = [_BatchStats(batch) for _, batch in self.work]
        self._pending = _PendingErrors([batch for _, batch in work if batch.items], device)
        self.begun = self.captured = False
        self.shared = any(
            item.param.holders is not None for _, batch in self.work for item in batch.items
        )

    @property
    def idle(self) -> bool:
        return self._pending.idle

    def phases(
        self,
        losses: LossSum | None = None,
        problem: Exception | None = None,
        numbers: GroupNumbers | None = None,
    ) -> Iterator[list[Collective]]:
        """One step. Yields the collectives it needs; whoever drives it carries them out and
        resumes.

        Args:
            losses: for rules that need the loss; it is averaged in the first reduction.
            problem: why this rank cannot take the step; raised after the first reduction, so that
                no rank waits for another.
            numbers: those of the parameter groups, compared between ranks in the first reduction.

        Raises:
            NonFiniteGradientError: under "error"; on a CPU for this step, on a GPU for the one
                before (see `raise_pending`).
            ValueError: `problem`, or no loss for a rule that needs it; numbers that are no good or
                not the same on all ranks; a captured step that cannot be replayed.
            PeerError: another rank has one of them.
        """
        if is_capturing(self.taken.device):
            self._check_capture(losses)
        else:
            self._pending.raise_last()
        self.begun = True
        if problem is not None and not self.shared and (losses is None or losses.group is None):
            raise problem
        steps = [rule.step(batch) for rule, batch in self.work]
        with trace.phase("step: A"):
            requests = [_first_sum(next(step)) for step in steps]
        for request, (_, batch) in zip(requests, self.work, strict=True):
            batch.summed.clear()  # what was read early is in the request, and counts once
            _fill_audits(request, batch, failed=problem is not None)
        loss = None if losses is None else losses.buffer(self.taken.device, problem is not None)
        compared = self._compared(requests, losses, numbers)
        yield from self._serve(
            requests,
            [*([] if losses is None or loss is None else [(losses.group, loss)]), *compared],
        )
        with trace.phase("step: judge"):
            unlike = None
            if numbers is not None:
                unlike = numbers.judge([buffer for _, buffer in compared], self.taken.device)
            self._judge(requests, loss, problem, unlike, numbers)
        letters = iter(string.ascii_uppercase[1:])
        while steps:
            with trace.phase(f"step: {next(letters)}"):
                running = [(step, next(step, None)) for step in steps]
            steps = [step for step, request in running if request is not None]
            yield from self._serve([request for _, request in running if request is not None])

    def _compared(
        self, requests: Sequence[Sum], losses: LossSum | None, numbers: GroupNumbers | None
    ) -> list[Reduction]:
        """What compares the groups' numbers over the ranks that this step adds sums over anyway."""
        if numbers is None:
            return []
        devices = {
            id(packed.group): (packed.group, packed.buffer.device)
            for request in requests
            for packed in request.buffers
            if packed.group is not None and packed.buffer.numel()
        }
        here = self.taken.device
        compared = [
            (group, numbers.buffer(here, by_group=True).to(device))
            for group, device in devices.values()
        ]
        if losses is not None and losses.group is not None and id(losses.group) not in devices:
            compared.append((losses.group, numbers.buffer(here, by_group=False)))
        return compared

    @staticmethod
    def _serve(
        requests: Sequence[Request], further: Sequence[Reduction] = ()
    ) -> Iterator[list[Collective]]:
        """Pack all sums of a phase into one buffer per process group. Unshared tensors need no
        reduction.
        """
        by_group: dict[int, list[Reduction]] = {}
        sums = [request for request in requests if isinstance(request, Sum)]
        transfers = [
            t for request in requests if isinstance(request, Exchange) for t in request.transfers
        ]
        buffers = [(packed.group, packed.buffer) for request in sums for packed in request.buffers]
        for group, buffer in [*buffers, *further]:
            if group is not None and buffer.numel():
                by_group.setdefault(id(group), []).append((group, buffer))
        if not by_group and not transfers:
            return
        packed = [
            parts[0]
            if len(parts) == 1
            else (parts[0][0], torch.cat([buffer for _, buffer in parts]))
            for parts in by_group.values()
        ]
        yield [*packed, *transfers]
        for parts, (_, total) in zip(by_group.values(), packed, strict=True):
            if len(parts) > 1:
                for (_, buffer), reduced in zip(
                    parts, total.split([b.numel() for _, b in parts]), strict=True
                ):
                    buffer.copy_(reduced)
        for part in (part for request in sums for part in request.buffers):
            if part.replicas > 1:
                part.buffer /= part.replicas

    def _judge(
        self,
        requests: Sequence[Sum],
        loss: Tensor | None,
        problem: Exception | None,
        unlike: Tensor | None,
        numbers: GroupNumbers | None,
    ) -> None:
        """From the reduced audits: which tensors move, by what their gradients are scaled, and
        whether there is a step.

        Args:
            unlike: bool 0-d, whether the groups' numbers forbid it.
        """
        audits = [request.audit_table() for request in requests if request.audits]
        work = [(rule, batch) for rule, batch in self.work if batch.items]
        if not audits:
            return
        device = self.taken.device
        table = audits[0] if len(audits) == 1 else torch.cat([audit.to(device) for audit in audits])
        totals = table.sum(0)  # counts and squares: none is negative
        self.grad_norm = totals[SQUARES].sqrt()
        probe, failed, nonfinite = self._is_probe(), totals[FAILED] > 0, self._false
        if loss is not None:  # copies of a model that nothing else is reduced for, as under DDP
            failed = failed | (loss[3] > 0)
        without_loss = self._false if loss is None else (loss[1] < loss[2]) & ~probe
        bad = [(a[:, NONFINITE] > 0) for a in audits]
        if self.nonfinite != "allow":
            nonfinite = (
                totals[NONFINITE] > 0
                if loss is None
                else (totals[NONFINITE] > 0) | ~loss[0].isfinite()
            )
        unlike = self._false if unlike is None else unlike
        idle = totals[PRESENT] == 0
        findings = torch.stack([idle, failed, without_loss, unlike, nonfinite, probe])
        self.taken = ~findings[1:].any()  # the others are reasons not to
        # elsewhere than on a CPU the others do not know yet, and go on to collectives that this
        # rank must not leave
        error = self.nonfinite == "error"
        self._pending.note(
            findings[: 4 + error],
            bad if error else [],
            problem,
            problem is not None and not self.shared,
            numbers,
        )
        for (rule, batch), audit, stats in zip(work, audits, self._stats, strict=True):
            batch.taken = self.taken.to(batch.device)
            batch.moves = (audit[:, PRESENT] > 0) & batch.taken
            if loss is not None:
                batch.loss = (loss[0] / loss[2]).to(batch.device)
            self._scale(rule, batch, audit, bad)
            stats.after_judgement(audit)

    def _scale(self, rule: LearnedRule, batch: Batch, audit: Tensor, bad: Sequence[Tensor]) -> None:
        """Say by what clipping multiplies the gradients of a batch.

        Args:
            audit: float64 (items, slots), reduced.
            bad: per batch, bool (items,), which gradients are no numbers.
        """
        groups, _ = batch.hypers()
        clipped, batch.clips = (
            batch.clips,
            any(group.get("max_grad_norm") is not None for group in groups),
        )
        if batch.clips:
            limits = [item.hyper.get("max_grad_norm") for item in batch.items]
            bounds = tuple(float("inf") if limit is None else limit for limit in limits)
            bound = batch.on_device("engine: bounds", bounds, torch.float64)
            norm = (
                self.grad_norm.to(batch.device)
                if self.clip == "global"
                else audit[:, SQUARES].sqrt()
            )
            # s = min(1, max_grad_norm / (norm + eps)); an unlimited tensor keeps 1 even beside an
            # infinite norm
            scale = (bound / (norm + rule.clip_eps)).clamp(max=1.0)
            # of a norm that is no number nothing is left: s g is NaN, which counts as 0
            if rule.replaces_nonfinite:
                scale = torch.where(
                    torch.stack([b.any().to(batch.device) for b in bad]).any(), 0.0, scale
                )
            batch.scale = torch.where(bound.isinf(), 1.0, scale)
        elif clipped:  # before: the groups were changed
            batch.scale = torch.ones_like(batch.scale)

    def _is_probe(self) -> Tensor:
        """bool 0-d: zero gradients everywhere and lr 0.

        With such a step torch.distributed.checkpoint makes optimizers create their state; it must
        change nothing.
        """
        groups = [group for _, batch in self.work for group in batch.hypers()[0]]
        rates = [group.get("lr", 1.0) for group in groups]
        if not all(isinstance(rate, Tensor) or rate == 0.0 for rate in rates):
            return self._false
        probe = self.grad_norm == 0.0
        for rate in {id(rate): rate for rate in rates if isinstance(rate, Tensor)}.values():
            probe = probe & (rate == 0.0).to(probe.device)
        return probe

    def _check_capture(self, losses: LossSum | None) -> None:
        """Raise ValueError for a step that a CUDA graph would replay wrongly."""
        if not self.begun:
            raise ValueError(
                "a CUDA graph captures a step before the first one: take one outside of it, which "
                "makes the tables"
            )
        if losses is not None and losses.loss is not None and losses.loss.device.type == "cpu":
            raise ValueError(
                "a CUDA graph would replay this loss for ever: give it as a tensor on "
                f"{self.taken.device}"
            )
        self.captured = True

    def retire(self) -> None:
        """Warn of CUDA graphs that hold this engine's steps: another one takes its place, with
        other parameters or state.
        """
        if self.captured:
            warnings.warn(
                "a step of this optimizer was captured in a CUDA graph before its parameters or "
                "state were exchanged (add_param_group, load_state_dict, requires_grad): replays "
                "go on with the old ones, capture it again",
                stacklevel=4,
            )

    def raise_pending(self) -> None:
        """Raise the error of the steps so far, those replayed in a CUDA graph among them, if there
        is one; waits for the device.

        It is alike on all ranks, but for a rank's own problem.
        """
        self._pending.raise_now()

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Per parameter, as 0-d tensors on its device, see `LearnedOptimizer.stats`."""
        merged: dict[str, dict[str, Tensor]] = {}
        for stats in self._stats:
            merged.update(stats.table())
        return merged


class _PendingErrors:
    """What is wrong with steps that the host has not asked about yet.

    On a CPU it asks at once. Elsewhere flags are gathered on the device and copied to the host
    behind the step, which nobody waits for; the next step looks at them. Flags stay until they are
    raised, so that replays of a CUDA graph, in which the host takes no part, are heard of at the
    second step outside of it, or by `raise_now`.

    Attributes:
        flags: bool (5,), whether in a step no tensor had a gradient, a rank could not take one,
            gave no loss, had other numbers in its groups, or had a gradient that is no number.
        bad: per batch, bool (items,), which gradients were no numbers.
        at_once: whether the host asks within the step.
        idle: the first flag, as far as the host has asked; no error.
    """

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self.batches = batches
        self.flags = torch.zeros(5, dtype=torch.bool, device=device)
        self.bad = [
            torch.zeros(len(batch.items), dtype=torch.bool, device=batch.device)
            for batch in batches
        ]
        self.at_once = device.type == "cpu"
        self.idle = False
        self.problem: Exception | None = None  # this rank's own
        self.numbers: GroupNumbers | None = None  # those of the last step
        self._host = torch.zeros(5, dtype=torch.bool, pin_memory=device.type == "cuda")
        self._copied: torch.Event | None = None  # when the flags are on the host
        self._asked = True

    def note(
        self,
        flags: Tensor,
        bad: list[Tensor],
        problem: Exception | None,
        alone: bool,
        numbers: GroupNumbers | None,
    ) -> None:
        """Add what the step under way has shown; `alone`: no other rank waits for this one, so its
        problem is raised now.

        Args:
            flags: the first four or all five.
        """
        self.flags[: len(flags)].logical_or_(flags)
        for sticky, now in zip(self.bad, bad, strict=False):
            sticky |= now
        self.problem, self.numbers = problem, numbers
        device = self.flags.device
        if self.at_once or alone:
            self.raise_now()
        elif not is_capturing(device):
            self._host.copy_(self.flags, non_blocking=True)
            self._copied = event_behind(device)
            self._asked = False

    def raise_last(self) -> None:
        """Raise what the last step has shown. The host has been ahead of the device by a step at
        most, and waits no longer.
        """
        if self._asked:
            return
        self._asked = True
        if self._copied is not None:
            self._copied.synchronize()
        self._raise(self._host)

    def raise_now(self) -> None:
        """Raise what there is, waiting for the device."""
        self._asked = True
        self._raise(self.flags)

    def _raise(self, flags: Tensor) -> None:
        self.idle, failed, without_loss, unlike, nonfinite = flags.tolist()
        problem, self.problem = self.problem, None
        if not (failed or without_loss or unlike or nonfinite or problem is not None):
            return
        settings = self.numbers.error() if unlike and self.numbers is not None else None
        if self.numbers is not None:
            self.numbers.forget()
        bad = [i.nonzero().flatten().tolist() for i in self.bad] if nonfinite else []
        for tensor in (self.flags, self._host, *self.bad):
            tensor.zero_()
        if problem is not None:
            raise problem
        if failed:
            raise PeerError
        if without_loss:
            raise ValueError(
                "this optimizer reads the training loss, and some rank gave none: call "
                "step(loss), step(loss=loss) or step(closure) on every rank, or set_loss(loss) "
                "before a step() that you do not call yourself; for the Trainer of transformers "
                "callbacks=[pylo_dist.huggingface.LossCallback()] does so, for models that return "
                "their loss pylo_dist.keep_loss(model, optimizer), once"
            )
        if settings is not None:
            raise settings
        names = [
            batch.items[i].param.shard.fqn
            for batch, found in zip(self.batches, bad, strict=True)
            for i in found
        ]
        shown = ", ".join(repr(name) for name in names[:5]) + (
            f" and {len(names) - 5} more" if len(names) > 5 else ""
        )
        what = f"the gradient of {shown} holds" if names else "the loss is"
        raise NonFiniteGradientError(
            f"{what} inf or NaN (or numbers whose square is); the step was not taken "
            '(nonfinite="skip" passes over such steps, "allow" takes them as they are)'
        )


def _first_sum(request: Request) -> Sum:
    assert isinstance(request, Sum), "a rule's first request carries the gradient audits"
    return request


def _fill_audits(request: Sum, batch: Batch, failed: bool) -> None:
    """Write presence, failure and the squared update of the step before into the audits, all items
    of a group at once.
    """
    for number, packed in enumerate(request.buffers):
        members = packed.members
        audits = packed.buffer[: AUDIT_SLOTS * len(members)].view(-1, AUDIT_SLOTS)
        present = tuple(float(batch.items[i].param.present) for i in members)
        audits[:, PRESENT].copy_(
            batch.on_device(f"engine: present {number}", present, torch.float64)
        )
        audits[:, FAILED].fill_(float(failed))
        places = batch.on_device(f"engine: members {number}", tuple(members), torch.int64)
        audits[:, UPDATE].copy_(batch.update_squares.index_select(0, places))


class _BatchStats:
    """Figures about the last steps of a batch, kept on its device."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.shared_update = torch.zeros_like(batch.update_squares)
        self.shared_param = torch.zeros_like(batch.param_squares)
        self.clipped = torch.zeros_like(batch.update_squares)
        self.steps = torch.zeros((), dtype=torch.float64, device=batch.device)

    def after_judgement(self, audit: Tensor) -> None:
        self.shared_update = audit[:, UPDATE].clone()  # of the step before, over all ranks
        self.shared_param = self.batch.param_squares.clone()
        if self.batch.clips:
            self.clipped += (self.batch.scale < 1.0) & self.batch.moves
        self.steps += self.batch.moves.any()
        self.batch.update_squares.zero_()

    def table(self) -> dict[str, dict[str, Tensor]]:
        rows = {}
        for i, item in enumerate(self.batch.items):
            alone = item.param.holders is None
            update = self.batch.update_squares[i] if alone else self.shared_update[i]
            param = self.batch.param_squares[i] if alone else self.shared_param[i]
            rows[item.param.shard.fqn] = {
                "update_ratio": (update / param).sqrt(),
                "clip_rate": self.clipped[i] / self.steps.clamp(min=1.0),
                **{name: values[i] for name, values in self.batch.figures.items()},
            }
        return rows
