"""What a person sees of a run: progress, metrics.jsonl, loggers, the summary. Rank 0 only."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claim
from checkpoints import FOLDER, empty, tell
from options import Options, WrongInput
from tqdm import tqdm

METRICS = "metrics.jsonl"
DONE = "DONE"  # of a run that has all its steps; launch/resume_loop.sh stops where it is
WRITTEN = ("config.json", METRICS, "optimizer.txt", "loss.png", "sample.txt", DONE)
BESIDE = "beside"  # the folder, within that of a run, of what --beside has trained
PLAIN_LINES = 20  # of a run whose stderr is no terminal
Logger = Callable[[dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One training step. Times in milliseconds; the loss is the global batch's mean before the
    update.
    """

    step: int
    loss: float
    val_loss: float | None  # after the update, where it was measured
    tokens_per_s: float
    step_ms: float
    optimizer_ms: float  # optimizer.step() with its collectives
    lr: float

    @classmethod
    def parse(cls, line: str) -> Row:
        """A line of metrics.jsonl. ValueError where it is none."""
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("a line that is no object")
        try:
            return cls(**{"val_loss": None} | values)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def as_dict(self) -> dict[str, float]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None}


def rows_until(folder: Path, step: int) -> list[Row]:
    """Of the run in `folder` the rows up to `step`, the last of each step. No file, no rows; what
    is no row is left out.

    A process that was killed may leave half a line, and rows of steps that no checkpoint has seen.
    """
    path, rows = folder / METRICS, {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = Row.parse(line)
        except ValueError:
            continue
        rows[row.step] = row
    return [rows[n] for n in sorted(rows) if n <= step]


def is_leftover(folder: Path) -> bool:
    """Whether all that lies in `folder` is what a run writes, as where one was killed before its
    first checkpoint; not of a run that is done.
    """
    ours = {*WRITTEN, f"{METRICS}.part", FOLDER, BESIDE, claim.NAME, "tensorboard", "wandb"}
    checkpoints = (folder / FOLDER).iterdir() if (folder / FOLDER).is_dir() else ()
    return (
        folder.is_dir()
        and not (folder / DONE).exists()
        and all(path.name in ours for path in folder.iterdir())
        and all(path.name.startswith(".") for path in checkpoints)  # unpublished
    )


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise WrongInput for a folder in use."""
    if folder.exists() and not folder.is_dir():
        raise WrongInput(f"--out {folder} is a file; name a folder.")
    there = folder.iterdir() if folder.is_dir() else ()
    if any(path.name != claim.NAME for path in there) and not overwrite:
        raise WrongInput(f"--out {folder} is not empty; choose another folder or pass --overwrite.")


def open_folder(folder: Path, *, overwrite: bool) -> None:
    """Make `folder`, or empty it of an earlier run's files and checkpoints; hold its claim. Raises
    WrongInput for a folder in use.
    """
    check_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty(folder)  # before the rest: no later run shall take one of them for its own
        for name in WRITTEN:
            (folder / name).unlink(missing_ok=True)
            (folder / BESIDE / name).unlink(missing_ok=True)
        with suppress(OSError):  # none there, or with files that are none of ours
            (folder / BESIDE).rmdir()
    except OSError as error:
        raise WrongInput(
            f"--out {folder} cannot be written ({error.strerror}); choose another folder."
        ) from None


@contextmanager
def optional(path: Path) -> Iterator[Path]:
    """Around the writing of a file that a run can do without: where the disk is full, say so."""
    try:
        yield path
    except OSError as error:
        tell(f"{path} cannot be written ({error.strerror}); the run goes on without it.")


class Remaining:
    """How long the steps that are left may take, from those since the first row."""

    def __init__(self, steps: int, now: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._now = steps, now
        self._first: tuple[int, float] | None = None

    def after(self, row: Row) -> str:
        """As "0:42", "1:02:03" or "2 d 03:04:05"; validations and checkpoints count as they come.
        The first row knows its own step alone.
        """
        if self._first is None:
            self._first = row.step, self._now()
        step, since = self._first
        per_step = (
            row.step_ms / 1e3 if row.step == step else (self._now() - since) / (row.step - step)
        )
        minutes, seconds = divmod(round(per_step * (self._steps - row.step)), 60)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        if days:
            return f"{days} d {hours:02}:{minutes:02}:{seconds:02}"
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Watch:
    """Shows and records rows as they come.

    A disk that is full ends no run, nor does a folder that somebody removes: what could not be
    written of config.json and metrics.jsonl is kept, and written with a later row.
    """

    def __init__(
        self,
        options: Options,
        folder: Path,
        config: Mapping[str, Any],
        earlier: Sequence[Row] = (),
        said: Sequence[str] = (),
    ) -> None:
        """Begin with the lines `said`.

        `earlier`: the rows before this run, where it goes on from a checkpoint; metrics.jsonl then
            holds these alone.
        """
        self.rows: list[Row] = list(earlier)
        self.folder = folder
        self._measured = next(
            (row for row in reversed(self.rows) if row.val_loss is not None), None
        )
        done = self.rows[-1].step if self.rows else 0
        self._loggers, self._closers = _open_loggers(options, folder, config, done)
        self._unwritten, self._behind = b"", False
        self._config = json.dumps(config, indent=2) + "\n"
        try:
            (folder / DONE).unlink(missing_ok=True)
            self._metrics = self._begin()
        except OSError as error:
            raise WrongInput(
                f"--out {folder} cannot be written ({error.strerror}); make room there, or choose "
                "another folder."
            ) from None
        self._plain_every = -(-options.steps // PLAIN_LINES)
        self._steps, self._remaining = options.steps, Remaining(options.steps)
        for line in said:
            tell(line)
        # On a terminal tqdm redraws one line; elsewhere a plain line now and then reads better.
        self._bar = (
            tqdm(total=options.steps, initial=done, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._measured = self._measured if row.val_loss is None else row
        remaining = self._remaining.after(row)  # of every row: the first says when it all began
        values = row.as_dict()
        self._record(json.dumps(values) + "\n")
        for log in list(self._loggers):
            try:
                log(values)
            except OSError as error:
                self._loggers.remove(log)
                tell(f"{self.folder}: a logger cannot write ({error}); the run goes on without it.")
        if self._bar is not None:
            # it is redrawn, so a value stays in sight, with the step it is of
            self._bar.set_postfix_str(_line(row, self._measured), refresh=False)
            self._bar.update()
        elif (
            row.step % self._plain_every == 0
            or row.step in (1, self._steps)
            or row.val_loss is not None
        ):
            with suppress(OSError):  # where it goes to may be full
                print(
                    f"step {row.step}/{self._steps}  {_line(row)}  {remaining} left",
                    file=sys.stderr,
                    flush=True,
                )

    def _begin(self) -> Any:
        """Write config.json, and metrics.jsonl with the rows so far; that file, to be added to."""
        (self.folder / "config.json").write_text(self._config)
        aside = self.folder / f"{METRICS}.part"
        aside.write_text("".join(json.dumps(row.as_dict()) + "\n" for row in self.rows))
        os.replace(aside, self.folder / METRICS)
        return (self.folder / METRICS).open("ab", buffering=0)  # a crash loses no line

    def _is_gone(self) -> bool:
        """Whether somebody has removed metrics.jsonl, or put another file in its place."""
        try:
            return not claim.is_at(self.folder / METRICS, self._metrics.fileno())
        except OSError:  # it cannot be looked at, and may be written all the same
            return False

    def _record(self, line: str) -> None:
        """Append to metrics.jsonl what is not there yet."""
        self._unwritten += line.encode()
        try:
            if self._is_gone():
                self.folder.mkdir(parents=True, exist_ok=True)
                again = self._begin()
                self._metrics.close()
                self._metrics, self._unwritten = again, b""
                tell(f"{self.folder / METRICS} was removed, and has been written anew.")
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            if not self._behind:
                tell(
                    f"{self.folder / METRICS} cannot be written ({error.strerror}); the run goes "
                    "on, and keeps its rows until there is room."
                )
            self._behind = True
        else:
            self._behind = False

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._record("")
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            tell(
                f"{self.folder / METRICS}: the last {lost} rows could not be written and are lost."
            )
        self._metrics.close()
        for close in self._closers:
            close()


def _line(row: Row, measured: Row | None = None) -> str:
    """A row in words; `measured`: the one with the last validation, where this has none."""
    val = ""
    if row.val_loss is not None:
        val = f"  val {row.val_loss:.4f}"
    elif measured is not None:
        val = f"  val {measured.val_loss:.4f} at step {measured.step}"
    return (
        f"loss {row.loss:.4f}{val}  {row.tokens_per_s:,.0f} tokens/s  {row.step_ms:.0f} "
        f"ms/step  optimizer {row.optimizer_ms / row.step_ms:.0%}"
    )


def _open_loggers(
    options: Options, folder: Path, config: Mapping[str, Any], done: int
) -> tuple[list[Logger], list[Callable[[], None]]]:
    """Functions that record a row elsewhere, and those that end it. `done`: steps before this run;
    later ones are dropped.
    """
    loggers: list[Logger] = []
    closers: list[Callable[[], None]] = []
    if options.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise WrongInput("--tensorboard needs a package: pip install tensorboard") from None
        board: Any = SummaryWriter(folder / "tensorboard", purge_step=done + 1 if done else None)

        def to_board(values: dict[str, float]) -> None:
            for name, value in values.items():
                if name != "step":
                    board.add_scalar(name, value, int(values["step"]))

        loggers.append(to_board)
        closers.append(board.close)
    if options.wandb:
        try:
            import wandb
        except ImportError:
            raise WrongInput("--wandb needs a package: pip install wandb") from None
        try:
            run = wandb.init(project="pylo_dist", dir=folder, config=dict(config))
        except Exception as error:  # wandb has many, and each means the same here
            reason = " ".join(str(error).split())
            raise WrongInput(
                f"--wandb cannot start ({reason}); run wandb login or drop the flag."
            ) from None
        loggers.append(lambda values: run.log(values, step=int(values["step"])))
        closers.append(run.finish)
    return loggers, closers


def escaped(text: str) -> str:
    """`text` with what a terminal would obey, not show, as Python writes it: \\x1b. Newlines and
    tabs stay.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


@dataclass(frozen=True, slots=True)
class Beside:
    """What was trained on the samples of a run, to be shown beside it."""

    name: str
    lr: float
    rows: Sequence[Row]


def last_loss(rows: Sequence[Row]) -> tuple[str, float]:
    """What a run has come to, and how that was measured: "validation", where it was, else
    "training", the mean of the last ten steps.
    """
    val = [row.val_loss for row in rows if row.val_loss is not None]
    return ("validation", val[-1]) if val else ("training", _mean_of_tail(rows))


def _mean_of_tail(rows: Sequence[Row]) -> float:
    return statistics.fmean(row.loss for row in rows[-10:])


def summary(
    rows: list[Row],
    folder: Path,
    config: Mapping[str, Any],
    *,
    unit: str,
    more_ranks: str,
    sample: str | None,
    beside: Beside | None = None,
) -> str:
    """The last screen of a run. `sample`: text of the model, `escaped`."""
    last = rows[-1]
    val = [row.val_loss for row in rows if row.val_loss is not None]
    # the median leaves the slow first steps out
    step_ms = statistics.median(row.step_ms for row in rows)
    optimizer_ms = statistics.median(row.optimizer_ms for row in rows)
    tokens = statistics.median(row.tokens_per_s for row in rows)
    weights = config["weights"]
    used = "" if weights is None else f", weights {weights['name']} ({weights['hash'][:12]})"
    lines = [
        "",
        f"{config['preset']}, {config['num_parameters']:,} parameters, {last.step} steps, "
        f"{config['world_size']} rank(s)",
        f"  optimizer   {config['optimizer']}, lr {config['lr']:g}{used}",
        f"  train loss  {_mean_of_tail(rows):.4f} nats per {unit} (mean of the last "
        f"{min(10, len(rows))} steps)",
        "  validation  "
        f"{f'{val[-1]:.4f} nats per {unit}' if val else 'not measured (--eval-every 0)'}",
        f"  speed       {tokens:,.0f} tokens/s, {step_ms:.1f} ms per step (optimizer "
        f"{optimizer_ms:.1f})",
        f"  files       {folder}: "
        f"{', '.join(name for name in WRITTEN if (folder / name).exists())}",
        f"  more ranks  {more_ranks}",
    ]
    if beside is not None and beside.rows:
        measured, loss = last_loss(beside.rows)
        lines.insert(
            5, f"  beside it   {measured} {loss:.4f} of {beside.name}, lr {beside.lr:g}, untuned"
        )
    if sample is not None:
        lines += ["  it writes", *("    | " + line[:100] for line in sample.split("\n")[:8])]
    return "\n".join(lines)
