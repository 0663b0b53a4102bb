"""The command line of gpt2.py: flags, defaults, and the checks that need neither files nor other
ranks.

`read` takes flags as they are, and needs no PyTorch; `parse` also asks pylo_dist what the optimizer
takes, and so do the methods whose result depends on it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import optimizers
import recipe
from data import BatchPlan
from optimizers import ADAMW, MISSING, Optimizer, listed
from presets import EMBEDDINGS, PRESETS, GPTConfig

# Flags that replace a number of the preset's model.
SHAPE_FLAGS = ("vocab_size", "n_embd", "n_head", "mup_base_width", "mup_base_heads")
# Flags that mean something only to optimizers whose class takes an argument, one of these.
OWN_FLAGS = {
    "num_steps": ("num_steps",),
    "mup_base_width": ("width_mults",),
    "mup_base_heads": ("width_mults",),
    "weight_decay": ("weight_decay",),
    "max_grad_norm": ("max_grad_norm", "clip_norm"),
}
PARALLEL = ("zero1", "zero2", "fsdp2", "hsdp", "tp", "ddp")
# Flags that mean something to one layout alone.
MESH_FLAGS = {"replicas": "hsdp", "tp": "tp"}
# Of whole numbers, beyond what a run comes to the end of.
MOST_COUNTED = 10**9
MOST = {"seed": 2**63 - 1, "timeout": 10**7}  # seconds
ORDERS = ("random", "stream")
# --resume: from the newest checkpoint of the run in --out, or from the start where there is none
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class PresetDefaults:
    """What a preset trains with unless a flag says otherwise."""

    batch_size: int  # global, in sequences
    micro_batch_size: int  # per rank, at most
    adamw_lr: float


DEFAULTS = {
    "nano": PresetDefaults(batch_size=32, micro_batch_size=64, adamw_lr=1e-3),
    "micro": PresetDefaults(batch_size=16, micro_batch_size=64, adamw_lr=1e-3),
    # GPT-2 sizes: half a million tokens a step.
    "124m": PresetDefaults(batch_size=512, micro_batch_size=16, adamw_lr=6e-4),
    "355m": PresetDefaults(batch_size=512, micro_batch_size=8, adamw_lr=3e-4),
    "774m": PresetDefaults(batch_size=512, micro_batch_size=4, adamw_lr=2.5e-4),
    "1.5b": PresetDefaults(batch_size=512, micro_batch_size=2, adamw_lr=2e-4),
}


class WrongInput(ValueError):
    """What the user passed cannot work; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """Every flag, as parsed. None: the default depends on another flag. Raises WrongInput naming
    the flag.
    """

    recipe: Path | None
    preset: str
    qkv: Literal["fused", "split"]
    vocab_size: int | None
    block_size: int | None
    n_embd: int | None
    n_head: int | None
    optimizer: str
    plugin: str | None
    weights: str | None
    parallel: str
    replicas: int | None
    tp: int | None
    num_steps: int | None
    mup_base_width: int | None
    mup_base_heads: int | None
    lr: float | None
    weight_decay: float | None
    max_grad_norm: float | None
    clip: str
    state_dtype: str
    grad_scale: float
    warmup: int
    schedule: str
    steps: int
    batch_size: int | None
    micro_batch_size: int | None
    eval_every: int
    eval_batches: int
    beside: str | None
    seed: int
    data: Path | None
    val_data: Path | None
    order: str
    out: Path | None
    overwrite: bool
    save_every: int
    keep: int | None
    resume: str | None
    deepspeed: Path | None
    dtype: str
    compile: bool
    device: str
    threads: int | None
    timeout: int
    tensorboard: bool
    wandb: bool

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("warmup", 0),
            ("batch_size", 1),
            ("micro_batch_size", 1),
            ("block_size", 1),
            ("vocab_size", 1),
            ("num_steps", 2),
            ("replicas", 1),
            ("tp", 1),
            ("eval_every", 0),
            ("eval_batches", 1),
            ("save_every", 0),
            ("keep", 1),
            ("seed", 0),
            ("threads", 1),
            ("timeout", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise WrongInput(f"{flag(name)} is {value}; it must be at least {least}.")
            most = MOST.get(name, MOST_COUNTED)
            if value is not None and value > most:
                raise WrongInput(f"{flag(name)} is {value}; it must be at most {most}.")
        for name in ("lr", "max_grad_norm", "weight_decay", "grad_scale"):
            number = getattr(self, name)
            zero_fits = name == "weight_decay"
            if number is not None and not (0 < number < math.inf or (zero_fits and number == 0)):
                wanted = "0 or more" if zero_fits else "above 0"
                raise WrongInput(f"{flag(name)} is {number}; it must be finite and {wanted}.")
        longest = PRESETS[self.preset].block_size
        if self.block_size is not None and self.block_size > longest:
            raise WrongInput(
                f"--block-size {self.block_size} is above the {longest} positions of preset "
                f"{self.preset}; use {longest} or less, or a larger preset."
            )
        if self.optimizer == ADAMW and self.weights is not None:
            raise WrongInput(
                "--weights is for learned optimizers, and adamw is none; drop it, or take a "
                "recipe's back: --weights none."
            )
        for name, owner in MESH_FLAGS.items():
            if getattr(self, name) is not None and self.parallel != owner:
                raise WrongInput(
                    f"{flag(name)} is for --parallel {owner} and means nothing to {self.parallel}; "
                    f"drop it, or use {owner}."
                )
        try:
            self.config()
        except ValueError as error:
            message = str(error)
            for name in SHAPE_FLAGS:
                message = message.replace(name, flag(name))
            raise WrongInput(message) from None
        if self.val_data is not None and self.data is None:
            raise WrongInput("--val-data came without --data; pass the training tokens too.")
        if self.beside not in (None, ADAMW):
            raise WrongInput(f"--beside {self.beside}: wanted {ADAMW}, or none.")
        if self.beside is not None and self.optimizer == self.beside:
            raise WrongInput(
                f"--beside {self.beside} is what --optimizer {self.beside} draws anyhow; drop it, "
                "or take it back: --beside none."
            )
        if self.keep is not None and not self.save_every:
            raise WrongInput(
                f"--keep {self.keep} came without --save-every; pass it too, or drop --keep (a "
                "recipe's: --keep none)."
            )
        if self.deepspeed is not None:
            if self.optimizer == ADAMW:
                raise WrongInput(
                    "--deepspeed is for learned optimizers here, and adamw is none; pass "
                    "--optimizer."
                )
            if self.parallel != "zero1":
                raise WrongInput(
                    f"--parallel {self.parallel} came with --deepspeed, whose JSON says what ranks "
                    "share; drop one."
                )
            if self.beside is not None:
                raise WrongInput(
                    f"--beside {self.beside} does not go with --deepspeed, which would train it in "
                    "another layout; drop one (--beside none)."
                )
            if self.clip != "global" or self.grad_scale != 1:
                name = "--clip" if self.clip != "global" else "--grad-scale"
                raise WrongInput(
                    f"{name} does not go with --deepspeed, which clips and scales by itself; drop "
                    "one."
                )
            if self.dtype != "float32" or self.compile:
                name = "--compile" if self.compile else "--dtype"
                raise WrongInput(
                    f'{name} does not go with --deepspeed; its JSON says "bf16": {{"enabled": '
                    "true} where wanted."
                )
        if self.resume == AUTO and self.out is None:
            raise WrongInput(
                f"--resume {AUTO} looks for a checkpoint of the run in --out; pass --out FOLDER."
            )

    def check_optimizer(self) -> None:
        """Raise WrongInput for an optimizer that there is not, and for flags that mean nothing to
        it or are wanted by it.
        """
        chosen = self.chosen()
        for name, arguments in OWN_FLAGS.items():
            if getattr(self, name) is not None and not any(map(chosen.takes, arguments)):
                owners = listed(optimizers.taking(arguments[0], self.plugin), "or")
                raise WrongInput(
                    f"{flag(name)} is for --optimizer {owners} and means nothing to "
                    f"{self.optimizer}; drop it, or use {owners}."
                )
        if self.clip == "per_tensor" and (not chosen.takes("clip") or self.clip_norm() is None):
            raise WrongInput(
                "--clip per_tensor is for learned optimizers, with --max-grad-norm; pass that, or "
                "drop it."
            )
        if self.state_dtype != "float32" and not chosen.takes("state_dtype"):
            raise WrongInput(
                f"--state-dtype {self.state_dtype} is for learned optimizers and means nothing to "
                f"{self.optimizer}; drop it."
            )
        planned = self.planned_steps()
        if planned is not None and planned < 2:
            raise WrongInput(
                f"--steps is 1, and {self.optimizer} plans for a run of 2 steps or more; pass "
                "--num-steps, the length of the run."
            )
        if chosen.entry is None:
            return
        if not chosen.takes("lr"):
            raise WrongInput(
                f"--optimizer {self.optimizer} takes no argument lr, which is set at each step."
            )
        given = self.learned_arguments()
        for name, default in chosen.arguments.items():
            if default is MISSING and (name not in given or (name == "lr" and self.lr is None)):
                has_flag = name in (field.name for field in dataclasses.fields(self))
                remedy = (
                    f"pass {flag(name)}" if has_flag else "give it one, there is no flag for it"
                )
                raise WrongInput(
                    f"--optimizer {self.optimizer} has no default for {name}; {remedy}."
                )

    def chosen(self) -> Optimizer:
        """The optimizer. Raises WrongInput where there is none of that name."""
        try:
            return optimizers.find(self.optimizer, self.plugin)
        except ValueError as error:
            raise WrongInput(str(error)) from None

    def shared(self) -> dict[str, Any]:
        """By flag what must be the same on all ranks: all but paths and threads, which belong to a
        machine.
        """
        own = ("recipe", "plugin", "weights", "data", "val_data", "out", "resume", "deepspeed")
        own += ("threads",)
        return {
            flag(field.name): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in own
        }

    def config(self) -> GPTConfig:
        preset = PRESETS[self.preset]
        given = {
            name: getattr(self, name) for name in SHAPE_FLAGS if getattr(self, name) is not None
        }
        return dataclasses.replace(preset, qkv=self.qkv, **given)

    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.block_size or PRESETS[self.preset].block_size

    def plan(self, world_size: int) -> BatchPlan:
        """The batch over `world_size` ranks, in the largest micro-batches the preset allows.
        ValueError.
        """
        defaults = DEFAULTS[self.preset]
        batch = self.batch_size or defaults.batch_size
        micro = self.micro_batch_size
        if micro is None:
            share = max(1, batch // world_size)
            micro = max(
                n for n in range(1, min(share, defaults.micro_batch_size) + 1) if share % n == 0
            )
        return BatchPlan(batch, world_size, micro)

    def base_lr(self) -> float:
        """The learning rate of the run."""
        if self.lr is not None:
            return self.lr
        own: float | None = self.chosen().default("lr")
        return DEFAULTS[self.preset].adamw_lr if own is None else own

    def decay(self) -> float:
        """The weight decay of the run."""
        if self.weight_decay is not None:
            return self.weight_decay
        return self.chosen().default("weight_decay") or 0.0

    def clip_norm(self) -> float | None:
        """The bound on the norm of all gradients."""
        return self.chosen().max_grad_norm if self.max_grad_norm is None else self.max_grad_norm

    def planned_steps(self) -> int | None:
        """The length of the run that an optimizer is told which asks for it, of which this command
        may be a part; None for others.
        """
        return (self.num_steps or self.steps) if self.chosen().takes("num_steps") else None

    def of_beside(self, folder: Path) -> Options:
        """Those of the run beside this one, in `folder`: with the samples, the schedule and the
        layout of this one, and its optimizer's own defaults.
        """
        assert self.beside is not None
        its_own = dict.fromkeys((*OWN_FLAGS, "plugin", "weights", "lr", "recipe", "resume", "keep"))
        return dataclasses.replace(
            self,
            **its_own,
            optimizer=self.beside,
            beside=None,
            clip="global",
            grad_scale=1.0,
            out=folder,
            save_every=0,
            wandb=False,
        )

    def learned_arguments(self) -> dict[str, Any]:
        """What the learned optimizer is given of the arguments that it takes: what the flags say,
        and what the run knows. `width_mults`, which follow from the model, are empty.
        """
        chosen, bound = self.chosen(), self.clip_norm()
        known: dict[str, Any] = {
            "lr": self.base_lr(),
            "weight_decay": self.decay(),
            "weights": self.weights,
            "clip": self.clip if self.clip != "global" else None,
            "state_dtype": self.state_dtype if self.state_dtype != "float32" else None,
            "num_steps": self.planned_steps(),
            "width_mults": {},
            "embedding_pattern": EMBEDDINGS,  # by CELO2's paper, embeddings follow AdamW
        }
        # of the two ways to bound a norm, a class has one
        if not chosen.takes("clip_norm"):
            known["max_grad_norm"] = bound
        elif bound is not None:
            known |= {"clip_grad": True, "clip_norm": bound}
        return {name: x for name, x in known.items() if x is not None and chosen.takes(name)}

    def lr_at(self, step: int) -> float:
        """The learning rate of step 1 ... `steps`: linear warm-up, then constant or a cosine to a
        tenth.
        """
        if step <= self.warmup:
            return self.base_lr() * step / self.warmup
        if self.schedule == "constant":
            return self.base_lr()
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.base_lr() * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)

    def out_folder(self) -> Path:
        """Where the run is written; a new folder for each run unless --out names one."""
        if self.out is not None:
            return self.out
        return Path("runs") / f"{self.preset}-{self.optimizer}-{datetime.now():%Y%m%d-%H%M%S}"

    def unit(self) -> str:
        """What a token is, for the unit of the loss."""
        return "byte" if self.data is None or self.config().vocab_size <= 256 else "token"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(read, updated=())  # argparse names it in its errors
    def read_or_none(text: str) -> Any:
        return None if text == "none" else read(text)

    return read_or_none


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake as one line: WrongInput instead of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise WrongInput(f"{message}; see --help.")


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line, whose optimizer there is. Raises WrongInput."""
    options = read(argv)
    options.check_optimizer()
    return options


def read(argv: Sequence[str]) -> Options:
    """The options of a command line, whatever its optimizer; without PyTorch, but for --help.
    Raises WrongInput.
    """
    # DeepSpeed's launcher adds --local_rank=N, which is in the environment too
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # argparse would make a list of it
            raise WrongInput(f"{word}: wanted a value after the equals sign, not --; see --help.")
    parser = _parser(_said_of_optimizers(argv) if {"-h", "--help"} & set(argv) else {})
    given = parser.parse_args(argv)
    if given.recipe is not None:
        try:
            # of a repeated flag the last counts
            given = parser.parse_args([*recipe.words(given.recipe, parser), *argv])
        except ValueError as error:
            raise WrongInput(str(error)) from None
    return Options(**vars(given))


def repeatable(command: Sequence[str]) -> Options:
    """The options of a launcher's command that resume_loop.sh may start again and again. Raises
    WrongInput.
    """
    script = next((i for i, word in enumerate(command) if Path(word).name == "gpt2.py"), None)
    if script is None:
        raise WrongInput(
            "the command names no gpt2.py; pass one such as: torchrun --nproc_per_node=8 "
            "launch/gpt2.py --out runs/x ..."
        )
    options = read(command[script + 1 :])
    if options.out is None:
        raise WrongInput(
            "the command has no --out FOLDER; pass it, so that the next start finds the "
            "checkpoints."
        )
    if not options.save_every:
        raise WrongInput(
            "the command has no --save-every N; pass it, so that there is something to go on from."
        )
    if options.resume not in (None, AUTO):
        raise WrongInput(
            f"--resume {options.resume} would be repeated at each start; drop it, or start from it "
            "once without the loop."
        )
    return options


def _said_of_optimizers(argv: Sequence[str]) -> dict[str, str]:
    """What --help says of the optimizers, by flag. Raises WrongInput for a plugin that cannot be
    imported.
    """
    finder = OneLineParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--plugin")
    try:
        return optimizers.in_words(finder.parse_known_args(argv)[0].plugin)
    except ValueError as error:
        raise WrongInput(str(error)) from None


def _parser(said: Mapping[str, str]) -> argparse.ArgumentParser:
    """With what `_said_of_optimizers` said, if it was asked."""
    own = "the optimizer's own"
    parser = OneLineParser(
        prog="gpt2.py",
        allow_abbrev=False,
        description="Pretrain GPT-2 with a learned optimizer: python for one rank, torchrun for "
        "many.",
        epilog="Example: torchrun --nproc_per_node=2 launch/gpt2.py --preset micro --weights demo",
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="YAML",
        help="flags in a file, see launch/recipes; those given here win, and none takes one back",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", choices=tuple(PRESETS), default="micro", help="nano and micro read bytes"
    )
    model.add_argument(
        "--qkv", choices=("fused", "split"), default="fused", help="one attention matrix or three"
    )
    model.add_argument("--vocab-size", type=int, help="default: the preset's, 256 or 50257")
    model.add_argument(
        "--block-size", type=int, help="tokens of a sequence; default: all the preset's positions"
    )
    model.add_argument("--n-embd", type=int, help="width, in channels; default: the preset's")
    model.add_argument("--n-head", type=int, help="attention heads; default: the preset's")

    learn = parser.add_argument_group("optimizer")
    learn.add_argument(
        "--optimizer",
        metavar="NAME",
        default="adafaclo",
        help=f"{said.get('optimizer', 'of a learned optimizer, or adamw')}; default: adafaclo",
    )
    learn.add_argument(
        "--plugin",
        metavar="MODULE|FILE.py",
        help="optimizers of your own: what calls pylo_dist.register_optimizer",
    )
    learn.add_argument(
        "--weights", help="of a learned optimizer: a name, folder, file, or demo; default: its own"
    )
    learn.add_argument("--lr", type=float, help=f"default: {said.get('lr', own)}")
    learn.add_argument(
        "--weight-decay", type=float, help=f"decoupled; default: {said.get('weight_decay', own)}"
    )
    learn.add_argument(
        "--max-grad-norm",
        type=float,
        help=f"clip the global gradient norm; default: {said.get('max_grad_norm', own)}",
    )
    learn.add_argument(
        "--clip",
        choices=("global", "per_tensor"),
        default="global",
        help="per_tensor: the norm of each tensor alone",
    )
    learn.add_argument(
        "--state-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of a learned optimizer's means; bfloat16: half the memory, stochastically rounded",
    )
    learn.add_argument(
        "--grad-scale",
        type=float,
        default=1.0,
        help="multiply every gradient, as a loss scaler does that never unscales",
    )
    planning, scaled = said.get("num_steps", "velo"), said.get("mup", "mulo")
    learn.add_argument(
        "--num-steps",
        type=int,
        help=f"of {planning}: length of the run it plans for; default: --steps",
    )
    learn.add_argument(
        "--mup-base-width",
        type=int,
        help=f"of {scaled}: the width that settings were tuned at; initialisation, attention, "
        "logits and learning rates are scaled from there by muP; default: the model's own, which "
        "changes nothing",
    )
    learn.add_argument(
        "--mup-base-heads",
        type=int,
        help=f"of {scaled}: heads at that width; default: the model's own",
    )
    learn.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    learn.add_argument("--schedule", choices=("constant", "cosine"), default="constant")

    mesh = parser.add_argument_group("ranks")
    mesh.add_argument(
        "--parallel",
        choices=PARALLEL,
        default="zero1",
        help="what several ranks share: zero1 and zero2 optimizer state (and gradients); fsdp2 "
        "parameters too; hsdp the same in several copies; tp matrix products; ddp nothing but "
        "gradients",
    )
    mesh.add_argument("--replicas", type=int, help="of hsdp: copies of the model; default: 2")
    mesh.add_argument(
        "--tp",
        type=int,
        help="of tp: ranks that share a product; fsdp2 over the rest; default: all ranks",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=300)
    run.add_argument(
        "--batch-size", type=int, help="sequences of a step over all ranks; default: the preset's"
    )
    run.add_argument(
        "--micro-batch-size", type=int, help="sequences per pass and rank; accumulation follows"
    )
    run.add_argument(
        "--eval-every", type=int, default=50, help="steps between validations; 0: never"
    )
    run.add_argument("--eval-batches", type=int, default=8, help="global batches of a validation")
    run.add_argument(
        "--beside",
        metavar=ADAMW,
        help="then train adamw too, at the preset's lr, on the same samples, and draw both",
    )
    run.add_argument("--seed", type=int, default=0, help="of initialisation and samples")
    run.add_argument("--threads", type=int, help="CPU threads per rank; default: PyTorch's")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast"
    )
    run.add_argument("--compile", action=switch, default=False, help="torch.compile the model")
    run.add_argument(
        "--deepspeed",
        type=Path,
        metavar="JSON",
        help="shard with DeepSpeed, e.g. launch/deepspeed/zero2.json",
    )
    run.add_argument(
        "--timeout",
        type=int,
        default=600,
        help="seconds a rank waits for the others before it fails",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--data", type=Path, help="folder or train file of tokens; default: built-in text"
    )
    files.add_argument(
        "--val-data", type=Path, help="validation file; default: the *val*.bin of the --data folder"
    )
    files.add_argument(
        "--order",
        choices=ORDERS,
        default="random",
        help="stream: windows end to end, file after file",
    )
    files.add_argument("--out", type=Path, help="folder to write; default: a new one under runs/")
    files.add_argument(
        "--overwrite", action=switch, default=False, help="let --out replace an earlier run"
    )
    files.add_argument(
        "--save-every",
        type=int,
        default=0,
        help="steps between checkpoints; also at the end; 0: never",
    )
    files.add_argument("--keep", type=int, help="newest checkpoints to keep; default: all")
    files.add_argument(
        "--resume",
        metavar="DIR|auto",
        help="go on from a checkpoint or a run's newest; auto: the newest in --out, if there is "
        "one",
    )
    files.add_argument("--tensorboard", action=switch, default=False)
    files.add_argument("--wandb", action=switch, default=False)
    for action in parser._actions:  # "none" takes back what a recipe says
        if action.default is None and action.nargs is None and action.dest != "recipe":
            action.type = _or_none(action.type or str)  # type: ignore[arg-type]
    return parser


def command_for_more_ranks(argv: Sequence[str], plan: BatchPlan) -> str:
    """The command that repeats a run on the next number of ranks that can share its batch."""
    wider = (
        n for n in range(plan.world_size + 1, plan.global_batch + 1) if plan.global_batch % n == 0
    )
    ranks = next(wider, plan.world_size)
    kept = []
    words = iter(argv)
    # a repeated run needs its own folder, and each rank's share its own micro-batch
    for word in words:
        if word in ("--out", "--micro-batch-size", "--resume"):
            next(words, None)
        elif word != "--overwrite" and not word.startswith(
            ("--out=", "--micro-batch-size=", "--resume=")
        ):
            kept.append(word)
    script = os.path.relpath(Path(__file__).with_name("gpt2.py"))
    return shlex.join(["torchrun", f"--nproc_per_node={ranks}", script, *kept])


if __name__ == "__main__":  # what resume_loop.sh asks about its command
    try:
        with contextlib.redirect_stdout(sys.stderr):  # --help, which ends here
            wanted = repeatable(sys.argv[1:])
    except WrongInput as error:
        print(f"resume_loop.sh: {error}", file=sys.stderr)
        sys.exit(2)
    print(wanted.steps, wanted.out, sep="\n")
