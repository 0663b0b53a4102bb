"""Who started this process: torchrun, DeepSpeed, mpirun, srun or nobody; and so its rank, and where
the ranks meet.

The only module of launch/ that reads the variables of launchers. Takes no part in any meeting, but
for mpirun's, whose ranks agree on an address and a port through MPI.
"""

from __future__ import annotations

import math
import os
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from options import WrongInput

# Outside the range from which Linux and BSD take the ports of outgoing connections, so that none of
# those is in the way later.
PORTS = range(20_000, 32_000)
MPI_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}
LOCAL_RANKS = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
)
SLURM = "SLURM_STEP_NUM_TASKS"  # of the tasks of one srun; a batch script by itself has none

SHARING = ("torchrun", "DeepSpeed's launcher")  # whose ranks of one machine all see the same GPUs


@dataclass(frozen=True, slots=True)
class Environment:
    """This process among those that were started together.

    Attributes:
        launcher: who started it, in words.
        rank, world_size: among all.
        local_rank, local_size: among those of this machine; None where a hand has set RANK and
            WORLD_SIZE without them.
        address, port: where rank 0 waits for the others; None in a world of one.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    local_size: int | None = 1
    address: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        """One line for the user."""
        if self.world_size == 1:
            return f"{self.launcher}: one rank"
        here = (
            ""
            if self.local_rank is None
            else f", {self.local_rank} of {self.local_size} on this machine"
        )
        return (
            f"{self.launcher}: rank {self.rank} of {self.world_size}{here}; they meet at "
            f"{self.address}:{self.port}"
        )

    def export(self) -> None:
        """Put it into the process's variables, by the names that torchrun, torch.distributed and
        DeepSpeed use.
        """
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        os.environ.update({name: str(value) for name, value in values.items() if value is not None})


def find(variables: Mapping[str, str] = os.environ) -> Environment:
    """What started this process. Under mpirun all ranks call it.

    RANK and WORLD_SIZE, of torchrun, DeepSpeed or a hand, come first, then mpirun's variables, then
    srun's.

    Raises:
        WrongInput: variables contradict each other or are missing; the message names them and the
            remedy.
    """
    mpi = next(
        (name for name in MPI_SIZES if name in variables and _means_mpi(name, variables)), None
    )
    if "WORLD_SIZE" in variables or "RANK" in variables:
        return _by_variables(variables, mpi)
    if mpi is not None:
        return _by_mpi(variables, mpi)
    if SLURM in variables:
        return _by_slurm(variables)
    return Environment("no launcher")


def rank_named(variables: Mapping[str, str] = os.environ) -> str:
    """The rank of this process as its launcher has written it, which may be wrong: for messages
    before `find` has succeeded.
    """
    named = ["RANK", *MPI_SIZES.values(), *(["SLURM_PROCID"] if SLURM in variables else [])]
    return next((variables[name] for name in named if name in variables), "0")


def is_first_here(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one of its machine to speak, as far as that can be told before
    `find` has succeeded.
    """
    named = [*LOCAL_RANKS, *(["SLURM_LOCALID"] if SLURM in variables else [])]
    return next((variables[name] for name in named if name in variables), "0") == "0"


def attempt(variables: Mapping[str, str] = os.environ) -> str:
    """Which start of its ranks by one agent of torchrun this is: it hands all of them the store of
    the first ones, with the addresses of those in it. "" elsewhere, and of several agents, of which
    each counts its own failures.
    """
    alone = variables.get("GROUP_WORLD_SIZE") == "1"
    return variables.get("TORCHELASTIC_RESTART_COUNT", "") if alone else ""


