"""Starts the job of a round, on this host or on two that are made for it, and breaks the hosts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import Cluster
from launchers import ULFM_BETWEEN_HOSTS, files_of_mpirun, mpirun_command, process_options

from chaos import processes
from chaos.plan import RANKS, RANKS_OF_A_HOST, Fault
from chaos.reports import HOST_FILE, phase_has_begun

# In seconds. A start takes 5 on an idle core; the deadline of the job's calls is the first.
CALL_TIMEOUT_S = 8.0
HOST_TIMEOUT_S = 5.0

_LOOK_S = 0.01


@contextlib.contextmanager
def started(fault: Fault, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher of the job. Hosts that were made for it, and all on them, end with this."""
    module = "chaos.elastic_job" if fault.is_elastic else "chaos.job"
    job = [sys.executable, "-m", module, str(folder), fault.encode()]
    environ = {
        processes.VARIABLE: str(folder),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYCOMM_TIMEOUT_S": str(CALL_TIMEOUT_S),
        "PYCOMM_HOST_TIMEOUT_S": str(HOST_TIMEOUT_S),
        "PYCOMM_TRACE_FOLDER": str(folder / "traces"),
    }
    with contextlib.ExitStack() as stack:
        if fault.hosts == 1:
            command = mpirun_command(RANKS, "--with-ft", "ulfm")
            environ.update(files_of_mpirun(folder))
        else:
            cluster = stack.enter_context(Cluster([RANKS_OF_A_HOST] * fault.hosts))
            command = cluster.mpirun_command("slot", *ULFM_BETWEEN_HOSTS)
            environ = {**cluster.environment(), **environ}
            if fault.of_host:
                over = threading.Event()
                thread = threading.Thread(
                    target=_break_host, args=(cluster, fault, folder, over), daemon=True
                )
                thread.start()
                stack.callback(thread.join)
                stack.callback(over.set)
        output = stack.enter_context(open(folder / "output", "wb"))
        yield subprocess.Popen(
            [*command, *job],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **process_options(**environ),
        )


def _break_host(cluster: Cluster, fault: Fault, folder: Path, over: threading.Event) -> None:
    while not phase_has_begun(folder, fault):
        if over.wait(_LOOK_S):
            return
    if over.wait(fault.delay_s):
        return
    now = time.monotonic()
    if fault.of_host == "cut":
        cluster.cut(fault.host)
    else:
        cluster.power_off(fault.host)
    (folder / HOST_FILE).write_text(str(now))
