"""One run, on ranks that have met: its data, its learner, where it goes on from, and the files it
writes.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import picture
import recipe
import torch
from checkpoints import (
    Keeper,
    Start,
    Stopped,
    Unsaved,
    check,
    is_damaged,
    load,
    package,
    remove,
    set_aside,
    tell,
)
from claim import Claim, InUse
from data import BatchPlan, Tokens, builtin_text
from ds import DeepSpeedLearner
from environment import Environment
from learner import Learner, Trainable
from loop import Diverged, train
from model import GPT
from options import Options, WrongInput, command_for_more_ranks
from place import Place
from watch import (
    BESIDE,
    DONE,
    Beside,
    Row,
    Watch,
    check_folder,
    escaped,
    is_leftover,
    open_folder,
    optional,
    rows_until,
    summary,
)


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


def describe(
    learner: Trainable,
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


@dataclass(frozen=True, slots=True)
class Trained:
    """What is left of a run whose model and optimizer are gone.

    Attributes:
        watch: on rank 0.
        sample: text of the model, on rank 0.
        unsaved: what kept rank 0 from saying that the run is done.
    """

    folder: Path
    data: tuple[Tokens, Tokens | None]
    config: dict[str, Any]
    watch: Watch | None
    sample: str | None
    unsaved: Unsaved | None


def written_by(model: GPT, options: Options, folder: Path) -> str | None:
    """Text of the whole `model`, also in sample.txt; None of one that knows no letters."""
    if options.unit() != "byte":
        return None
    start = torch.full((1, 1), ord("\n"), device=next(model.parameters()).device)
    drawn = model.generate(start, 240, seed=options.seed)[0, 1:]
    text = bytes(token for token in drawn.tolist() if token < 256).decode(errors="replace")
    sample = escaped(text)
    with optional(folder / "sample.txt") as path:
        path.write_text(sample, encoding="utf-8")
    return sample


def draw(done: Trained, options: Options, beside: Beside | None = None) -> None:
    """loss.png. Rank 0 only."""
    assert done.watch is not None
    used = "" if done.config["weights"] is None else f", weights {done.config['weights']['name']}"
    picture.draw(
        done.watch.rows,
        done.folder / "loss.png",
        unit=options.unit(),
        title=f"GPT-2 {options.preset}, {done.config['num_parameters'] / 1e6:.2f}M parameters, "
        f"{options.optimizer}{used}",
        name=options.optimizer,
        beside=beside,
    )


def finish(done: Trained, options: Options, plan: BatchPlan, beside: Beside | None) -> None:
    """Write the plot, print the summary. Rank 0 only."""
    assert done.watch is not None
    draw(done, options, beside)
    screen = summary(
        done.watch.rows,
        done.folder,
        done.config,
        unit=options.unit(),
        more_ranks=command_for_more_ranks(done.config["command"], plan),
        sample=done.sample,
        beside=beside,
    )
    # of a terminal that has not every letter
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with suppress(OSError):  # where it goes to may be full
        print(screen.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def run(
    argv: Sequence[str], options: Options, place: Place, plan: BatchPlan, found: Environment
) -> None:
    """One run on ranks that have met. Raises WrongInput and InUse before training, Diverged and
    Stopped during it.
    """
    place.agree(options.shared())
    if options.save_every:
        place.together(package)
    with Claim() as claim:

        def find() -> tuple[Start, str | None]:
            start = Start.find(options)
            holder = claim.take(start.folder)
            # again, since the one that held it may have ended just now
            return replace(Start.find(options), folder=start.folder), holder

        start, holder = place.from_first(find)
        if holder is not None:
            raise InUse(
                f"--out {start.folder}: another run is there ({holder}); let it end, or choose "
                "another folder."
            )
        done = run_from(start, argv, options, place, plan, found)
        # of a run that was done, and whose metrics.jsonl is lost, there is nothing to draw
        is_drawn = place.from_first(lambda: bool(done.watch and done.watch.rows))
        beside = None
        if options.beside is not None and is_drawn:
            if done.watch is not None:
                draw(done, options)  # since a run may be killed while the other one trains
            try:
                beside = run_beside(done, argv, options, place, plan)
            except (KeyboardInterrupt, Stopped) as error:
                if done.watch is not None:
                    finish(done, options, plan, None)
                kept = f"the run is done; {options.beside} beside it was stopped"
                raise type(error)(kept) from None
        if done.watch is not None and is_drawn:
            finish(done, options, plan, beside)
        if done.unsaved is not None:
            raise done.unsaved


def run_from(
    start: Start,
    argv: Sequence[str],
    options: Options,
    place: Place,
    plan: BatchPlan,
    found: Environment,
) -> Trained:
    """The run itself, in a folder that no other has."""
    is_first = place.rank == 0
    folder, resumes = start.folder, start.checkpoint is not None
    if not resumes:
        # What a run left that was killed before its first checkpoint is not in the way of one that
        # restarts by itself.
        overwrite = options.overwrite or (
            options.resume is not None and place.from_first(lambda: is_leftover(folder))
        )
        place.together(lambda: open_folder(folder, overwrite=overwrite) if is_first else None)
    data = open_data(options, place)
    learner: Trainable
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
        with optional(folder / "optimizer.txt") as path:
            path.write_text(f"{report}\n")
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
    unsaved = None
    if is_first:
        try:  # before the rest, which a run can do without
            (folder / DONE).write_text(f"{options.steps} steps\n")
        except OSError as error:
            unsaved = Unsaved(
                f"the run is done, and {folder / DONE} cannot be written ({error.strerror})"
            )
    sample = written_by(model, options, folder) if is_first else None
    return Trained(folder, data, config, watch, sample, unsaved)


def run_beside(
    done: Trained, argv: Sequence[str], options: Options, place: Place, plan: BatchPlan
) -> Beside:
    """Train the optimizer of --beside on the samples of a run that is done, in a folder within its
    own, unless that was done before. What goes wrong there is one line: the run stays done. Call it
    on all ranks.
    """
    gc.collect()  # a hook and its optimizer hold each other, and would be in memory with the next
    own = options.of_beside(done.folder / BESIDE)
    watch, folder, is_first = None, done.folder / BESIDE, place.rank == 0
    try:
        place.together(lambda: folder.mkdir(exist_ok=True) if is_first else None)
        learner = Learner(own, place)
        config = describe(learner, done.data, own, place, plan, argv)
        earlier = place.from_first(lambda: rows_of(folder, config, own.steps))
        if earlier is not None:
            return Beside(own.optimizer, own.base_lr(), earlier)
        said = [f"beside it, {own.optimizer} at lr {own.base_lr():g} on the same samples."]
        watch = place.together(lambda: Watch(own, folder, config, (), said) if is_first else None)
        train(learner, done.data, own, place, plan, watch)
    except (WrongInput, Diverged) as error:  # alike on all ranks
        if is_first:
            tell(f"{own.optimizer} beside it: {error}")
    finally:
        if watch is not None:
            watch.close()
    return Beside(own.optimizer, own.base_lr(), watch.rows if watch is not None else ())


def rows_of(folder: Path, config: Mapping[str, Any], steps: int) -> list[Row] | None:
    """The rows of a run in `folder` that has done all its steps, if `config` says what it was but
    for how it was started; else None.
    """
    how = ("command", "resume", "overwrite", "out")

    def what(config: Any) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in how}

    try:
        then = json.loads((folder / "config.json").read_text())
        is_same = what(then) == what(json.loads(json.dumps(config)))
    except (OSError, ValueError, AttributeError):  # lost, or damaged
        return None
    rows = rows_until(folder, steps)
    return rows if is_same and [row.step for row in rows] == list(range(1, steps + 1)) else None


def resume(
    start: Start,
    learner: Trainable,
    config: dict[str, Any],
    options: Options,
    place: Place,
) -> tuple[int, int, list[Row]]:
    """Bring `learner` to where the checkpoint was (modified in place): steps done, sequences read,
    and the rows on rank 0.

    Of --resume auto a damaged checkpoint is passed over, for the one before it. Raises WrongInput
    for a checkpoint that does not fit, or is damaged, before anything has changed.
    """
    is_first = place.rank == 0
    while True:
        try:
            step, seen, others, rows = load_from(start, learner, config, options, place)
            break
        except WrongInput as error:
            assert start.checkpoint is not None
            if not start.earlier or not is_damaged(start.checkpoint):
                raise
            if is_first:
                tell(f"{start.checkpoint} is passed over: {error}")
            start = start.before()
    opens = is_first and not start.goes_on  # a folder of its own; the run that goes on has one
    place.together(lambda: [set_aside(path) for path in start.damaged] if is_first else None)
    place.together(
        lambda: open_folder(start.folder, overwrite=options.overwrite) if opens else None
    )
    newer = start.newer(step) if is_first else []
    place.together(lambda: [remove(path) for path in newer])
    if is_first:
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


def load_from(
    start: Start,
    learner: Trainable,
    config: dict[str, Any],
    options: Options,
    place: Place,
) -> tuple[int, int, str, list[Row]]:
    """Load one checkpoint (`learner` is modified in place): the step, the sequences read, what is
    other than it was, and the rows on rank 0. Raises WrongInput before anything has changed.
    """
    step, seen, others = place.together(lambda: check(start, options, config))
    is_first = place.rank == 0
    source = start.source if is_first else None
    rows = place.together(lambda: rows_until(source, step) if source is not None else [])
    opens = is_first and not start.goes_on
    place.together(
        lambda: check_folder(start.folder, overwrite=options.overwrite) if opens else None
    )
    load(start, learner)
    return step, seen, others, rows
