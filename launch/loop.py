"""The training loop: every step of a run, its validations, and where a rank was when something
failed. Makes nothing that it works with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from checkpoints import Keeper
from clock import Clock
from data import BatchPlan, Tokens
from feed import Feed
from learner import Trainable
from options import Options
from parallel import data_rank
from place import Place
from watch import Row, Watch

TRAIN, VALIDATION = 0, 1  # streams of samples


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def train(
    learner: Trainable,
    data: tuple[Tokens, Tokens | None],
    options: Options,
    place: Place,
    plan: BatchPlan,
    watch: Watch | None,
    *,
    done: int = 0,
    seen: int = 0,
    keeper: Keeper | None = None,
) -> None:
    """Every step of the run after the `done` first, in which `seen` sequences were read.

    Raises Diverged, and Stopped where SIGTERM asked `keeper` to stop.
    """
    train_data, val_data = data
    clock = Clock(place.device)
    tokens_per_step = plan.global_batch * options.sequence_length()
    steps = range(done + 1, options.steps + 1)

    def places(step: int) -> np.ndarray:
        if options.order == "stream":
            return train_data.in_order(
                seen + (step - steps.start) * plan.global_batch, plan.global_batch
            )
        return train_data.windows(options.seed, TRAIN, step, plan.global_batch)

    with Feed(
        train_data, places, plan.rows(data_rank(options, place.rank, place.world_size)), steps
    ) as feed:
        for step in steps:
            lr = options.lr_at(step)
            for group in learner.optimizer.param_groups:
                group["lr"] = lr
            start = clock.mark()
            loss = torch.zeros((), device=place.device)
            with named(place, step, "forward and backward"):
                parts = feed.next()
                for i, windows in enumerate(parts):
                    with learner.micro_batch(last=i == len(parts) - 1):
                        part = learner.loss(windows) / plan.accumulation
                        learner.backward(part)
                    loss += part.detach()
            with named(place, step, "the mean of the loss"):
                asked = keeper is not None and keeper.asked  # to stop, maybe on this rank alone
                told = place.mean(torch.stack((loss, torch.full_like(loss, asked))))
            before = clock.mark()
            with named(place, step, "the optimizer's step"):
                try:
                    learner.step(loss)
                except FloatingPointError as error:
                    raise Diverged(f"{error} Lower --lr or clip: --max-grad-norm 1.") from None
            end = clock.mark()
            step_ms, optimizer_ms = clock.ms(start, end), clock.ms(before, end)
            mean_loss, stop = told.tolist()
            if not math.isfinite(mean_loss):
                raise Diverged(
                    f"the loss is {mean_loss} at step {step}; lower --lr or clip: --max-grad-norm "
                    "1."
                )
            val_loss = None
            if val_data is not None and (step % options.eval_every == 0 or step == options.steps):
                with named(place, step, "the validation"):
                    val_loss = evaluate(learner, val_data, options, place, plan)
            if watch is not None:
                tokens_per_s = tokens_per_step / step_ms * 1e3
                watch.add(Row(step, mean_loss, val_loss, tokens_per_s, step_ms, optimizer_ms, lr))
            if keeper is not None:
                with named(place, step, "the checkpoint"):
                    keeper.after(
                        step, sequences=seen + (step - done) * plan.global_batch, stop=stop > 0
                    )


@contextmanager
def named(place: Place, step: int, what: str) -> Iterator[None]:
    """An error, such as of a rank that has lost another or of one whose token file is damaged, says
    where this rank was.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, Diverged):
            raise
        raise RuntimeError(
            f"rank {place.rank} of {place.world_size} at step {step}, in {what}: {error}"
        ) from error


@torch.no_grad()
def evaluate(
    learner: Trainable,
    data: Tokens,
    options: Options,
    place: Place,
    plan: BatchPlan,
) -> float:
    """The mean loss over `--eval-batches` global batches, the same ones every time."""
    total = torch.zeros((), device=place.device)
    for i in range(options.eval_batches):
        samples = data.windows(options.seed, VALIDATION, i, plan.global_batch)
        for rows in plan.rows(data_rank(options, place.rank, place.world_size)):
            total += learner.loss(data.read(samples[rows]))
    return float(place.mean(total) / (options.eval_batches * plan.accumulation))
