"""Which rank this process is: the environment variables of deepspeed, torchrun, srun and mpirun.

train.py and eval.py call `join_launch` first. From then on, every launcher looks like torchrun: RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT hold what the rest of the code needs. docs/clusters.md says
what a user can expect of each launcher, and why.
"""

import re
import sys
import time
import zlib
from collections.abc import Mapping, MutableMapping

from dclr import programs
from dclr.distributed import launched_rank
from dclr.errors import NotConnected, UserError

SIZES_OF_OTHERS = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
"""Variables by which launchers that are not supported name the number of their processes: MPICH and Intel MPI, MVAPICH,
and jsrun. srun may set PMI_SIZE too."""

FIRST_PORT, PORTS = 20000, 9000
"""The ports for srun and mpirun. They lie below those that the system gives to outgoing connections (from 32768), and
they do not include 29400 and 29500, the default ports of torchrun and deepspeed."""


def join_launch(environment: MutableMapping[str, str], at_terminal: bool) -> None:
    """Set the variables of torchrun in `environment` if srun or Open MPI started this process as one of several.

    If RANK is set, nothing changes: torchrun and deepspeed may run inside of srun or mpirun, whose variables then
    describe the launcher and not its ranks.

    Args:
        environment: the variables of this process.
        at_terminal: whether the standard input is a terminal. srun gives its tasks one only with --pty.

    Raises:
        UserError: the variables contradict each other or are incomplete, or belong to an unsupported launcher.
    """
    if "RANK" not in environment:
        if "OMPI_COMM_WORLD_SIZE" in environment:  # else in a Slurm job: Open MPI starts its helpers by srun
            found = ranks_of_mpirun(environment)
        else:
            found = ranks_of_srun(environment, at_terminal)
            refuse_other_launchers(environment, found)
        given = environment.get("WORLD_SIZE", found.get("WORLD_SIZE"))
        chosen = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}
        environment.update({**found, **chosen})
        if found and given != found["WORLD_SIZE"]:
            raise UserError(
                f"WORLD_SIZE is {given}, but {found['WORLD_SIZE']} processes were started: unset WORLD_SIZE, which "
                "follows from srun or mpirun"
            )
    check_ranks(environment)


def require_one_process(environment: Mapping[str, str], command: str) -> None:
    """Raise UserError if several processes were started for a command that runs in one. Call `join_launch` before."""
    processes = environment.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"{command} runs in one process, but {processes} were started: start it without deepspeed, torchrun and "
            "mpirun, and with --ntasks=1 under srun"
        )


def print_error(program: str, error: UserError) -> None:
    """Print the error of "train" or "eval" in one line. Ranks other than 0 wait first: 30 s, or 5 s if not connected.

    A launcher ends all processes when the first one exits. Rank 0 must print its line before that, and one line is
    enough. A rank that is still alive after the wait has an error that rank 0 does not have.
    """
    if launched_rank() > 0:
        time.sleep(5 if isinstance(error, NotConnected) else 30)
    print(f"{programs.name_of(program)}: error: {programs.with_names(str(error))}", file=sys.stderr)


