"""Pretrain GPT-2 with a learned optimizer or AdamW: `python launch/gpt2.py`, or on many ranks under
torchrun, mpirun or srun.

Exit code 0: done. 2: wrong input. 3: the loss is no number any more. 143: ended by SIGTERM, as
without --save-every, with which the run has been saved. 1: anything else. Of 2, 3 and 143 one line
on rank 0's stderr and the code on every rank; what goes wrong before the ranks have met is said by
one rank of each machine, and by each whose environment is refused. The code is also written into
the file that EXIT_CODE_FILE names, where it is set, since torchrun ends with 1 whatever its ranks
end with.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import environment
import numpy as np
import recipe
import torch
import torch.distributed as dist

# Imported before there is a process group: its default arguments hold the group that exists at its
# first import, which optimizers cause. A group held so outlives leave(), and its threads now and
# then abort the process at exit.
import torch.distributed.nn.functional
from checkpoints import Keeper, Start, Stopped, Unsaved, check, load, package, remove, tell
from data import BatchPlan, Tokens, builtin_text
from ds import DeepSpeedLearner
from environment import Environment
from feed import Feed
from model import GPT, build
from options import Options, WrongInput, command_for_more_ranks, parse
from parallel import accumulation, data_rank, data_ranks, spread, whole_model
from torch import Tensor
from watch import (
    DONE,
    Row,
    Watch,
    check_folder,
    is_leftover,
    open_folder,
    plot,
    rows_until,
    summary,
)

TRAIN, VALIDATION = 0, 1  # streams of samples
T = TypeVar("T")


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True, slots=True)
class Place:
    """This rank among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def find(cls, options: Options, found: Environment | None = None) -> Place:
        """The place that a launcher gave. Raises WrongInput."""
        found = environment.find() if found is None else found
        has_cuda = torch.cuda.is_available()
        if options.device == "cpu" or (options.device == "auto" and not has_cuda):
            return cls(found.rank, found.world_size, torch.device("cpu"))
        if not has_cuda:
            raise WrongInput("--device cuda, but PyTorch sees no CUDA device; use --device cpu.")
        count = torch.cuda.device_count()
        # each rank may see another, as by srun --gpus-per-task=1
        own = count == 1 and found.launcher not in environment.SHARING
        if found.local_size is not None and found.local_size > count and not own:
            raise WrongInput(
                f"{found.local_size} ranks on a machine with {count} CUDA device(s); start {count} "
                "there, or use --device cpu."
            )
        index = found.rank if found.local_rank is None else found.local_rank
        return cls(found.rank, found.world_size, torch.device("cuda", index % count))

    def join(self, timeout_s: int) -> None:
        """Meet the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))

    def leave(self) -> None:
        """Part from the other ranks, once nothing of the run is held by name any more."""
        if self.world_size > 1:
            # a hook and its optimizer hold each other, and so the group, see the imports
            gc.collect()
            dist.destroy_process_group()

    def together(self, work: Callable[[], T]) -> T:
        """`work()` of this rank, which calls no collective. A ValueError on any rank is WrongInput
        on all.
        """
        problem, result = None, None
        try:
            result = work()
        except ValueError as error:
            problem = " ".join(str(error).split())
        problems = [problem]
        if self.world_size > 1:
            problems *= self.world_size
            dist.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise WrongInput(found)
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, on all ranks. A ValueError there is WrongInput on all."""
        results = [self.together(work if self.rank == 0 else lambda: None)]
        if self.world_size > 1:
            dist.broadcast_object_list(results, src=0)
        return results[0]  # type: ignore[return-value]

    def agree(self, values: dict[str, Any]) -> None:
        """Raise WrongInput, on all ranks, where a rank has others than rank 0 has."""
        if self.world_size > 1:
            found: list[Any] = [None] * self.world_size
            dist.all_gather_object(found, values)
            for rank, theirs in enumerate(found):
                for name, value in theirs.items():
                    if value != found[0][name]:
                        raise WrongInput(
                            f"{name} of rank {rank}: {value}, of rank 0: {found[0][name]}; all "
                            "ranks need the same."
                        )

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks (`value` is modified in place)."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value


class Clock:
    """Marks on a device's own time line, so that timing a GPU does not stall it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second."""
        if not self._cuda:
            return 1e3 * float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))


