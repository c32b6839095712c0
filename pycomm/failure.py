"""An exception on one rank ends the job.

Python would print the traceback of the failing rank, go on to finalise MPI, and wait there for
ranks that wait for it. Instead:

- The first failing rank tells the others (``World.abort``), prints its traceback with rank and
  host on every line, runs the ``atexit`` handlers, and leaves without finalising MPI. Ranks of
  other hosts are ended through ``MPI_Abort`` meanwhile: the closing of its connections would reach
  them before the launcher does, and they would complain of that.
- A rank that fails because another did lets that one end the job, and prints nothing then, so that
  the first traceback is the last thing to read. It leaves a moment later, because launchers kill
  the job when the first rank has gone, and report that rank's exit code.
- A rank that lost a peer, by a kill say, leaves the ranks of other hosts time to raise that
  themselves, where the launcher does (ULFM).
- ``sys.exit(3)`` or ``exit(3)`` on one rank is a failure too, with exit code 3, unless every rank
  has shut down; ``sys.exit(0)`` is a normal end. Ctrl-C leaves with 130 and one line from the first
  rank. A plain ``raise SystemExit(3)`` nobody can see: it counts as a normal end.
- Processes of ``multiprocessing`` (torch's ``spawn``) catch everything themselves: they fail if
  their exit code is not 0.
- Exceptions that are caught, and those of threads other than the main one, end nothing.

A world of one rank, an interactive session and a forked child fail as Python does.
"""

from __future__ import annotations

import _sitebuiltins
import atexit
import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.spawn import spawn_main
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from pycomm import _core
from pycomm.errors import PeerLostError

if TYPE_CHECKING:
    from mpi4py import MPI

# Together below the 5 s within which every rank has to be gone.
_HANDLERS_S = 3.0  # for atexit handlers; who is not done by then is cut off
_ECHO_DELAY_S = 1.0  # how long ranks that only echo another's failure stay for it to be printed
_HEAD_START_S = 0.5  # of that, how long they leave it to the other to end the job
# A launcher that ends the job kills one rank after another: who is left for a moment would complain
# of those that are gone. Open MPI 5.0.11 ends ranks 0.5 s after a peer was killed.
_LAUNCHER_S = 0.2
_LAUNCHER_ENDS_RANKS_S = 1.0  # those of another host; Open MPI 5.0.11 does it in 0.3 s
# Ranks of other hosts, if the launcher spares them, are to hear of a loss by themselves: so long a
# rank that heard of it leaves them to come to their next call, before it has them ended.
_OTHERS_HEAR_S = 1.5
_FINALISE_S = 2  # for MPI to finalise after a process was lost, where it may wait for ever

_ENDED_BY = "the job was ended by "
# What the others' PeerLostError says after World.abort, and after a Ctrl-C inside a collective.
_ECHOES = (_ENDED_BY, "was interrupted in")


@dataclass(frozen=True)
class Member:
    """The rank that this process is."""

    rank: int
    size: int
    host: str
    abort: Callable[[str], bool]  # World.abort: tell the others; True if nobody was first
    leave: Callable[[int], object] = os._exit  # with this exit code, without finalising MPI
    spared: bool = False  # a loss ends no rank of the other hosts, before this one leaves

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on {self.host}"


_member: Member | None = None
_left_with: _Departure | None = None
_end_bound: tuple[int, str] | None = None  # see bound_end
_python_exit = sys.exit
_previous_hook = sys.excepthook
_hooked = False


def watch(member: Member) -> None:
    """From now on a failure of this process ends the job of ``member``."""
    global _member
    _install_hooks()
    _member = member


def _install_hooks() -> None:
    global _hooked, _previous_hook
    if not _hooked:
        # The hooks stay, idle, when nobody is watched any more: somebody else's may be around them.
        _previous_hook = sys.excepthook
        sys.excepthook = _on_uncaught
        sys.exit = _exit
        # What the built-in exit() and quit() raise, which site makes (`python -S` has neither).
        _sitebuiltins.SystemExit = _Exit  # type: ignore[attr-defined]
        # Before all atexit handlers, so that they can still be run with a bound. Private in
        # `threading`, and what concurrent.futures uses.
        threading._register_atexit(_on_main_thread_end)  # type: ignore[attr-defined]
        os.register_at_fork(after_in_child=_watch_child)
        _hooked = True


def unwatch() -> None:
    """The job is over: fail as Python does."""
    global _member
    _member = None


