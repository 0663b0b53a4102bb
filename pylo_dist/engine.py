"""Drive learned rules in lock step: bring the sums they ask for and judge the gradients. Writes no parameter itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .comm import Collective, PeerError, Reduction
from .optim.base import AUDIT_SLOTS, FAILED, NONFINITE, PRESENT, SQUARES, UPDATE, Batch, Exchange, LearnedRule, Request, Sum

Nonfinite = Literal["error", "skip", "allow"]
Clip = Literal["global", "per_tensor"]


class LossSum:
    """The loss of this rank, to be averaged over those of `group`: float64 (sum, how many ranks gave one, how many there are)."""

    def __init__(self, loss: Tensor | None, group: Any) -> None:
        self.group = group
        self.loss = loss

    def buffer(self, device: torch.device) -> Tensor:
        counts = torch.tensor([0.0, float(self.loss is not None), 1.0], dtype=torch.float64).to(device, non_blocking=True)
        if self.loss is not None:
            counts[0] = self.loss.to(device, torch.float64).reshape(())
        return counts


class NonFiniteGradientError(RuntimeError):
    """A gradient holds inf or NaN under `nonfinite="error"`. No parameter and no state was changed."""


class Engine:
    """Runs one step of several rules with two packed reductions per process group, however many tensors there are.

    Args:
        work: each rule with the batch it drives. All ranks hold the same items in the same order.
        nonfinite: what to do about inf and NaN in raw gradients. "error" and "skip" leave all parameters and state as they were.
        clip: whether `max_grad_norm` of a group bounds the norm over all tensors or that of each.

    Attributes:
        go: bool 0-d, whether the last step was taken.
        grad_norm: float64 0-d, norm of the raw gradients of the last step over all tensors.
    """

    def __init__(self, work: Sequence[tuple[LearnedRule, Batch]], nonfinite: Nonfinite, clip: Clip) -> None:
        self.work = list(work)
        self.nonfinite = nonfinite
        self.clip = clip
        for _, batch in work:
            batch.allows_nonfinite = nonfinite == "allow"
        device = work[0][1].device if work else torch.device("cpu")
        self.go = torch.ones((), dtype=torch.bool, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self._stats = [_BatchStats(batch) for _, batch in self.work]
        self._pending: tuple[Any, Tensor, _Verdict] | None = None
        self.shared = any(item.param.holders is not None for _, batch in self.work for item in batch.items)

    def phases(self, losses: LossSum | None = None, problem: ValueError | None = None) -> Iterator[list[Collective]]:
        """One step. Yields the collectives it needs; whoever drives it carries them out and resumes.

        Args:
            losses: for rules that need the loss; it is averaged in the first reduction.
            problem: why this rank cannot take the step; raised after the first reduction, so that no rank waits for another.

        Raises:
            NonFiniteGradientError: under "error"; on a CPU for this step, on a GPU for the one before (see `raise_pending`).
            ValueError: `problem`, or no loss for a rule that needs it. PeerError: that another rank has one of them.
        """
        self.raise_pending()
        if problem is not None and not self.shared and (losses is None or losses.group is None):
            raise problem
        steps = [rule.step(batch) for rule, batch in self.work]
        requests = [_first_sum(next(step)) for step in steps]
        for request, (_, batch) in zip(requests, self.work, strict=True):
            _fill_audits(request, batch, failed=problem is not None)
        loss = None if losses is None else losses.buffer(self.go.device)
        yield from self._serve(requests, [] if losses is None or loss is None else [(losses.group, loss)])
        self._judge(requests, loss, problem)
        while steps:
            running = [(step, next(step, None)) for step in steps]
            steps = [step for step, request in running if request is not None]
            yield from self._serve([request for _, request in running if request is not None])

    @staticmethod
    def _serve(requests: Sequence[Request], further: Sequence[Reduction] = ()) -> Iterator[list[Collective]]:
        """Pack all sums of a phase into one buffer per process group. Unshared tensors need no reduction."""
        by_group: dict[int, list[Reduction]] = {}
        sums = [request for request in requests if isinstance(request, Sum)]
        transfers = [t for request in requests if isinstance(request, Exchange) for t in request.transfers]
        buffers = [(packed.group, packed.buffer) for request in sums for packed in request.buffers]
        for group, buffer in [*buffers, *further]:
            if group is not None and buffer.numel():
                by_group.setdefault(id(group), []).append((group, buffer))
        if not by_group and not transfers:
            return
        packed = [
            parts[0] if len(parts) == 1 else (parts[0][0], torch.cat([buffer for _, buffer in parts]))
            for parts in by_group.values()
        ]
        yield [*packed, *transfers]
        for parts, (_, total) in zip(by_group.values(), packed, strict=True):
            if len(parts) > 1:
                for (_, buffer), reduced in zip(parts, total.split([b.numel() for _, b in parts]), strict=True):
                    buffer.copy_(reduced)
        for part in (part for request in sums for part in request.buffers):
            if part.replicas > 1:
                part.buffer /= part.replicas

    def _judge(self, requests: Sequence[Sum], loss: Tensor | None, problem: ValueError | None) -> None:
        """From the reduced audits: which tensors move, by what their gradients are scaled, and whether there is a step."""
        audits = [torch.stack(request.audits) for request in requests if request.audits]
        work = [(rule, batch) for rule, batch in self.work if batch.items]
        if not audits:
            return
        device = self.go.device
        self.grad_norm = sum(a[:, SQUARES].sum().to(device) for a in audits).sqrt()  # type: ignore[union-attr]
        probe = self._is_probe()
        failed = torch.stack([(a[:, FAILED] > 0).any().to(device) for a in audits]).any()
        lossless = torch.zeros_like(failed) if loss is None else (loss[1] < loss[2]) & ~probe
        bad = [(a[:, NONFINITE] > 0) for a in audits]
        finite = torch.ones_like(self.go)
        if self.nonfinite != "allow":
            bad_loss = [] if loss is None else [~loss[0].isfinite()]
            finite = ~torch.stack([*(b.any().to(device) for b in bad), *bad_loss]).any()
        self._flag(_Verdict(failed, lossless, finite, bad, problem))
        self.go = finite & ~failed & ~lossless & ~probe
        for (rule, batch), audit, stats in zip(work, audits, self._stats, strict=True):
            batch.go = self.go.to(batch.device)
            batch.keep = (audit[:, PRESENT] > 0) & batch.go
            if loss is not None:
                batch.loss = (loss[0] / loss[2]).to(batch.device)
            limits = [item.hyper.get("max_grad_norm") for item in batch.items]
            batch.clips = any(limit is not None for limit in limits)
            if batch.clips:
                bound = torch.tensor([float("inf") if limit is None else limit for limit in limits], dtype=torch.float64)
                norm = self.grad_norm.to(batch.device) if self.clip == "global" else audit[:, SQUARES].sqrt()
                # s = min(1, max_grad_norm / (norm + eps)); an unlimited tensor keeps 1 even beside an infinite norm
                bound = bound.to(batch.device, non_blocking=True)
                scale = (bound / (norm + rule.clip_eps)).clamp(max=1.0)
                if rule.replaces_nonfinite:  # of a norm that is no number nothing is left: s g is NaN, which counts as 0
                    scale = torch.where(torch.stack([b.any().to(batch.device) for b in bad]).any(), 0.0, scale)
                batch.scale = torch.where(bound.isinf(), 1.0, scale)
            else:
                batch.scale = torch.ones_like(batch.scale)  # groups may have clipped before
            stats.after_judgement(audit)

    def _is_probe(self) -> Tensor:
        """bool 0-d: zero gradients everywhere and lr 0.

        With such a step torch.distributed.checkpoint makes optimizers create their state; it must change nothing.
        """
        rates = [item.hyper.get("lr", 1.0) for _, batch in self.work for item in batch.items]
        probe = (self.grad_norm == 0.0) & all(isinstance(rate, Tensor) or rate == 0.0 for rate in rates)
        for rate in {id(rate): rate for rate in rates if isinstance(rate, Tensor)}.values():
            probe = probe & (rate == 0.0).to(probe.device)
        return probe

    def _flag(self, verdict: _Verdict) -> None:
        """Raise now on a CPU; elsewhere copy the flags to the host without waiting for them. This rank's own problem is known."""
        flags = torch.stack([verdict.failed, verdict.lossless, ~verdict.finite & (self.nonfinite == "error")])
        # elsewhere the others do not know yet, and go on to collectives that this rank must not leave
        if flags.device.type == "cpu" or (verdict.problem is not None and not self.shared):
            self._pending = (None, flags, verdict)
            self.raise_pending()
            return
        host = torch.empty(3, dtype=torch.bool, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (event, host, verdict)

    def raise_pending(self) -> None:
        """Raise the error of the last step, if there is one. It is alike on all ranks, but for a rank's own problem."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        event, flags, verdict = pending
        if event is not None:
            event.synchronize()
        failed, lossless, nonfinite = flags.tolist()
        if verdict.problem is not None:
            raise verdict.problem
        if failed:
            raise PeerError("another rank could not take this step, see its error; nothing was changed")
        if lossless:
            raise ValueError(
                "this optimizer reads the training loss, and some rank gave none: call step(loss), step(loss=loss) or "
                "step(closure) on every rank, or set_loss(loss) before a step() that you do not call yourself"
            )
        if not nonfinite:
            return
        names = [
            batch.items[i].param.shard.fqn
            for (_, batch), bad in zip([w for w in self.work if w[1].items], verdict.bad, strict=True)
            for i in bad.nonzero().flatten().tolist()
        ]
        shown = ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        what = f"the gradient of {shown} holds" if names else "the loss is"
        raise NonFiniteGradientError(
            f"{what} inf or NaN (or numbers whose square is); the step was not taken "
            '(nonfinite="skip" passes over such steps, "allow" takes them as they are)'
        )

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Per parameter, as 0-d tensors on its device, see `LearnedOptimizer.stats`."""
        merged: dict[str, dict[str, Tensor]] = {}
        for stats in self._stats:
            merged.update(stats.table())
        return merged


@dataclass(slots=True)
class _Verdict:
    """What the audits of a step say; bool 0-d, but `bad`, per batch and item, and `problem`, this rank's own."""

    failed: Tensor
    lossless: Tensor
    finite: Tensor
    bad: list[Tensor]
    problem: ValueError | None


def _first_sum(request: Request) -> Sum:
    assert isinstance(request, Sum), "a rule's first request carries the gradient audits"
    return request


def _fill_audits(request: Sum, batch: Batch, failed: bool) -> None:
    """Write presence, failure and the squared update of the step before into the audits, all items of a group at once."""
    present = torch.tensor([float(item.param.present) for item in batch.items], dtype=torch.float64)
    present = present.to(batch.device, non_blocking=True)
    for packed in request.buffers:
        members = packed.members
        audits = packed.buffer[: AUDIT_SLOTS * len(members)].view(-1, AUDIT_SLOTS)
        every = len(members) == len(batch.items)
        audits[:, PRESENT] = present if every else present[members]
        audits[:, FAILED] = float(failed)
        audits[:, UPDATE] = batch.update_squares if every else batch.update_squares[members]


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
            self.clipped += (self.batch.scale < 1.0) & self.batch.keep
        self.steps += self.batch.keep.any()
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