def open_data(options: Options, place: Place) -> tuple[Tokens, Tokens | None]:
    """(train, validation) tokens, the same on every rank. Raises WrongInput."""
    sizes = {"block_size": options.sequence_length(), "vocab_size": options.config().vocab_size}
    if options.data is not None:
        train, val = place.together(lambda: open_files(options, sizes))
        place.agree({"training tokens": train.digest(), "validation tokens": val and val.digest()})
        return train, val
    # Rank 0 reads it for all: other machines may carry another Python.
    texts = place.from_first(builtin_text)
    names = ("built-in training text", "built-in validation text")
    tokens = [
        Tokens.from_bytes(name, text, **sizes) for name, text in zip(names, texts, strict=True)
    ]
    return tokens[0], tokens[1] if options.eval_every else None


def open_files(options: Options, sizes: dict[str, int]) -> tuple[Tokens, Tokens | None]:
    """The tokens of --data and --val-data. Raises ValueError."""
    assert options.data is not None
    train = Tokens.from_path(options.data, "train", **sizes)
    if not options.eval_every:
        return train, None
    if options.val_data is None and not options.data.is_dir():
        raise WrongInput(
            f"--data {options.data} is one file; pass --val-data FILE too, or --eval-every 0."
        )
    return train, Tokens.from_path(options.val_data or options.data, "val", **sizes)


