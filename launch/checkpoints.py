"""Checkpoints of a run: where they lie, what they hold beside model and optimizer, when they are
made, and the way back in.

    OUT/checkpoints/step-00000050            one folder each, of pylo_dist.checkpoint: published
                                             complete, with checksums, or not at all
    OUT/checkpoints/damaged-step-00000050    what --resume auto has passed over; nothing deletes it

A run needs no random state: its samples are a function of seed, step and global batch, and nothing
else is drawn while it trains.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from options import AUTO, Options, WrongInput, flag

if TYPE_CHECKING:
    from learner import Trainable

FOLDER = "checkpoints"
TRIES = 10  # between two saves, after one that failed
NAME = re.compile(r"step-(\d{8,})")
# Entries of config.json. With another of these, the numbers of a checkpoint would mean something
# else:
FIXED = ("optimizer", "model")
# With another of these a run is as valid, and no longer the same:
TOLD = (
    *(
        "lr",
        "weight_decay",
        "max_grad_norm",
        "num_steps",
        "warmup",
        "schedule",
        "batch_size",
        "micro_batch_size",
        "block_size",
    ),
    *("seed", "steps", "dtype", "compile", "device", "threads", "world_size"),
    *("parallel", "replicas", "tp", "clip", "state_dtype", "grad_scale", "order"),
)
# what earlier versions did, whose config.json does not say so
ADDED = {"clip": "global", "state_dtype": "float32", "grad_scale": 1.0, "order": "random"}


class Stopped(Exception):
    """SIGTERM ended a run that has been saved; the message is one line."""


class Unsaved(Exception):
    """A checkpoint could not be written."""


# ------------------------------------------------------------------------------------------ folders


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step of the run in `folder`."""
    return folder / FOLDER / f"step-{step:08d}"


def published_in(folder: Path) -> dict[int, Path]:
    """By step, ascending, the published checkpoints of the run in `folder`."""
    if not (folder / FOLDER).is_dir():
        return {}
    named = {path: NAME.fullmatch(path.name) for path in package().published(folder / FOLDER)}
    return dict(sorted((int(matched[1]), path) for path, matched in named.items() if matched))


def remove(path: Path) -> None:
    """Delete a folder, or do nothing where there is none. Killed halfway, it leaves nothing under
    the folder's name.
    """
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)  # of a removal that was killed
    if path.is_dir():
        path.rename(aside)
        shutil.rmtree(aside)


def clear(folder: Path) -> None:
    """Delete what killed saves and removals of the run in `folder` have left."""
    package().clear(folder / FOLDER)
    for path in (folder / FOLDER).glob(".*.removed"):
        shutil.rmtree(path, ignore_errors=True)