def being_handled() -> str:
    """The exception for which this thread is in a ``finally`` or ``except``, in a line; or ""."""
    error = sys.exc_info()[1]
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return ""
    return _summary(error).splitlines()[0]


def abort_mpi(comm: MPI.Intracomm, code: int) -> None:
    """Have the launcher end all ranks, before MPI does it for want of a connection to this one."""
    _core.linger(_LAUNCHER_ENDS_RANKS_S)
    comm.Abort(code)


def _watch_child() -> None:
    """A forked child fails and ends as Python does, but for mpi4py.

    It finalises MPI when the interpreter has ended, in a child too, where that waits for ever.
    """
    unwatch()
    if "mpi4py.MPI" in sys.modules:
        bound_end(0)


def note_loss() -> None:
    """A process of the job was lost: MPI may then finalise for ever.

    Seen in about 5 % of such ends with Open MPI 5.0.11.
    """
    if "mpi4py.MPI" in sys.modules:
        bound_end(_FINALISE_S)


def bound_finalising(member: Member, timeout_s: float) -> None:
    """Bound the wait for a rank that is lost when this one has left the job.

    For launchers that leave survivors alone: others end the job then.
    """
    seconds = min(math.ceil(timeout_s), 1 << 31)
    bound_end(
        seconds,
        f"pycomm: {member} has ended, has waited {seconds} s in MPI_Finalize for another rank, and "
        "leaves.\n",
    )


def bound_end(seconds: int, text: str = "") -> None:
    """When Python has ended, MPI gets so many seconds to finalise; of several bounds the shortest.

    Args:
        text: for stderr, if it takes longer and this process leaves.
    """
    global _end_bound
    if _end_bound is None:
        _install_hooks()  # they note the exit code
        atexit.register(leave_at_end)  # unless the handlers run already: see runtime
    if _end_bound is None or seconds < _end_bound[0]:
        _end_bound = (seconds, text)


def leave_at_end() -> None:
    """In an exit handler: have the end bounded, if it is to be."""
    if _end_bound is not None:
        _core.leave_at_end(0 if _left_with is None else _left_with.number(), *_end_bound)


def warn_at_end(member: Member, after_s: float) -> None:
    """Have a line written where this process waits in MPI_Finalize for one that does not end.

    That may be meant: a rank that works on, alone, after ``shutdown()``. So nothing is ended.

    Args:
        after_s: seconds of waiting; 0: never.
    """
    seconds = math.ceil(after_s)
    if seconds > 0:
        _core.warn_at_end(
            seconds,
            f"pycomm: {member} has ended and has waited {seconds} s in MPI_Finalize for another "
            "rank, which works on after shutdown(), is stopped, or is stuck at its end.\n",
        )


def is_echo(error: BaseException) -> bool:
    """Whether the lost peer of ``error`` had ended the job, or was interrupted."""
    return any(echo in str(error) for echo in _ECHOES)


def leave_job(code: int, reason: str) -> NoReturn:
    """End the job with ``code``, all ranks for the same reason; the first one prints it."""
    member = _member
    if member is None:
        _say(f"{reason}\n")
        _flush()
        os._exit(code)
    _end_job(member, code, reason, f"{member}: {reason}\n", 0.0)


def end_job_at_exit(error: BaseException) -> None:
    """``error`` came while an atexit handler left the job: there is no excepthook any more."""
    if _member is not None:
        # The handlers that were registered after init() have run; the earlier ones are skipped.
        text = f"{_member}: while leaving the job at exit: {_summary(error)}\n"
        _end_job(_member, 1, _summary(error), text, _head_start_s(error), run_handlers=False)


def _on_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    global _left_with
    member = _member
    if member is None or hasattr(sys, "ps1"):
        _previous_hook(kind, error, trace)
        if _end_bound is not None:
            interrupted = issubclass(kind, KeyboardInterrupt)
            _left_with = _Departure(130 if interrupted else 1, 0.0)
    elif issubclass(kind, KeyboardInterrupt):
        _end_job(member, 130, "interrupted", f"{member}: interrupted\n", 0.0)
    elif _previous_hook is sys.__excepthook__:
        _end_job(member, 1, _summary(error), _traceback_of(error), _head_start_s(error))
    else:  # another way of printing tracebacks, which prefixes would spoil

        def print_it() -> None:
            _say(f"{member}:\n")
            with contextlib.redirect_stderr(_stderr()):
                _previous_hook(kind, error, trace)

        _end_job(member, 1, _summary(error), print_it, _head_start_s(error))