def free_port() -> int:
    """A TCP port that nobody listens at. Raises OSError where none of a hundred is free."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(
        f"100 ports between {PORTS.start} and {PORTS.stop} were tried, and none was free."
    )


def _means_mpi(size: str, variables: Mapping[str, str]) -> bool:
    """srun sets PMI_* for programs that may be MPI's, and Hydra, MPICH's and Intel's mpirun, sets
    them under a task of srun.
    """
    if size != "PMI_SIZE" or SLURM not in variables:
        return True
    pairs = (("PMI_SIZE", SLURM), ("PMI_RANK", "SLURM_PROCID"))
    return any(variables.get(pmi, variables.get(own)) != variables.get(own) for pmi, own in pairs)


def _number(
    variables: Mapping[str, str],
    name: str,
    *,
    below: str | None = None,
    least: int = 0,
    most: float = math.inf,
) -> int:
    """The number in a variable, from `least` to `most`, and less than that in another."""
    try:
        value = int(variables[name])
    except ValueError:
        raise WrongInput(
            f"{name} is {variables[name]!r}, a number was wanted; unset it, or start the ranks "
            "with torchrun."
        ) from None
    if not least <= value <= most:
        wanted = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise WrongInput(
            f"{name} is {value}, {wanted} was wanted; unset it, or start the ranks with torchrun."
        )
    if below is not None and below in variables and value >= int(variables[below]):
        raise WrongInput(
            f"{name} is {value} and {below} {variables[below]}; it must be below. Unset both, or "
            "start the ranks with torchrun."
        )
    return value


def _port(variables: Mapping[str, str]) -> int:
    return _number(variables, "MASTER_PORT", least=1, most=65535)


def _by_variables(variables: Mapping[str, str], mpi: str | None) -> Environment:
    if "WORLD_SIZE" not in variables:
        raise WrongInput(
            f"RANK is {variables['RANK']} without WORLD_SIZE; unset it, or start the ranks with "
            "torchrun."
        )
    world_size = _number(variables, "WORLD_SIZE", least=1)
    if "TORCHELASTIC_RUN_ID" in variables:
        launcher = "torchrun"
    elif "CROSS_SIZE" in variables:
        launcher = "DeepSpeed's launcher"
    else:
        launcher = "RANK and WORLD_SIZE"
        agreeing = _compare(variables, world_size, mpi)
        # a script that has set WORLD_SIZE alone
        if "RANK" not in variables and agreeing is not None:
            return _by_slurm(variables) if agreeing == SLURM else _by_mpi(variables, agreeing)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if missing and world_size > 1:
        raise WrongInput(
            f"WORLD_SIZE is {world_size} without {', '.join(missing)}; start the ranks with "
            "torchrun."
        )
    rank = _number(variables, "RANK", below="WORLD_SIZE") if "RANK" in variables else 0
    local_size = (
        _number(variables, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in variables else None
    )
    local_rank = (
        _number(variables, "LOCAL_RANK", below="LOCAL_WORLD_SIZE")
        if "LOCAL_RANK" in variables
        else None
    )
    if local_rank is not None and local_size is None:
        local_size = int(variables.get("LOCAL_SIZE", local_rank + 1))
    if world_size == 1:
        return Environment(launcher, local_rank=local_rank or 0, local_size=local_size or 1)
    return Environment(
        launcher,
        rank,
        world_size,
        local_rank,
        local_size,
        variables["MASTER_ADDR"],
        _port(variables),
    )


def _compare(variables: Mapping[str, str], world_size: int, mpi: str | None) -> str | None:
    """RANK and WORLD_SIZE that no launcher of ranks has set against those of mpirun and srun; the
    variable that agrees.

    What mpirun or srun has started once only, such as a shell, may start ranks of its own.
    """
    found = [] if mpi is None else [(mpi, MPI_SIZES[mpi], "mpirun")]
    if SLURM in variables:
        found.append((SLURM, "SLURM_PROCID", "srun"))
    agreeing = None
    for size, rank, launcher in found:
        remedy = (
            f"unset RANK and WORLD_SIZE, and {launcher}'s are taken; or start the ranks with "
            "torchrun."
        )
        count = _number(variables, size, least=1)
        if count == 1:
            continue
        if count != world_size:
            raise WrongInput(f"WORLD_SIZE is {world_size} and {size} {variables[size]}; {remedy}")
        if "RANK" in variables and rank in variables and variables[rank] != variables["RANK"]:
            raise WrongInput(f"RANK is {variables['RANK']} and {rank} {variables[rank]}; {remedy}")
        agreeing = agreeing or size
    return agreeing


def _by_mpi(variables: Mapping[str, str], size: str) -> Environment:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no library of MPI
        raise WrongInput(
            f"{size} is {variables[size]}, so mpirun has started this, but mpi4py cannot be "
            f"imported ({error}); install it: pip install mpi4py, or start the ranks with torchrun."
        ) from None
    world = MPI.COMM_WORLD
    if world.size != _number(variables, size, least=1):
        raise WrongInput(
            f"{size} is {variables[size]}, but mpi4py finds {world.size} rank(s): it was built for "
            "another MPI than this. Install it anew: pip install --no-binary mpi4py "
            "--force-reinstall mpi4py"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    found, problem = None, None
    if world.rank == 0:
        try:
            address = variables.get("MASTER_ADDR") or (
                "127.0.0.1" if local.size == world.size else own_address()
            )
            found = address, _port(variables) if "MASTER_PORT" in variables else free_port()
        except (OSError, WrongInput) as error:
            problem = str(error)
    found, problem = world.bcast((found, problem))
    if found is None:
        raise WrongInput(f"mpirun: {problem}")
    result = Environment("mpirun", world.rank, world.size, local.rank, local.size, *found)
    local.Free()
    # all that was wanted of it; a process may now end as it likes, and mpirun sees its exit code
    MPI.Finalize()
    return result


def own_address() -> str:
    """This machine's address for others: that which its name has, or the one towards the default
    route.

    Raises OSError for a machine without either.
    """
    try:
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # sends nothing: of a datagram only the route is looked up
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            raise OSError(
                f"this machine has no address for the others ({error}); set MASTER_ADDR."
            ) from None
        return str(probe.getsockname()[0])


def _by_slurm(variables: Mapping[str, str]) -> Environment:
    world_size = _number(variables, SLURM, least=1)
    if world_size == 1:
        return Environment("srun")
    missing = [
        name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in variables
    ]
    if missing:
        raise WrongInput(
            f"{SLURM} is {world_size} without {', '.join(missing)}; start the ranks with srun, or "
            "with torchrun."
        )
    rank, local_rank = (
        _number(variables, "SLURM_PROCID", below=SLURM),
        _number(variables, "SLURM_LOCALID"),
    )
    per_node = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(variables, "SLURM_NODEID")
    local_size = per_node[node] if node < len(per_node) else local_rank + 1
    hosts = variables.get("SLURM_STEP_NODELIST", variables.get("SLURM_JOB_NODELIST", ""))
    address = variables.get("MASTER_ADDR") or (
        "127.0.0.1" if local_size == world_size else first_host(hosts)
    )
    if not address:
        raise WrongInput(
            f"{SLURM} is {world_size} without MASTER_ADDR and SLURM_STEP_NODELIST; set MASTER_ADDR "
            "to rank 0's host."
        )
    if "MASTER_PORT" in variables:
        port = _port(variables)
    else:  # all ranks of a step get the same one, other steps of a node others, mostly
        step = int(variables.get("SLURM_JOB_ID", "0")) * 31 + int(
            variables.get("SLURM_STEP_ID", "0")
        )
        port = PORTS[step % len(PORTS)]
    return Environment("srun", rank, world_size, local_rank, local_size, address, port)


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, such as 2(x3),1, in full."""
    found = []
    for part in filter(None, text.split(",")):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if matched is None:
            raise WrongInput(
                f"SLURM_STEP_TASKS_PER_NODE is {text!r}; wanted numbers such as 2(x3),1."
            )
        found += [int(matched[1])] * int(matched[2] or 1)
    return found


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts, such as gpu[003-010,12],login1, or of
    rack[0-3]_blade[0-41].
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # it may match nothing
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