def empty(folder: Path) -> None:
    """Delete all checkpoints of the run in `folder`, and what killed saves have left; what another
    process is still writing stays.
    """
    if (folder / FOLDER).is_dir():
        clear(folder)
        for path in (folder / FOLDER).iterdir():
            if path.is_dir() and not path.name.startswith("."):
                remove(path)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that no run takes for a step; its path then. Raises
    WrongInput.
    """
    aside = path.with_name(f"damaged-{path.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged-{path.name}.{number}")
    try:
        return path.rename(aside)
    except OSError as error:
        raise WrongInput(
            f"--resume auto: {path} is damaged and cannot be renamed: {error}"
        ) from None


def package() -> Any:
    """pylo_dist.checkpoint, which runs without checkpoints do without. Raises WrongInput."""
    try:
        import pylo_dist.checkpoint
    except ImportError as error:
        raise WrongInput(
            f"pylo_dist cannot be imported ({error}); install it: pip install ."
        ) from None
    return pylo_dist.checkpoint


# ------------------------------------------------------------------------------------- the way back


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run is written, and what it goes on from.

    Attributes:
        folder: of config.json and the like.
        checkpoint: None for a run from its first step.
        source: the folder of the run that the checkpoint belongs to, if it lies in one.
        earlier: of --resume auto the checkpoints before that one, the newest first.
        damaged: those that have been passed over, newer than that one.
    """

    folder: Path
    checkpoint: Path | None = None
    source: Path | None = None
    earlier: tuple[Path, ...] = ()
    damaged: tuple[Path, ...] = ()

    @classmethod
    def find(cls, options: Options) -> Start:
        """What --out and --resume name. Looks at names only. Raises WrongInput."""
        if options.resume is None:
            return cls(options.out_folder())
        if options.resume == AUTO:
            assert options.out is not None
            newest, *earlier = [*reversed(published_in(options.out).values())] or [None]
            source = options.out if newest is not None else None
            return cls(options.out, newest, source, tuple(earlier))
        path = Path(options.resume).resolve()
        is_one = path in package().published(path.parent)
        checkpoint = path if is_one else next(reversed(published_in(path).values()), None)
        if checkpoint is None:
            raise WrongInput(
                f"--resume {path}: no published checkpoint there; name a folder step-... of a run "
                "that was started with --save-every, or the run's own."
            )
        parent = checkpoint.parent
        source = parent.parent if parent.name == FOLDER else None
        return cls(options.out or source or options.out_folder(), checkpoint, source)

    @property
    def goes_on(self) -> bool:
        """Whether it continues the very run that the checkpoint belongs to."""
        return self.source is not None and self.folder.resolve() == self.source.resolve()

    def before(self) -> Start:
        """The same from the checkpoint before, this one being damaged."""
        assert self.checkpoint is not None
        checkpoint, *earlier = self.earlier
        damaged = (*self.damaged, self.checkpoint)
        return Start(self.folder, checkpoint, self.source, tuple(earlier), damaged)

    def newer(self, step: int) -> list[Path]:
        """Checkpoints of a run continued at `step` that it would come by again."""
        found = published_in(self.folder).items() if self.goes_on else ()
        return [path for n, path in found if n > step and path not in self.damaged]


def check(start: Start, options: Options, config: Mapping[str, Any]) -> tuple[int, int, str]:
    """The step of the checkpoint, the sequences read until then, and in one line what differs from
    the run that saved it.

    Changes nothing.

    Args:
        config: what `run.describe` gives of this run.

    Raises:
        WrongInput: this run cannot go on from the checkpoint.
    """
    checkpoint = start.checkpoint
    assert checkpoint is not None
    meta = package().read_meta(checkpoint)
    step, saved = meta.get("step"), meta.get("config")
    saved = {**ADDED, **saved} if isinstance(saved, dict) else {}
    batch, block = saved.get("batch_size"), saved.get("block_size")
    numbers = [step, batch, block]
    if all(type(number) is int for number in numbers):
        numbers.append(meta.get("sequences", step * batch))
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise WrongInput(
            f"--resume {checkpoint}: a checkpoint, but not one that gpt2.py has saved."
        )
    seen = numbers[-1]
    for name in FIXED:
        here, there = json.loads(json.dumps(config[name])), saved.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            name, here, there = next(
                ((k, here[k], there.get(k)) for k in here if here[k] != there.get(k)), (name, 0, 0)
            )
        if here != there:
            raise WrongInput(
                f"--resume {checkpoint}: saved with {name} {there}, this run has {here}; pass the "
                "same flags."
            )
    if (
        config["order"] == saved["order"] == "stream"
        and config["block_size"] != saved["block_size"]
    ):
        raise WrongInput(
            f"--resume {checkpoint}: its place in --order stream counts sequences of --block-size "
            f"{saved['block_size']}, this run has {config['block_size']}: tokens would be lost or "
            "repeated; pass the same."
        )
    if step > options.steps:
        raise WrongInput(
            f"--resume {checkpoint}: saved after step {step}, and --steps is {options.steps}; pass "
            "more."
        )
    newer = start.newer(step)
    if newer and not options.overwrite:
        raise WrongInput(
            f"--resume {checkpoint}: {newer[-1].name} of the same run is newer; resume from that, "
            "name another --out, or pass --overwrite to drop it."
        )
    others = [
        f"{flag(k)} {config[k]} (was {saved.get(k)})" for k in TOLD if config[k] != saved.get(k)
    ]
    others += [
        f"other {what}"
        for k, what in (("train_digest", "tokens"), ("versions", "versions"))
        if config[k] != saved.get(k)
    ]
    return step, seen, ", ".join(others)