class Learner:
    """A model and its optimizer, on one rank or sharded over all; the loop does not know which."""

    def __init__(self, options: Options, place: Place) -> None:
        """Raises WrongInput for arguments or weights that the optimizer refuses."""
        chosen = options.chosen()
        sharded, learned = place.world_size > 1, chosen.entry is not None
        self._learned = learned
        package: Any = None
        if learned or sharded:
            package = place.together(import_package)
        self._nonfinite: Any = package.NonFiniteGradientError if learned else ()
        self.weights: dict[str, str] | None = None
        optimizer_class: Any = torch.optim.AdamW
        arguments: dict[str, Any] = {"lr": options.base_lr(), "betas": (0.9, 0.95)}
        if learned:
            optimizer_class = chosen.entry.face
            arguments = options.learned_arguments()
            # Tried on one number first: a rank that failed among the collectives of a sharded
            # optimizer would leave the others waiting. Rank 0 before the rest: they find in the
            # cache what it downloads.
            place.together(lambda: try_out(optimizer_class, arguments) if place.rank == 0 else None)
            self.weights = place.together(lambda: try_out(optimizer_class, arguments))
        self.model: GPT = build(options.config(), options.seed).to(place.device)
        if "width_mults" in arguments:
            arguments["width_mults"] = self.model.width_mults()

        def grouped(named: list[tuple[str, Any]]) -> Any:
            if learned:
                return named
            return [  # decay pulls on matrices only, as is usual for GPT-2
                {
                    "params": [(n, p) for n, p in named if p.ndim >= 2],
                    "weight_decay": options.decay(),
                },
                {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
            ]

        called: Any = self.model
        if sharded:
            called, self.optimizer = spread(
                self.model,
                optimizer_class,
                arguments,
                grouped,
                options,
                place.device,
                place.world_size,
            )
        else:
            self.optimizer = optimizer_class(
                grouped(list(self.model.named_parameters())), **arguments
            )
        if options.max_grad_norm is not None and not learned:  # a learned optimizer clips by itself
            inner = getattr(self.optimizer, "inner", self.optimizer)
            clip = package.clip_grad_norm_ if sharded else clip_all

            # a hook that returns something replaces the step's arguments
            def before_step(
                *_: Any,
            ) -> None:
                clip(inner, options.max_grad_norm)

            inner.register_step_pre_hook(before_step)
        # After sharding, which moves the parameters.
        self._forward: Any = torch.compile(called) if options.compile else called
        self._autocast = options.dtype == "bfloat16"
        self._device = place.device
        self._grad_scale = options.grad_scale
        self._keeps_gradients_here = (
            accumulation(called, self.optimizer) if sharded else nullcontext
        )

    def loss(self, windows: np.ndarray) -> Tensor:
        """Mean loss of windows (n, tokens + 1)."""
        tokens = torch.from_numpy(windows).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext():
            loss: Tensor = self._forward(tokens[:, :-1], tokens[:, 1:])[1]
        return loss

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around loss and backward of a micro-batch; `last`: no other follows before `step`."""
        return nullcontext() if last else self._keeps_gradients_here()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch's share of the loss of a step."""
        if self._grad_scale != 1:
            loss = loss * self._grad_scale
        loss.backward()  # type: ignore[no-untyped-call]

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": self.model, "optimizer": self.optimizer}

    def num_parameters(self) -> int:
        return self.model.num_parameters()

    def whole_model(self, options: Options) -> GPT:
        """The model on this rank with all its parameters; call it on all ranks."""
        return whole_model(self.model, options, self._device)

    def step(self, loss: Tensor) -> None:
        """Update the parameters, given this rank's mean `loss`, 0-d, and clear the gradients.

        Raises FloatingPointError for gradients that are no numbers.
        """
        try:
            if self._learned:
                # velo reads it, and averages it over the ranks by itself
                self.optimizer.step(loss=loss)
            else:
                self.optimizer.step()
        except self._nonfinite as error:
            raise FloatingPointError(str(error)) from None
        self.optimizer.zero_grad()


def clip_all(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients of `optimizer` (modified in place) to a global norm of at most
    `max_norm`.
    """
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], max_norm
    )


def import_package() -> Any:
    """pylo_dist, which plain AdamW on one rank does without. Raises WrongInput."""
    try:
        import pylo_dist
    except ImportError as error:
        raise WrongInput(
            f"pylo_dist cannot be imported ({error}); install it: pip install ."
        ) from None
    return pylo_dist


def try_out(optimizer_class: Any, arguments: dict[str, Any]) -> dict[str, str]:
    """Name and hash of the weights. Raises ValueError for arguments or weights that the optimizer
    refuses.
    """
    # the error says what its warnings do
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    weights = optimizer_class([torch.zeros(1, requires_grad=True)], **arguments).weights
    return {"name": weights.name, "hash": weights.digest}


def train(
    learner: Learner | DeepSpeedLearner,
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
    learner: Learner | DeepSpeedLearner,
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


def describe(
    learner: Learner | DeepSpeedLearner,
    data: tuple[Tokens, Tokens | None],
    options: Options,
    place: Place,
    plan: BatchPlan,
    argv: Sequence[str],
) -> dict[str, Any]:
    """What config.json holds: the flags with their defaults filled in, and what they met."""
    flags = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }
    pylo_dist = sys.modules.get("pylo_dist")
    return flags | {
        "command": list(argv),
        "lr": options.base_lr(),
        "weight_decay": options.decay(),
        "max_grad_norm": options.clip_norm(),
        "num_steps": options.planned_steps(),
        "batch_size": plan.global_batch,
        "micro_batch_size": plan.micro_batch,
        "block_size": options.sequence_length(),
        "accumulation": plan.accumulation,
        "world_size": place.world_size,
        "device": place.device.type,
        "threads": torch.get_num_threads(),
        "num_parameters": learner.num_parameters(),
        "weights": learner.weights,
        "train_tokens": data[0].num_tokens,
        "train_digest": data[0].digest(),
        "val_tokens": None if data[1] is None else data[1].num_tokens,
        "model": dataclasses.asdict(options.config()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pylo_dist": getattr(pylo_dist, "__version__", None),
        },
    }


def finish(
    model: GPT, options: Options, plan: BatchPlan, watch: Watch, config: dict[str, Any]
) -> None:
    """Write the plot and the sample of the whole `model`, print the summary. Rank 0 only."""
    unit = options.unit()
    title = f"GPT-2 {options.preset}, {options.optimizer}"
    plot(watch.rows, watch.folder / "loss.png", unit=unit, title=title)
    sample = None
    if unit == "byte":
        start = torch.full((1, 1), ord("\n"), device=next(model.parameters()).device)
        drawn = model.generate(start, 240, seed=options.seed)[0, 1:]
        sample = bytes(token for token in drawn.tolist() if token < 256).decode(errors="replace")
        (watch.folder / "sample.txt").write_text(sample)
    more_ranks = command_for_more_ranks(config["command"], plan)
    print(
        summary(watch.rows, watch.folder, config, unit=unit, more_ranks=more_ranks, sample=sample)
    )


def run(
    argv: Sequence[str], options: Options, place: Place, plan: BatchPlan, found: Environment
) -> None:
    """One run on ranks that have met. Raises WrongInput before training, Diverged and Stopped
    during it.
    """
    is_first = place.rank == 0
    place.agree(options.shared())
    if options.save_every:
        place.together(package)
    start = place.from_first(lambda: Start.find(options))
    folder, resumes = start.folder, start.checkpoint is not None
    if not resumes:
        # What a run left that was killed before its first checkpoint is not in the way of one that
        # restarts by itself.
        overwrite = options.overwrite or (
            options.resume is not None and place.from_first(lambda: is_leftover(folder))
        )
        place.together(lambda: open_folder(folder, overwrite=overwrite) if is_first else None)
    data = open_data(options, place)
    learner: Learner | DeepSpeedLearner
    if options.deepspeed is None:
        learner = Learner(options, place)
    else:
        learner = DeepSpeedLearner(options, place, plan.accumulation, plan.micro_batch)
    config = describe(learner, data, options, place, plan, argv)
    done, seen, rows = resume(start, learner, config, options, place) if resumes else (0, 0, [])
    said = [f"{found}."]
    if options.recipe is not None:
        said.append(f"recipe {options.recipe.stem}, cost: {recipe.read(options.recipe)['cost']}.")
    watch = place.together(lambda: Watch(options, folder, config, rows, said) if is_first else None)
    report = learner.optimizer.report() if hasattr(learner.optimizer, "report") else None
    if watch is not None and report is not None:
        (folder / "optimizer.txt").write_text(f"{report}\n")
    keeper = (
        Keeper(options, folder, learner, config, is_first=is_first) if options.save_every else None
    )
    try:
        with keeper or nullcontext():
            train(learner, data, options, place, plan, watch, done=done, seen=seen, keeper=keeper)
    finally:
        if watch is not None:
            watch.close()
    model = learner.whole_model(options)
    if watch is not None and watch.rows:  # none where a run was done whose metrics.jsonl is lost
        finish(model, options, plan, watch, config)
    if is_first:
        (folder / DONE).write_text(f"{options.steps} steps\n")


def resume(
    start: Start,
    learner: Learner | DeepSpeedLearner,
    config: dict[str, Any],
    options: Options,
    place: Place,
) -> tuple[int, int, list[Row]]:
    """Bring `learner` to where the checkpoint was (modified in place): steps done, sequences read,
    and the rows on rank 0.

    Raises WrongInput for a checkpoint that does not fit or is damaged, before anything has changed.
    """
    step, seen, others = place.together(lambda: check(start, options, config))
    is_first = place.rank == 0
    opens = is_first and not start.goes_on  # a folder of its own; the run that goes on has one
    rows = rows_until(start.source, step) if is_first and start.source is not None else []
    place.together(
        lambda: check_folder(start.folder, overwrite=options.overwrite) if opens else None
    )
    load(start, learner)
    place.together(
        lambda: open_folder(start.folder, overwrite=options.overwrite) if opens else None
    )
    if is_first:
        for path in start.newer(step):
            remove(path)
        tell(
            f"goes on after step {step} from {start.checkpoint}"
            + (f", with {others}" if others else "")
            + "."
        )
        if len(rows) < step:
            tell(
                f"metrics.jsonl of that run holds {len(rows)} of {step} steps; the others are lost."
            )
    config["resumed_from"] = {"checkpoint": str(start.checkpoint), "step": step}
    return step, seen, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    own = environment.rank_named()
    try:
        found = environment.find()
    except ValueError as error:
        return complain(error, code=2, rank=own)
    try:
        options = parse(argv)
        place = Place.find(options, found)
        plan = options.plan(data_ranks(options, place.world_size))
    except ValueError as error:  # of the command, and alike on all ranks, or of this machine
        return complain(error, code=2, rank=own, aloud=environment.is_first_here())
    if found != Environment("no launcher"):
        found.export()
    # Set in any case: left to itself, MKL may take fewer now and then, and round otherwise.
    torch.set_num_threads(options.threads or torch.get_num_threads())
    try:
        place.join(options.timeout)
    except RuntimeError as error:
        tell(f"{found}, and did not: {error}")
        return 1
    code, first = 0, place.rank == 0
    try:
        run(argv, options, place, plan, found)
    except WrongInput as error:
        code = complain(error, code=2, aloud=first)
    except Diverged as error:
        code = complain(error, code=3, aloud=first)
    except Unsaved as error:
        code = complain(error, code=1, aloud=first)
    except Stopped as error:
        code = complain(error, code=128 + signal.SIGTERM, aloud=first)
    except Exception:
        if place.world_size == 1:
            raise
        # Of the others some may be gone: neither wait for them, nor leave a group behind that can
        # abort this process.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    place.leave()
    return code


def complain(error: Exception, code: int, *, rank: str = "0", aloud: bool = True) -> int:
    """One line that names a rank other than 0, where `aloud`; the code, for a launcher's caller
    too.
    """
    if aloud:
        who = "" if rank == "0" else f"rank {rank}: "
        print(f"gpt2.py: {who}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if "EXIT_CODE_FILE" in os.environ:
        with suppress(OSError):
            path = Path(os.environ["EXIT_CODE_FILE"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by sys.exit: DeepSpeed's modules hold process groups to the end, whose threads then now
    # and then abort the process.
    os._exit(exit_code)
