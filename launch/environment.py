"""Who started this process: torchrun, DeepSpeed, mpirun, srun or nobody; and so its rank, and where the ranks meet.

The only module of launch/ that reads the variables of launchers. Takes no part in any meeting, but for mpirun's, whose ranks
agree on an address and a port through MPI.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from options import WrongInput

# Outside the range from which Linux and BSD take the ports of outgoing connections, so that none of those is in the way later.
PORTS = range(20_000, 32_000)
MPI_SIZES = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
SLURM = "SLURM_STEP_NUM_TASKS"  # of the tasks of one srun; a batch script by itself has none


@dataclass(frozen=True, slots=True)
class Environment:
    """This process among those that were started together.

    Attributes:
        launcher: who started it, in words.
        rank, world_size: among all.
        local_rank, local_size: among those of this machine.
        address, port: where rank 0 waits for the others; None in a world of one.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        """One line for the user."""
        if self.world_size == 1:
            return f"{self.launcher}: one rank"
        return (
            f"{self.launcher}: rank {self.rank} of {self.world_size}, {self.local_rank} of {self.local_size} on this machine; "
            f"they meet at {self.address}:{self.port}"
        )

    def export(self) -> None:
        """Put it into the process's variables, by the names that torchrun, torch.distributed and DeepSpeed use."""
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

    RANK and WORLD_SIZE, of torchrun, DeepSpeed or a hand, come first, then mpirun's variables, then srun's.

    Raises:
        WrongInput: variables contradict each other or are missing; the message names them and the remedy.
    """
    mpi = next((name for name in MPI_SIZES if name in variables and _means_mpi(name, variables)), None)
    if "WORLD_SIZE" in variables or "RANK" in variables:
        return _by_variables(variables, mpi)
    if mpi is not None:
        return _by_mpi(variables, mpi)
    if SLURM in variables:
        return _by_slurm(variables)
    return Environment("no launcher")


def is_first(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one to speak, as far as that can be told before `find` has succeeded."""
    named = ["RANK", *MPI_SIZES.values(), *(["SLURM_PROCID"] if SLURM in variables else [])]
    return next((variables[name] for name in named if name in variables), "0") == "0"


def free_port() -> int:
    """A TCP port that nobody listens at. Raises OSError where none of a hundred is free."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"100 ports between {PORTS.start} and {PORTS.stop} were tried, and none was free.")


def _means_mpi(size: str, variables: Mapping[str, str]) -> bool:
    """srun sets PMI_SIZE for programs that may be MPI's; it is then srun that counts."""
    return size != "PMI_SIZE" or SLURM not in variables


def _number(variables: Mapping[str, str], name: str, *, below: str | None = None, least: int = 0) -> int:
    """The number in a variable, `least` or more, and less than that in another."""
    try:
        value = int(variables[name])
    except ValueError:
        raise WrongInput(
            f"{name} is {variables[name]!r}, a number was wanted; unset it, or start the ranks with torchrun."
        ) from None
    if value < least:
        raise WrongInput(f"{name} is {value}, {least} or more was wanted; unset it, or start the ranks with torchrun.")
    if below is not None and below in variables and value >= int(variables[below]):
        raise WrongInput(
            f"{name} is {value} and {below} {variables[below]}; it must be below. Unset both, or start the ranks with torchrun."
        )
    return value


def _by_variables(variables: Mapping[str, str], mpi: str | None) -> Environment:
    if "WORLD_SIZE" not in variables:
        raise WrongInput(f"RANK is {variables['RANK']} without WORLD_SIZE; unset it, or start the ranks with torchrun.")
    world_size = _number(variables, "WORLD_SIZE", least=1)
    if "TORCHELASTIC_RUN_ID" in variables:
        launcher = "torchrun"
    elif "CROSS_SIZE" in variables:
        launcher = "DeepSpeed's launcher"
    else:
        launcher = "RANK and WORLD_SIZE"
        _compare(variables, world_size, mpi)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if world_size == 1:
        if variables.get("RANK", "0") != "0":
            _number(variables, "RANK", below="WORLD_SIZE")
        return Environment(launcher)
    if missing:
        raise WrongInput(f"WORLD_SIZE is {world_size} without {', '.join(missing)}; start the ranks with torchrun.")
    rank = _number(variables, "RANK", below="WORLD_SIZE")
    if "LOCAL_WORLD_SIZE" in variables:
        _number(variables, "LOCAL_WORLD_SIZE", least=1)
    local_rank = _number(variables, "LOCAL_RANK", below="LOCAL_WORLD_SIZE") if "LOCAL_RANK" in variables else rank
    local_size = int(variables.get("LOCAL_WORLD_SIZE", variables.get("LOCAL_SIZE", local_rank + 1)))
    port = _number(variables, "MASTER_PORT", least=1)
    return Environment(launcher, rank, world_size, local_rank, local_size, variables["MASTER_ADDR"], port)