def load(start: Start, learner: Trainable) -> None:
    """Give model and optimizer of `learner` the checkpoint's numbers (both modified in place); call
    it on all ranks.

    Hyperparameters stay those of this run's command line, which may be others.

    Raises:
        WrongInput: on all ranks; nothing has changed then.
    """
    optimizer = learner.optimizer
    own = [
        {key: group[key] for key in optimizer.defaults if key in group}
        for group in optimizer.param_groups
    ]
    try:
        package().load(start.checkpoint, learner.states())
    except ValueError as error:
        named = str(start.checkpoint) in str(error)
        raise WrongInput(
            f"--resume: {error}" if named else f"--resume {start.checkpoint}: {error}"
        ) from None
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint's files are not those that were written; call it on all ranks."""
    try:
        package().verify(path)
    except ValueError:
        return True
    return False


# ------------------------------------------------------------------------------------------- saving


class Keeper:
    """Saves a run every so many steps, at its end, and when SIGTERM asks it to stop. On every rank.

    As a context it listens for SIGTERM, and for SIGUSR1, which mpirun passes on and does not itself
    end at.
    """

    def __init__(
        self,
        options: Options,
        folder: Path,
        learner: Trainable,
        config: Mapping[str, Any],
        *,
        is_first: bool,
    ) -> None:
        self.asked = False  # to stop, on this rank
        self._options, self._folder, self._learner, self._config = options, folder, learner, config
        self._is_first = is_first
        self._owed = False  # the save before has failed
        self._told = False  # of what could not be deleted
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        if is_first:
            clear(folder)
            self._drop_old()  # which a run may have been killed in

    def __enter__(self) -> Keeper:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _drop_old(self) -> None:
        """Of the published checkpoints leave the --keep newest."""
        if self._options.keep is not None:
            try:
                for old in list(published_in(self._folder).values())[: -self._options.keep]:
                    remove(old)
            except OSError as error:
                if not self._told:
                    tell(f"a checkpoint that is not kept cannot be deleted ({error}).")
                self._told = True

    def after(self, step: int, *, sequences: int, stop: bool) -> None:
        """Save a step that is done if it is its turn; call it on all ranks, with the same `stop`.

        Where that fails, as on a full disk, the run goes on and tries again soon; the earlier
        checkpoints are as they were.

        Args:
            sequences: read until then.

        Raises:
            Stopped: `stop` is set, and the step has been saved.
            Unsaved: on all ranks: the last step, or that of `stop`, could not be saved.
        """
        every, last = self._options.save_every, self._options.steps
        again = self._owed and step % max(1, every // TRIES) == 0
        if step % every and step != last and not stop and not again:
            return
        path = path_of(self._folder, step)
        try:
            package().save(
                path,
                self._learner.states(),
                meta={"step": step, "sequences": sequences, "config": self._config},
            )
        except ValueError as error:
            said = f"the checkpoint of step {step} was not written: {' '.join(str(error).split())}"
            if stop or step == last:
                raise Unsaved(said) from None
            self._owed = True
            if self._is_first:
                tell(f"{said}; the run goes on, and tries again.")
            return
        self._owed = False
        if self._is_first:
            self._drop_old()
        if stop and step != last:
            raise Stopped(
                f"SIGTERM: stopped after step {step}, saved in {path}; the same command with "
                "--resume auto goes on."
            )


def tell(line: str) -> None:
    """A line for the user, beside those of the progress. Where it goes to may be full."""
    with suppress(OSError):
        print(f"gpt2.py: {line}", file=sys.stderr, flush=True)
