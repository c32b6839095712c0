"""Environments as launchers really set them, cut down to what identifies a rank."""

import pytest

from pycomm.errors import InvalidArgumentError
from pycomm.launch import Launcher, Meeting, detect

OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "1843920897",
}
OPEN_MPI_5 = {
    **OPEN_MPI_4,
    "OMPI_TOOL_NAME": "mpirun",
    "OMPI_VERSION": "5.0.11",
    "PMIX_NAMESPACE": "prterun-node1-4828@1",
    "PRTE_LAUNCHED": "1",
}
MPICH = {
    "PMI_FD": "9",
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
}
INTEL_MPI = {**MPICH, "I_MPI_HYDRA_HOST_FILE": "/tmp/hosts", "HYDI_CONTROL_FD": "7"}
PALS = {
    "PALS_APID": "6a3f",
    "PALS_RANKID": "2",
    "PALS_LOCAL_RANKID": "0",
    "PALS_NODEID": "1",
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_LOCAL_RANK": "0",
    "PMI_LOCAL_SIZE": "2",
}
PALS_WITH_PMIX = {
    "PALS_APID": "6a3f",
    "PALS_RANKID": "2",
    "PALS_LOCAL_RANKID": "0",
    "PALS_LOCAL_SIZE": "2",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "6a3f",
}
SLURM_JOB = {
    "SLURM_JOB_ID": "811",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "0",
}
SBATCH = {**SLURM_JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
SRUN_PMI2 = {**SRUN, "PMI_FD": "9", "PMI_JOBID": "811.0", "PMI_RANK": "2", "PMI_SIZE": "4"}
SRUN_PMIX = {**SRUN, "PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.811.0"}
# What srun gives to the daemons of an mpirun inside a job, and they to the ranks they start.
DAEMON = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "0e1fce5a",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
POD = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
# One rank of a world of one on its node, as mpirun starts a torchrun on each node.
MPIRUN_PER_NODE = {**OPEN_MPI_5, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}

RANK_2_OF_4 = {
    "Open MPI 4": (OPEN_MPI_4, Launcher.OPEN_MPI),
    "Open MPI 5": (OPEN_MPI_5, Launcher.OPEN_MPI),
    "MPICH": (MPICH, Launcher.HYDRA),
    "Intel MPI": (INTEL_MPI, Launcher.HYDRA),
    "PALS": (PALS, Launcher.PALS),
    "srun": (SRUN, Launcher.SRUN),
    "srun --mpi=pmi2": (SRUN_PMI2, Launcher.SRUN),
    "srun --mpi=pmix": (SRUN_PMIX, Launcher.SRUN),
    "torchrun": (TORCHRUN, Launcher.TORCHRUN),
    "pod": (POD, Launcher.TORCH_ENV),
    "torchrun in mpirun": ({**MPIRUN_PER_NODE, **TORCHRUN}, Launcher.TORCHRUN),
    "torchrun in srun": ({**DAEMON, **TORCHRUN}, Launcher.TORCHRUN),
    "Open MPI in sbatch": ({**SBATCH, **OPEN_MPI_5}, Launcher.OPEN_MPI),
    "Open MPI through srun": ({**DAEMON, **OPEN_MPI_5}, Launcher.OPEN_MPI),
    "Open MPI in a pod": ({**POD, "RANK": "0", **OPEN_MPI_5}, Launcher.OPEN_MPI),
    "Open MPI in PALS": (
        {**PALS, "PALS_RANKID": "0", "PMI_RANK": "0", "PMI_SIZE": "1", **OPEN_MPI_5},
        Launcher.OPEN_MPI,
    ),
    "MPICH in sbatch": ({**SBATCH, **MPICH}, Launcher.HYDRA),
    "MPICH through srun": ({**DAEMON, **MPICH}, Launcher.HYDRA),
    "MPICH in a pod": ({**POD, "RANK": "0", **MPICH}, Launcher.HYDRA),
    "MPICH in PALS": ({**PALS, "PALS_RANKID": "0", **MPICH}, Launcher.HYDRA),
}


@pytest.mark.parametrize("name", RANK_2_OF_4)
def test_innermost_launcher_wins(name):
    environ, launcher = RANK_2_OF_4[name]
    launch = detect(environ)
    assert (launch.launcher, launch.rank, launch.world_size) == (launcher, 2, 4)
    assert launch.local_rank in (0, None)
    by_store = launcher in (Launcher.TORCHRUN, Launcher.TORCH_ENV)
    assert launch.meeting is (Meeting.STORE if by_store else Meeting.MPI)
    assert f"={launch.rank}" in launch.announcement(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/usr/bin", "MASTER_ADDR": "localhost"},
        SBATCH,
        {**SBATCH, "SLURM_STEP_ID": "4294967291"},  # the batch script
        {**SBATCH, "SLURM_STEP_ID": "batch"},
        {**SBATCH, "SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        {**SBATCH, "SLURM_STEP_ID": "4294967292"},  # adopted ssh sessions
    ],
)
def test_what_a_batch_system_leaves_behind_is_a_world_of_one(environ):
    launch = detect(environ)
    assert launch.launcher is Launcher.NONE
    assert (launch.rank, launch.world_size, launch.meeting) == (0, 1, Meeting.ALONE)


def test_an_interactive_srun_shell_is_a_world_of_one():
    launch = detect({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert (launch.launcher, launch.meeting) == (Launcher.SRUN, Meeting.ALONE)


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (PALS_WITH_PMIX, Launcher.PALS),
        ({"PMIX_RANK": "2", "PMIX_NAMESPACE": "prun@1"}, Launcher.PMIX),
    ],
)
def test_where_only_mpi_knows_the_size(environ, launcher):
    launch = detect(environ)
    assert (launch.launcher, launch.rank, launch.world_size) == (launcher, 2, None)
    assert launch.meeting is Meeting.MPI


def without(environ, name):
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({**OPEN_MPI_5, "OMPI_COMM_WORLD_RANK": "4"}, ["OMPI_COMM_WORLD_RANK=4", "SIZE=4"]),
        ({**OPEN_MPI_5, "OMPI_COMM_WORLD_SIZE": "four"}, ["OMPI_COMM_WORLD_SIZE='four'"]),
        ({**OPEN_MPI_5, "OMPI_COMM_WORLD_SIZE": ""}, ["OMPI_COMM_WORLD_SIZE=''"]),
        ({**MPICH, "PMI_RANK": "-1"}, ["PMI_RANK='-1'"]),
        ({**MPICH, "MPI_LOCALRANKID": "x"}, ["MPI_LOCALRANKID='x'"]),
        (without(MPICH, "PMI_SIZE"), ["PMI_SIZE unset", "PMI_RANK='2'"]),
        (without(OPEN_MPI_4, "OMPI_COMM_WORLD_RANK"), ["WORLD_RANK unset", "WORLD_SIZE='4'"]),
        (without(SRUN, "SLURM_PROCID"), ["SLURM_PROCID unset", "SLURM_STEP_NUM_TASKS='4'"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, ["MASTER_PORT=65536"]),
        (without(TORCHRUN, "MASTER_ADDR"), ["MASTER_ADDR is not set", "WORLD_SIZE=4"]),
        ({"RANK": "1"}, ["WORLD_SIZE unset", "RANK='1'"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set", "RANK=1"]),
    ],
)
def test_nonsense_is_named(environ, names):
    with pytest.raises(InvalidArgumentError) as raised:
        detect(environ)
    for name in names:
        assert name in str(raised.value)