@dataclass(frozen=True)
class _Departure:
    """How the script was left."""

    code: object
    head_start_s: float

    def number(self) -> int:
        """The exit code that Python makes of it; a text it has printed."""
        if self.code is None:
            return 0
        return self.code if isinstance(self.code, int) else 1


class _Exit(SystemExit):
    """What ``sys.exit()`` and ``exit()`` raise on a watched rank.

    It notes whether it left the script.

    Python tells exit handlers neither that a SystemExit ended the script nor its code, and one
    that was caught (a test runner, click) must not count. But Python drops an exception that left
    the script when no frame is left, and a caught one while some frame runs.
    """

    def __del__(self) -> None:
        global _left_with
        if sys._getframe().f_back is None:
            _left_with = _Departure(self.code, _head_start_s(self))


def _exit(status: object = None, /) -> NoReturn:
    if _member is None and _end_bound is None:
        _python_exit(status)  # type: ignore[arg-type]
    raise _Exit(status)


def _on_main_thread_end() -> None:
    member, departure = _member, _left_with
    if member is None:
        return
    worker = _multiprocessing_worker()
    if worker is not None and worker.exit_code:
        summary = f"its process ends with exit code {worker.exit_code}"
        text = f"{member}: {summary}\n"
        _end_job(member, worker.exit_code, summary, text, 0.0, run_handlers=worker.runs_handlers)
    if departure is None or not departure.code:
        return
    summary = f"sys.exit({departure.code!r})"
    _end_job(member, departure.number(), summary, f"{member}: {summary}\n", departure.head_start_s)


@dataclass(frozen=True)
class _Worker:
    """A process that ``multiprocessing`` started, when its function is over."""

    exit_code: int
    runs_handlers: bool  # a forked one does not: its handlers are its parent's


def _multiprocessing_worker() -> _Worker | None:
    """This process, if it is one.

    What its function raised was caught by a frame that is still there: the one that knows.
    """
    # Private, and with a local variable of that name, in Python 3.10 to 3.13. Where they are not,
    # the rank is told of as one that has made fewer calls.
    bootstrap = getattr(BaseProcess, "_bootstrap", None)
    code: Any = getattr(bootstrap, "__code__", None)
    frames = {frame.f_code: frame for frame, _ in traceback.walk_stack(sys._getframe())}
    if code not in frames:
        return None
    return _Worker(frames[code].f_locals.get("exitcode", 0), spawn_main.__code__ in frames)


def _end_job(
    member: Member,
    code: int,
    summary: str,
    say: str | Callable[[], None],
    head_start_s: float,
    *,
    run_handlers: bool = True,
) -> NoReturn:
    """Tell the others, say what happened if this rank is the first to, and leave with ``code``."""
    start = time.monotonic()
    try:
        with contextlib.ExitStack() as bound:
            with contextlib.suppress(RuntimeError):  # there is no thread to be had
                # It cuts off handlers that hold the GIL, too.
                bound.enter_context(_core.Watchdog(_HANDLERS_S, "", code))
            time.sleep(head_start_s)
            first = member.abort(f"{_ENDED_BY}{member}: {summary}")
            if first:
                say() if callable(say) else _say(say)
            unwatch()
            if run_handlers:
                atexit._run_exitfuncs()
            _flush()
            stay_s = _OTHERS_HEAR_S if member.spared and head_start_s > 0 else 0.0
            if not first:  # Open MPI 5.0.11 returns 0 if two ranks of a host abort at once
                stay_s += _ECHO_DELAY_S
            time.sleep(max(0.0, start + stay_s - time.monotonic()))
            member.leave(code)
    finally:  # whatever else goes wrong, do not stay
        os._exit(code)


def _traceback_of(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "".join(f"{_member}: {line}\n" for line in lines)


def _summary(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _head_start_s(error: BaseException | None) -> float:
    """How long this rank leaves it to another to end the job, after ``error`` or its causes."""
    seconds = 0.0
    while error is not None:
        if isinstance(error, PeerLostError):
            # An interrupted rank may still be on its way to the end, or have caught it.
            seconds = max(seconds, _HEAD_START_S if is_echo(error) else _LAUNCHER_S)
        error = error.__cause__ or error.__context__
    return seconds


def _say(text: str) -> None:
    """One write, so that ranks do not mix their lines."""
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        stream = _stderr()
        stream.write(text)
        stream.flush()


def _stderr() -> TextIO:
    """Where text still arrives. A hook around ours may collect it in memory, to prefix each line
    when we return (torch.distributed does), and we do not.
    """
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return sys.__stderr__ or sys.stderr
    return sys.stderr


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