def ranks_of_mpirun(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torchrun for a process that Open MPI started, or {} if it started only one.

    Open MPI does not say on which machine rank 0 runs. On one machine the address is that of the machine itself.

    Raises:
        UserError: the processes are on several machines, and MASTER_ADDR is not set.
    """
    size, local_size = (environment.get(f"OMPI_COMM_WORLD_{name}", "") for name in ("SIZE", "LOCAL_SIZE"))
    if size == "1":
        return {}
    if local_size != size and not environment.get("MASTER_ADDR"):
        raise UserError(
            f"mpirun started {size} processes on several machines, but does not say where rank 0 runs: add "
            "-x MASTER_ADDR=NODE, where NODE is the first machine of the hostfile"
        )
    return {
        "RANK": environment.get("OMPI_COMM_WORLD_RANK", ""),
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("OMPI_COMM_WORLD_LOCAL_RANK", ""),
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port_of(environment.get("PMIX_NAMESPACE", "")),
    }


def ranks_of_srun(environment: Mapping[str, str], at_terminal: bool) -> dict[str, str]:
    """Return the variables of torchrun for a process that srun started, or {} if it did not, or started only one.

    Only srun sets SLURM_STEP_NUM_TASKS. In the batch script of sbatch and in a shell of salloc, SLURM_NTASKS holds the
    number of tasks that a later srun will start, and SLURM_PROCID may be 0. A command there runs as one process.

    Raises:
        UserError: the process was started from a terminal that srun --pty opened for several tasks, or the name of
            the first machine cannot be read.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if size == "1":
        return {}
    if at_terminal:
        raise UserError(
            f"this terminal belongs to srun --pty with {size} tasks, and only the first task has a terminal: give "
            f"SLURM_STEP_NUM_TASKS=1 before the command for one process, or srun --overlap --ntasks={size} for {size}"
        )
    one_machine = environment.get("SLURM_STEP_NUM_NODES") == "1"
    here = environment.get("SLURM_GTIDS", "")
    return {
        "RANK": environment.get("SLURM_PROCID", ""),
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        **({"LOCAL_WORLD_SIZE": str(here.count(",") + 1)} if here else {}),
        "MASTER_ADDR": "127.0.0.1" if one_machine else first_machine(environment),
        "MASTER_PORT": port_of(f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"),
    }


def first_machine(environment: Mapping[str, str]) -> str:
    """Return MASTER_ADDR if it is set, else the first machine of SLURM_STEP_NODELIST, where srun starts rank 0.

    The list is short for many names: "rack[1-2]-node[007-012,015],login1". The first name has the first number of each
    pair of brackets. SLURM_LAUNCH_NODE_IPADDR is not used: it is the machine where srun was typed, such as a login
    node.

    Raises:
        UserError: the list has another form.
    """
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    machines = environment.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?=,|$)", machines)
    name = re.sub(r"\[(\d*)[\d,-]*\]", r"\1", first.group()) if first else ""
    if not name:
        raise UserError(
            f"SLURM_STEP_NODELIST is {machines!r}, whose first machine cannot be read: before srun, "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    return name


def port_of(run: str) -> str:
    """Return the port for a run's store. All processes of a run find the same port, and other runs another one."""
    return str(FIRST_PORT + zlib.crc32(run.encode()) % PORTS)


def refuse_other_launchers(environment: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise UserError if an unsupported launcher started several processes. `found`: the variables of a supported one.

    MPICH starts one helper a machine by srun, which passes the variables of the helper on to the ranks.
    """
    for name in SIZES_OF_OTHERS:
        size = environment.get(name, "1")
        if size not in ("1", found.get("WORLD_SIZE")):
            raise UserError(
                f"{name} is {size}, so a launcher that is not supported has started several processes: use torchrun, "
                "deepspeed, srun, or the mpirun of Open MPI"
            )


def check_ranks(environment: Mapping[str, str]) -> None:
    """Raise UserError unless the variables name one rank of a run, or none of them is set.

    `dclr.training.connection.master` checks what only processes that connect to each other need.
    """
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        number, count = environment.get(name), environment.get(size)
        if name == "RANK" and (number is None) != (count is None) and (number, count) != (None, "1"):
            missing, present = (name, size) if number is None else (size, name)
            raise UserError(
                f"{present} is set and {missing} is not: unset {present} to start one process, or start several with "
                "deepspeed or torchrun, which set both"
            )
        if number is None:
            continue
        valid = number.isascii() and number.isdecimal() and (count is None or (count.isascii() and count.isdecimal()))
        if not valid or (count is not None and int(number) >= int(count)):
            of = "" if count is None else f" and {size} is {count!r}"
            raise UserError(
                f"{name} is {number!r}{of}, but {name} must be a whole number from 0 to {size} - 1: start the "
                "processes with deepspeed or torchrun, which set both"
            )
