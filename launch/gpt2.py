"""Pretrain GPT-2 with a learned optimizer or AdamW: `python launch/gpt2.py`, or on many ranks under
torchrun, mpirun or srun.

Exit code 0: done. 2: wrong input. 3: the loss is no number any more. 130: interrupted, as by
Ctrl-C. 143: ended by SIGTERM, as without --save-every, with which the run has been saved. 1:
anything else, such as another run in the folder of --out, or a last step that could not be saved.
Of 2, 3, 130, 143 and these two one line on rank 0's stderr and the code on every rank; what goes
wrong before the ranks have met is said by one rank of each machine, and by each whose
environment is refused. The code is also written into the file that EXIT_CODE_FILE names, where it
is set, since torchrun ends with 1 whatever its ranks end with.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import environment
import torch
from checkpoints import Stopped, Unsaved, tell
from claim import InUse
from environment import Environment
from loop import Diverged
from options import WrongInput, parse
from parallel import data_ranks
from place import Place
from run import run


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
    except (InUse, Unsaved) as error:
        code = complain(error, code=1, aloud=first)
    except Stopped as error:
        code = complain(error, code=128 + signal.SIGTERM, aloud=first)
    except KeyboardInterrupt as error:
        code = complain(str(error) or INTERRUPTED, code=128 + signal.SIGINT, aloud=first)
        if place.world_size > 1:  # the others may be gone already
            os._exit(code)
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


INTERRUPTED = "interrupted; the same command with --resume auto goes on from its last checkpoint."


def complain(error: Exception | str, code: int, *, rank: str = "0", aloud: bool = True) -> int:
    """One line that names a rank other than 0, where `aloud`; the code, for a launcher's caller
    too.
    """
    if aloud:
        who = "" if rank == "0" else f"rank {rank}: "
        tell(f"{who}{' '.join(str(error).split())}")
    if "EXIT_CODE_FILE" in os.environ:
        with suppress(OSError):
            path = Path(os.environ["EXIT_CODE_FILE"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    exit_code = main()
    with suppress(OSError):  # where they go to may be full
        sys.stdout.flush()
        sys.stderr.flush()
    # Not by sys.exit: DeepSpeed's modules hold process groups to the end, whose threads then now
    # and then abort the process.
    os._exit(exit_code)
