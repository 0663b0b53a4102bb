"""The command line of gpt2.py: flags, defaults, and the checks that need neither files nor other
ranks.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import recipe
from data import BatchPlan
from presets import EMBEDDINGS, PRESETS, GPTConfig


@dataclass(frozen=True, slots=True)
class Learned:
    """A learned optimizer: its class in pylo_dist, and what that class does unless a flag says
    otherwise.
    """

    class_name: str
    lr: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    clip_arguments: bool = True  # takes clip_grad and clip_norm, in place of max_grad_norm


# By name on the command line. AdamW, the yardstick, is PyTorch's.
LEARNED = {
    "adafaclo": Learned("AdafacLO", lr=1.0, clip_arguments=False),
    "mulo": Learned("MuLO", lr=1.0, clip_arguments=False),
    "velo": Learned("VeLO", lr=1.0, clip_arguments=False),
    "elo": Learned("ELO", lr=1e-3),
    "celo2": Learned("CELO2", lr=1e-3),
    "elo-celo2": Learned("ELO_CELO2", lr=1e-3, weight_decay=0.1, max_grad_norm=1.0),
}
OPTIMIZERS = (*LEARNED, "adamw")
# Flags that replace a number of the preset's model.
SHAPE_FLAGS = ("vocab_size", "n_embd", "n_head", "mup_base_width", "mup_base_heads")
# Flags that mean something to one optimizer alone.
OWN_FLAGS = {"num_steps": "velo", "mup_base_width": "mulo", "mup_base_heads": "mulo"}
PARALLEL = ("zero1", "zero2", "fsdp2", "hsdp", "tp", "ddp")
# Flags that mean something to one layout alone.
MESH_FLAGS = {"replicas": "hsdp", "tp": "tp"}
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
    grad_scale: float
    warmup: int
    schedule: str
    steps: int
    batch_size: int | None
    micro_batch_size: int | None
    eval_every: int
    eval_batches: int
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
        if self.seed >= 2**63:
            raise WrongInput(f"--seed is {self.seed}; it must be below 2**63.")
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
        if self.optimizer == "adamw" and self.weights is not None:
            raise WrongInput(
                "--weights is for learned optimizers, and adamw is none; drop it, or take a "
                "recipe's back: --weights none."
            )
        if self.clip == "per_tensor" and (self.optimizer == "adamw" or self.clip_norm() is None):
            raise WrongInput(
                "--clip per_tensor is for learned optimizers, with --max-grad-norm; pass that, or "
                "drop it."
            )
        for name, owner in OWN_FLAGS.items():
            if getattr(self, name) is not None and self.optimizer != owner:
                raise WrongInput(
                    f"{flag(name)} is for --optimizer {owner} and means nothing to "
                    f"{self.optimizer}; drop it, or use {owner}."
                )
        for name, owner in MESH_FLAGS.items():
            if getattr(self, name) is not None and self.parallel != owner:
                raise WrongInput(
                    f"{flag(name)} is for --parallel {owner} and means nothing to {self.parallel}; "
                    f"drop it, or use {owner}."
                )
        if self.optimizer == "velo" and self.planned_steps() < 2:
            raise WrongInput(
                "--steps is 1, and velo plans for a run of 2 steps or more; pass --num-steps, the "
                "length of the run."
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
        if self.keep is not None and not self.save_every:
            raise WrongInput(
                f"--keep {self.keep} came without --save-every; pass it too, or drop --keep (a "
                "recipe's: --keep none)."
            )
        if self.deepspeed is not None:
            if self.optimizer == "adamw":
                raise WrongInput(
                    "--deepspeed is for learned optimizers here, and adamw is none; pass "
                    "--optimizer."
                )
            if self.parallel != "zero1":
                raise WrongInput(
                    f"--parallel {self.parallel} came with --deepspeed, whose JSON says what ranks "
                    "share; drop one."
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

    def shared(self) -> dict[str, Any]:
        """By flag what must be the same on all ranks: all but paths and threads, which belong to a
        machine.
        """
        own = ("recipe", "weights", "data", "val_data", "out", "resume", "deepspeed", "threads")
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
        if self.lr is not None:
            return self.lr
        return (
            DEFAULTS[self.preset].adamw_lr
            if self.optimizer == "adamw"
            else LEARNED[self.optimizer].lr
        )

    def decay(self) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.1 if self.optimizer == "adamw" else LEARNED[self.optimizer].weight_decay

    def clip_norm(self) -> float | None:
        """The bound on the norm of all gradients."""
        if self.max_grad_norm is not None or self.optimizer == "adamw":
            return self.max_grad_norm
        return LEARNED[self.optimizer].max_grad_norm

    def planned_steps(self) -> int:
        """The length of the run that VeLO is told, of which this command may be a part."""
        return self.num_steps or self.steps

    def learned_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the learned optimizer, but for MuLO's multipliers, which follow from
        the model.
        """
        arguments: dict[str, Any] = {"lr": self.base_lr(), "weight_decay": self.decay()}
        bound = self.clip_norm()
        if not LEARNED[self.optimizer].clip_arguments:
            arguments["max_grad_norm"] = bound
        elif bound is not None:
            arguments |= {"clip_grad": True, "clip_norm": bound}
        if self.clip != "global":
            arguments["clip"] = self.clip
        if self.weights is not None:
            arguments["weights"] = self.weights
        if self.optimizer == "velo":
            arguments["num_steps"] = self.planned_steps()
        if self.optimizer in ("celo2", "elo-celo2"):  # by their paper, embeddings follow AdamW
            arguments["embedding_pattern"] = EMBEDDINGS
        return arguments

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
    """The options of a command line. Raises WrongInput."""
    # DeepSpeed's launcher adds --local_rank=N, which is in the environment too
    parser = _parser()
    argv = [word for word in argv if not word.startswith("--local_rank=")]
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
    options = parse(command[script + 1 :])
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


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="gpt2.py",
        allow_abbrev=False,
        description="Pretrain GPT-2 with a learned optimizer: python for one rank, torchrun for many.",
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
    learn.add_argument("--optimizer", choices=OPTIMIZERS, default="adafaclo")
    learn.add_argument(
        "--weights", help="of a learned optimizer: a name, folder, file, or demo; default: its own"
    )
    learn.add_argument(
        "--lr",
        type=float,
        help="default: 1 for adafaclo, mulo and velo, 0.001 for elo and the celo2s, the preset's for adamw",
    )
    learn.add_argument(
        "--weight-decay",
        type=float,
        help="decoupled; default: 0.1 for adamw and elo-celo2, 0 for others",
    )
    learn.add_argument(
        "--max-grad-norm",
        type=float,
        help="clip the global gradient norm; default: 1 for elo-celo2, no clipping for others",
    )
    learn.add_argument(
        "--clip",
        choices=("global", "per_tensor"),
        default="global",
        help="per_tensor: the norm of each tensor alone",
    )
    learn.add_argument(
        "--grad-scale",
        type=float,
        default=1.0,
        help="multiply every gradient, as a loss scaler does that never unscales",
    )
    learn.add_argument(
        "--num-steps", type=int, help="of velo: length of the run it plans for; default: --steps"
    )
    learn.add_argument(
        "--mup-base-width",
        type=int,
        help="of mulo: the width that settings were tuned at; initialisation, attention, logits and learning rates are scaled "
        "from there by muP; default: the model's own, which changes nothing",
    )
    learn.add_argument(
        "--mup-base-heads", type=int, help="of mulo: heads at that width; default: the model's own"
    )
    learn.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    learn.add_argument("--schedule", choices=("constant", "cosine"), default="constant")

    mesh = parser.add_argument_group("ranks")
    mesh.add_argument(
        "--parallel",
        choices=PARALLEL,
        default="zero1",
        help="what several ranks share: zero1 and zero2 optimizer state (and gradients); fsdp2 parameters too; hsdp the same in "
        "several copies; tp matrix products; ddp nothing but gradients",
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
        help="go on from a checkpoint or a run's newest; auto: the newest in --out, if there is one",
    )
    files.add_argument("--tensorboard", action=switch, default=False)
    files.add_argument("--wandb", action=switch, default=False)
    for action in parser._actions:  # "none" takes back what a recipe says
        if action.default is None and action.nargs is None and action.dest != "recipe":
            action.type = _or_none(action.type or str)  # type: ignore[arg-type]
    return parser


def command_for_more_ranks(argv: Sequence[str], plan: BatchPlan) -> str:
    """The command that repeats a run on the next number of ranks that its batch can be shared by."""
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