def _compare(variables: Mapping[str, str], world_size: int, mpi: str | None) -> None:
    """RANK and WORLD_SIZE that no launcher of ranks has set against those of mpirun and srun."""
    found = []
    if mpi is not None:
        found.append((mpi, MPI_SIZES[mpi], "mpirun"))
    tasks = SLURM if SLURM in variables else "SLURM_NTASKS"
    if tasks in variables and "SLURM_PROCID" in variables:
        found.append((tasks, "SLURM_PROCID", "srun"))
    for size, rank, launcher in found:
        remedy = f"unset RANK and WORLD_SIZE, and {launcher}'s are taken; or start the ranks with torchrun."
        if _number(variables, size, least=1) != world_size:
            raise WrongInput(f"WORLD_SIZE is {world_size} and {size} {variables[size]}; {remedy}")
        if "RANK" in variables and rank in variables and size != "SLURM_NTASKS" and variables[rank] != variables["RANK"]:
            raise WrongInput(f"RANK is {variables['RANK']} and {rank} {variables[rank]}; {remedy}")


def _by_mpi(variables: Mapping[str, str], size: str) -> Environment:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no library of MPI
        raise WrongInput(
            f"{size} is {variables[size]}, so mpirun has started this, but mpi4py cannot be imported ({error}); "
            "install it: pip install mpi4py, or start the ranks with torchrun."
        ) from None
    world = MPI.COMM_WORLD
    if world.size != _number(variables, size, least=1):
        raise WrongInput(
            f"{size} is {variables[size]}, but mpi4py finds {world.size} rank(s): it was built for another MPI than this. "
            "Install it anew: pip install --no-binary mpi4py --force-reinstall mpi4py"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    found, problem = None, None
    if world.rank == 0:
        try:
            address = variables.get("MASTER_ADDR") or ("127.0.0.1" if local.size == world.size else own_address())
            found = address, _number(variables, "MASTER_PORT", least=1) if "MASTER_PORT" in variables else free_port()
        except (OSError, WrongInput) as error:
            problem = str(error)
    found, problem = world.bcast((found, problem))
    if found is None:
        raise WrongInput(f"mpirun: {problem}")
    result = Environment("mpirun", world.rank, world.size, local.rank, local.size, *found)
    local.Free()
    MPI.Finalize()  # all that was wanted of it; a process may now end as it likes, and mpirun sees its exit code
    return result


def own_address() -> str:
    """This machine's address for others: that which its name has, or the one towards the default route.

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
            probe.connect(("192.0.2.1", 9))  # sends nothing: of a datagram only the route is looked up
        except OSError as error:
            raise OSError(f"this machine has no address for the others ({error}); set MASTER_ADDR.") from None
        return str(probe.getsockname()[0])


def _by_slurm(variables: Mapping[str, str]) -> Environment:
    world_size = _number(variables, SLURM, least=1)
    if world_size == 1:
        return Environment("srun")
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in variables]
    if missing:
        raise WrongInput(f"{SLURM} is {world_size} without {', '.join(missing)}; start the ranks with srun, or with torchrun.")
    rank, local_rank = _number(variables, "SLURM_PROCID", below=SLURM), _number(variables, "SLURM_LOCALID")
    per_node = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(variables, "SLURM_NODEID")
    local_size = per_node[node] if node < len(per_node) else local_rank + 1
    hosts = variables.get("SLURM_STEP_NODELIST", variables.get("SLURM_JOB_NODELIST", ""))
    address = variables.get("MASTER_ADDR") or ("127.0.0.1" if local_size == world_size else first_host(hosts))
    if not address:
        raise WrongInput(
            f"{SLURM} is {world_size} without MASTER_ADDR and SLURM_STEP_NODELIST; set MASTER_ADDR to rank 0's host."
        )
    if "MASTER_PORT" in variables:
        port = _number(variables, "MASTER_PORT", least=1)
    else:  # all ranks of a step get the same one, other steps of a node others, mostly
        step = int(variables.get("SLURM_JOB_ID", "0")) * 31 + int(variables.get("SLURM_STEP_ID", "0"))
        port = PORTS[step % len(PORTS)]
    return Environment("srun", rank, world_size, local_rank, local_size, address, port)


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, such as 2(x3),1, in full."""
    found = []
    for part in filter(None, text.split(",")):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if matched is None:
            raise WrongInput(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; wanted numbers such as 2(x3),1.")
        found += [int(matched[1])] * int(matched[2] or 1)
    return found


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts, such as gpu[003-010,12],login1."""
    matched = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert matched is not None  # it may match nothing
    return "".join(part or "" for part in matched.groups())
