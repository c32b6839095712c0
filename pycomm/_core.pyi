"""The C++ core. It does not know torch: tensors cross as address, element count and dtype."""

import enum
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

class DType(enum.Enum):
    BOOL = 0
    UINT8 = 1
    INT8 = 2
    INT16 = 3
    INT32 = 4
    INT64 = 5
    FLOAT16 = 6
    BFLOAT16 = 7
    FLOAT32 = 8
    FLOAT64 = 9
    COMPLEX64 = 10
    COMPLEX128 = 11
    FLOAT8_E4M3FN = 12
    FLOAT8_E4M3FNUZ = 13
    FLOAT8_E5M2 = 14
    FLOAT8_E5M2FNUZ = 15
    FLOAT8_E8M0FNU = 16

class ReduceOp(enum.Enum):
    """How a reduction combines two elements; AVG divides the sum once, by the number of ranks."""

    SUM = 0
    AVG = 1
    MIN = 2
    MAX = 3
    PROD = 4
    BAND = 5
    BOR = 6
    BXOR = 7

class Algorithm(enum.Enum):
    AUTO = 0
    DIRECT = 1
    RING = 2
    GATHER_FOLD = 3
    EXACT_ORDER = 5

class Extent(enum.IntEnum):
    """Whether some floats can be summed.

    ``SUMMABLE``: they and the sum of as many as there are ranks are finite; ``LARGE``: their sum
    may overflow; ``NON_FINITE``: one is NaN or infinite.
    """

    SUMMABLE = 0
    LARGE = 1
    NON_FINITE = 2

class CostModel:
    """What the machine costs, in seconds."""

    def __init__(
        self,
        *,
        alpha_s: float = ...,
        beta_s_per_byte: float = ...,
        gamma_s_per_byte: float = ...,
        meeting_s: float = ...,
    ) -> None: ...
    @property
    def alpha_s(self) -> float: ...
    @property
    def beta_s_per_byte(self) -> float: ...
    @property
    def gamma_s_per_byte(self) -> float: ...
    @property
    def meeting_s(self) -> float: ...

class _PlanRow(TypedDict):
    algorithm: Algorithm
    runs: bool
    seconds: float
    messages: int
    bytes: int

def plan_all_reduce(
    cost: CostModel, count: int, dtype: DType, hosts: int, ranks_per_host: int
) -> list[_PlanRow]:
    """Each possible algorithm: whether it runs, its predicted seconds, and the messages and bytes
    that a host's first rank sends to other hosts. One host: a single row, AUTO.
    """

def add_in_place(destination: int, source: int, count: int) -> None:
    """destination += source, ``count`` float32 at these addresses, by the fold that reductions use:
    what calibration times.
    """

class Buffer:
    """Zeroed memory in this rank's arena, with the (writable) buffer protocol."""

    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Completions:
    """The works that are over, for one thread that waits for many of them."""

    def __init__(self) -> None: ...
    def next(self) -> list[int]:
        """Block until a work is over; the tickets of all since the last call. Empty: closed."""

    def close(self) -> None:
        """Let next() return, now and from now on."""

class Work:
    def wait(self) -> None: ...
    def done(self) -> bool: ...
    def announce_to(self, completions: Completions, ticket: int) -> None:
        """Note ``ticket`` there when the operation is over, at once if it is. Called once."""
    def settled(self) -> bool:
        """Whether its memory is free: the operation is over, on a GPU too."""

    def order_before(self, current_stream: Callable[[int], int]) -> None:
        """What is put on the stream ``current_stream(device)`` from now on waits for the GPU.

        Does nothing for operations on the host. After ``wait()``.
        """

    @property
    def seconds(self) -> float: ...

class TransferWork(Work):
    """What it says of what came is valid once done()."""

    @property
    def source(self) -> int: ...
    @property
    def count(self) -> int:
        """How many bytes came into a slot."""
    @property
    def immediate(self) -> int:
        """The number that came with them."""

class Channel:
    """Point-to-point messages between hosts; made by ``pycomm._mpi``."""

class Group:
    """``place`` is a GPU and the stream on which it is called; None: the host."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def ranks(self) -> list[int]: ...
    @property
    def hosts(self) -> list[list[int]]: ...
    @property
    def memory_bytes(self) -> int:
        """What this rank reserves for the group beside its buckets."""

    def all_reduce(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        op: ReduceOp,
        *,
        divisor: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
        algorithm: Algorithm = ...,
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None: ...
    def reduce(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        op: ReduceOp,
        root: int,
        *,
        divisor: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
        algorithm: Algorithm = ...,
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None:
        """``output`` is written on the root only, where it may be ``input``; 0 elsewhere."""
    def reduce_scatter(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        op: ReduceOp,
        *,
        divisor: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
        algorithm: Algorithm = ...,
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None:
        """``count`` elements of ``output``; ``input`` has ``size`` times as many."""
    def broadcast(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        root: int,
        *,
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None: ...
    def all_gather(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        *,
        output_counts: Sequence[int] = (),
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None: ...
    def gather(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        root: int,
        *,
        output_counts: Sequence[int] = (),
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None:
        """``output`` is written on the root only; 0 elsewhere."""
    def scatter(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        root: int,
        *,
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None:
        """``input`` is read on the root only; 0 elsewhere. ``count`` elements of ``output``."""
    def all_to_all(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        *,
        input_counts: Sequence[int] = (),
        output_counts: Sequence[int] = (),
        shape: Sequence[int] | None = None,
        name: str = "",
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
        async_op: bool = False,
    ) -> Work | None:
        """``count`` elements for each rank, or as many as the two lists say, which go together."""
    def barrier(self, *, timeout_s: float = 0.0, async_op: bool = False) -> Work | None: ...
    def allocate(self, nbytes: int) -> Buffer: ...
    def duplicate(self) -> Group: ...
    def new_group(self, ranks: Sequence[int]) -> Group | None:
        """The group of these of my ranks, in this order; None on the others. All of mine call."""
    def split(self, color: int | None, key: int = 0) -> Group | None:
        """One group for each color, ordered by key, then rank; None for color None."""
    def send(
        self,
        input: int,
        count: int,
        dtype: DType,
        dst: int,
        tag: int,
        *,
        shape: Sequence[int] | None = None,
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
    ) -> None: ...
    def isend(
        self,
        input: int,
        count: int,
        dtype: DType,
        dst: int,
        tag: int,
        *,
        shape: Sequence[int] | None = None,
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
    ) -> TransferWork: ...
    def recv(
        self,
        output: int,
        count: int,
        dtype: DType,
        src: int | None,
        tag: int,
        *,
        shape: Sequence[int] | None = None,
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
    ) -> int:
        """Returns who sent it; ``src`` None takes the earliest message of any rank."""
    def irecv(
        self,
        output: int,
        count: int,
        dtype: DType,
        src: int | None,
        tag: int,
        *,
        shape: Sequence[int] | None = None,
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
    ) -> TransferWork: ...
    def send_to_slot(
        self,
        input: int,
        count: int,
        dst: int,
        tag: int,
        immediate: int,
        *,
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
    ) -> TransferWork:
        """Send ``count`` bytes, and a number, to a rank that calls ``receive_into_slot``."""
    def receive_into_slot(
        self,
        slot: Buffer | tuple[int, int],
        src: int,
        tag: int,
        *,
        place: tuple[int, int] | None = None,
        timeout_s: float = 0.0,
    ) -> TransferWork:
        """Fewer bytes than the slot's may come; the sender writes them there itself where it can.

        ``slot`` is address and bytes of memory on a GPU, or a buffer. Its deadline counts from when
        somebody waits for it.
        """
    def wait(self, work: TransferWork) -> None:
        """Wait for a message of this group; where the ranks share a host, by moving it."""
    def take_turn(self) -> Turn | None:
        """This thread's turn on an idle group of one host; None on others, or in a forked child."""
    def abort(self, reason: str) -> None: ...

class Turn:
    """Runs a group's operations in the threads that come by, one at a time. Others' wait."""

    def all_reduce(
        self,
        input: int,
        output: int,
        count: int,
        dtype: DType,
        op: ReduceOp,
        *,
        prescale: float = 1.0,
        shape: Sequence[int] | None = None,
        name: str = "",
        timeout_s: float = 0.0,
    ) -> None:
        """Issue it behind those issued before, and advance(). Errors come from wait()."""
    def advance(self) -> None:
        """Go on as far as possible without waiting."""
    def check(self) -> None:
        """Look at deadlines and peers; what ends an operation is kept for wait()."""
    def done(self) -> bool:
        """Whether all that was started is over, with an error or without."""
    def wait(self) -> None:
        """Block until all is over; raises what ended it."""
    def close(self) -> None:
        """The group is idle again. After wait(), and the last call."""

class World:
    """This process's memory, peers and progress thread; ``group`` holds all ranks."""

    def __init__(
        self,
        rank: int,
        size: int,
        host_key: str,
        all_gather_bytes: Callable[[bytes], list[bytes]],
        *,
        timeout_s: float,
        channel: Channel | None = None,
        arena_bytes: int = 0,
        cost: CostModel = ...,
        algorithm: Algorithm = ...,
        gpu_places: GpuPlaces = ...,
        gpu_transport: GpuTransport = ...,
        mpi_problem: Callable[[], str] | None = None,
        host_name: str = "",
        job: str = "",
        trace_folder: str = "",
        warn_after_s: float = 0.0,
        host_timeout_s: float = 10.0,
    ) -> None:
        """Find the other ranks. ``arena_bytes=0`` reserves as much as the host has memory.

        ``cost``, ``algorithm`` (for whatever leaves the choice), ``gpu_transport`` and
        ``host_timeout_s`` (how long another host may be silent before it is lost) are the same
        on all ranks. ``mpi_problem`` says why MPI takes no pointers to GPU memory, "" if it does;
        it is called at most once, by a thread of its own, and may take seconds. ``trace_folder`` is
        where what the ranks did last is saved when something fails, "": nowhere; after
        ``warn_after_s`` a rank that waits says so on stderr, 0: never.
        """

    @property
    def group(self) -> Group: ...
    def make_group(
        self,
        ranks: Sequence[int],
        all_gather_bytes: Callable[[bytes], list[bytes]],
        *,
        timeout_s: float = 0.0,
    ) -> Group:
        """A group of these ranks, this one among them, in this order; they alone take part.

        ``all_gather_bytes`` is theirs and collects in that order. ``timeout_s`` is that of calls
        which name none; 0: the world's.
        """
    def check_present(self, ranks: Sequence[int], call: str) -> None:
        """Raise what ends a call if one of these ranks of the world is gone or leaves.

        For who waits for them elsewhere: ranks of other hosts cannot be seen from here.
        """
    def offer_stacks(self, signal: int, descriptor: int) -> None:
        """This process writes the stacks of its threads to ``descriptor`` on ``signal``."""
    def lost(self) -> list[int]:
        """The ranks whose processes are known to have ended without leaving the job.

        Those of this host at once, those of another when it has told so, or been silent for long.
        """
    def withdraw(self) -> None:
        """This rank makes no more calls: who waits for it, in any group, hears of it.

        Until ``close()``, which waits for nobody then, it still hears of the others.
        """
    def abort(self, reason: str) -> bool:
        """Make every rank's pending and later calls raise ``reason``.

        True if this host had not been aborted by another rank before.
        """

    def close(self, *, timeout_s: float = 0.0, failure: str = "") -> None:
        """Leave together with all other ranks, then free what can be freed.

        ``timeout_s`` is how long to wait for them; 0: the world's default. ``failure`` is why this
        rank leaves, if for an error; ranks that still call something are told.

        Raises what an operation that nobody has waited for has finished its group with.
        """

def loopback_worlds(
    hosts: Sequence[int],
    *,
    timeout_s: float = 60.0,
    piece_bytes: int = 524288,
    gpu_places: GpuPlaces = ...,
    gpu_transport: GpuTransport = ...,
    trace_folder: str = "",
    warn_after_s: float = 0.0,
    host_timeout_s: float = 10.0,
) -> list[World]:
    """Worlds whose ranks are threads of this process; rank i lies on pretend host ``hosts[i]``.

    Small pieces make small tensors take the way of large ones.
    """

class Bucket:
    """Gradients laid end to end, reduced together; then a flag for each: was it used."""

    @property
    def dtype(self) -> DType: ...
    @property
    def parameters(self) -> list[int]: ...
    @property
    def offsets(self) -> list[int]:
        """Of each parameter, in elements."""
    @property
    def flags_offset(self) -> int: ...
    @property
    def count(self) -> int:
        """Elements in all, flags included."""

def plan_buckets(
    dtypes: Sequence[DType],
    counts: Sequence[int],
    order: Sequence[int],
    bucket_cap_bytes: int,
    first_bucket_cap_bytes: int,
) -> list[Bucket]:
    """Buckets of one dtype each, in the order of their reduction; a pure function.

    ``order`` names parameters as their gradients arrive; those missing follow in buckets of their
    own.
    """

class BucketStore:
    """The memory of a reducer's buckets."""

# Instead of the all-reduce of a bucket: launch(bucket, divisor, name), where its gradients lie
# there, and finish(bucket), once that work is over.
_Exchange: TypeAlias = tuple[Callable[[int, int, str], Work], Callable[[int], None]]

class HostBuckets(BucketStore):
    """Buckets in this rank's arena."""

    def __init__(
        self,
        group: Group,
        buckets: Sequence[Bucket],
        counts: Sequence[int],
        exchange: _Exchange | None = None,
        measures: bool = False,
    ) -> None:
        """``measures``: each gradient while it is copied, on all ranks or on none."""

    def memory(self, bucket: int) -> Buffer: ...
    def worst(self) -> Extent:
        """The largest of what all ranks have brought in the last pass, the same on every rank.

        With an exchange ``LARGE`` at least if its result is not finite.
        """

    def brought(self) -> list[Extent]:
        """By this rank in the last pass, for each parameter."""

    def extent(self, parameter: int) -> Extent:
        """Of what lies in a parameter's place now."""

class DeviceMemory:
    """Memory on a GPU, with the ``__cuda_array_interface__`` of an array of bytes."""

    @property
    def device(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

class GpuBuckets(BucketStore):
    """Buckets on a GPU, zeroed on ``stream``. Collective."""

    def __init__(
        self,
        group: Group,
        buckets: Sequence[Bucket],
        counts: Sequence[int],
        device: int,
        stream: int,
        exchange: _Exchange | None = None,
    ) -> None: ...
    def memory(self, bucket: int) -> DeviceMemory: ...

class Reducer:
    """Counts gradients as they become final and reduces each bucket once it is full.

    A pass is: ``begin``, ``fill``, ``ready`` or ``hold`` for parameters, ``finish``, ``wait``,
    ``used``. ``stream`` is where the caller puts work for the GPU of the buckets.
    """

    def __init__(
        self,
        group: Group,
        *,
        names: Sequence[str],
        dtypes: Sequence[DType],
        counts: Sequence[int],
        expected_firings: Sequence[int],
        buckets: Sequence[Bucket],
        store: BucketStore,
        overlap: bool,
        algorithm: Algorithm = ...,
    ) -> None: ...
    @property
    def buckets(self) -> list[Bucket]: ...
    @property
    def launched(self) -> int:
        """How many buckets of the current or last pass were launched: the first ones."""

    def begin(self, op: ReduceOp, divisor: int, label: int) -> None: ...
    def fill(self, parameter: int, gradient: int, stream: int = 0) -> None:
        """Copy the gradient at this address, which has the memory layout of its view.

        On a GPU it is copied when its bucket is launched, and has to stay until then; at address 0
        it lies in the bucket.
        """

    def ready(self, parameter: int, stream: int = 0) -> None: ...
    def hold(self, parameter: int) -> None: ...
    def unfired(self) -> list[int]: ...
    def finish(self, stream: int = 0) -> None: ...
    def wait(self, stream: int = 0) -> None: ...
    def used(self, parameter: int) -> bool: ...

class MachineLimit:
    """What one host's cores need for the loads and stores of an all-reduce, in seconds."""

    def __init__(self, group: Group, buffer: Buffer) -> None:
        """Collective: every rank shows its buffer to the others."""

    def fold_part(self, count: int, dtype: DType) -> float:
        """Fold my part of everybody's buffer and store it in all of them, waiting for nobody."""

    def show(self, count: int, dtype: DType) -> float:
        """Copy my first elements to where the others read them."""

    def fold_shown(self, count: int, dtype: DType) -> float:
        """Fold what all ranks have shown."""

    def round_trip(self, trips: int) -> float:
        """A cache line from rank 0 to rank 1 and back; 0 on other ranks."""

def time_all_reduces(group: Group, addresses: Sequence[int], count: int, dtype: DType) -> float: ...
def leave_at_end(code: int, seconds: int = 0, text: str = "") -> None:
    """When Python has ended, leave with ``code`` before what other modules do then.

    Or, with ``seconds``, while they do it, if that takes longer; then with ``text`` on stderr.
    """

def warn_at_end(seconds: int, text: str) -> None:
    """When Python has ended and the process is still there after ``seconds``, write ``text``."""

class OperationState(enum.Enum):
    QUEUED = 0
    RUNNING = 1
    DONE = 2
    FAILED = 3

class Record:
    """One operation in a flight recorder; times are of the host's steady clock, 0 for not yet."""

    @property
    def number(self) -> int:
        """Among all operations of the process, from 1."""
    @property
    def state(self) -> OperationState: ...
    @property
    def queued_s(self) -> float: ...
    @property
    def started_s(self) -> float:
        """0 too if it was started as soon as it was queued, and ended within microseconds."""
    @property
    def ended_s(self) -> float: ...
    @property
    def group(self) -> int:
        """Equal for the members of a group, and for nobody else."""
    @property
    def group_name(self) -> str: ...
    @property
    def is_message(self) -> bool: ...
    @property
    def sequence(self) -> int:
        """Of a collective in its group, from 1; 0: not begun."""
    @property
    def hash(self) -> int:
        """Of a collective: equal on two ranks if this call and all before it agree. 0: not told."""
    @property
    def bytes(self) -> int: ...
    @property
    def call(self) -> str: ...
    @property
    def site(self) -> str:
        """ " at train.py:31", or nothing."""

class RankTrace:
    """What the flight recorder of one rank holds."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def host(self) -> int: ...
    @property
    def process(self) -> int: ...
    @property
    def host_name(self) -> str: ...
    @property
    def job(self) -> str: ...
    @property
    def to_time_of_day_s(self) -> float: ...
    @property
    def gone(self) -> bool:
        """Its process has died."""
    @property
    def left(self) -> bool:
        """Its process has called shutdown()."""
    @property
    def records(self) -> list[Record]: ...

class Trace:
    """The recorders of the ranks of one host at one moment."""

    @property
    def now_s(self) -> float: ...
    @property
    def reason(self) -> str: ...
    @property
    def ranks(self) -> list[RankTrace]: ...

class Watchdog:
    """A ``with`` block that must end in ``seconds``, or the process ends with ``text`` on stderr.

    By a thread that does not need the GIL, and without clean-up.
    """

    def __init__(self, seconds: float, text: str, exit_code: int = 1) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

def read_trace(path: str) -> Trace:
    """A file that was saved upon an error."""

def read_page_at(path: str) -> RankTrace:
    """The recorder in the memory behind a descriptor of a process: ``/proc/PID/fd/N``."""

def hide_frames_of(folders: list[str]) -> None:
    """Frames of files below these folders are not where the user's code makes a call."""

def linger(seconds: float) -> None:
    """Keep TCP connections open for ``seconds`` after the end of this process."""

class GpuReport:
    """What of the GPU plane is here; each text says what, or why not and what to do."""

    @property
    def headers(self) -> str: ...
    @property
    def runtime(self) -> str: ...
    @property
    def runtime_file(self) -> str: ...
    @property
    def driver(self) -> str: ...
    @property
    def nccl(self) -> str: ...
    @property
    def has_nccl(self) -> bool: ...
    @property
    def kernels(self) -> str: ...

class GpuTransport(enum.Enum):
    """What carries calls on GPUs: NCCL, the host's collectives through staging memory, or between
    hosts MPI from GPU memory.

    AUTO is NCCL if every rank has it, else MPI if none has and every rank's MPI can, else STAGED.
    """

    AUTO = 0
    NCCL = 1
    STAGED = 2
    MPI = 3

class GpuPlaces:
    """Where CUDA, NCCL and our kernels may lie, beside where the loader looks, and how much of a
    GPU's memory reductions in exact order may take.
    """

    def __init__(
        self,
        cuda_folders: Sequence[str] = (),
        nccl_folders: Sequence[str] = (),
        kernels: str = "",
        scratch_bytes: int = ...,
    ) -> None: ...

def gpu_report(places: GpuPlaces) -> GpuReport:
    """Look for CUDA and NCCL; loads the libraries and starts nothing."""

def extent(dtype: DType, address: int, bytes: int, ranks: int) -> Extent:
    """Of some floats, of as many ranks."""

def copy_measured(dtype: DType, to: int, from_: int, bytes: int, ranks: int) -> Extent:
    """Copy some floats past the caches; their extent, of as many ranks."""

def checksum(address: int, bytes: int) -> int:
    """XXH64 of some bytes."""

def simd_level() -> str: ...
def tensor_calls(
    tensor_type: type, is_neg: Callable[..., bool], increment_version: Callable[..., None]
) -> tuple[
    Callable[[Group, object, object, object], bool],
    Callable[[Callable[..., object]], Callable[..., object]],
    Callable[[Group | None], None],
]:
    """``all_reduce(group, input, output, op)``, ``shortened(function)`` and ``set_world(group)``.

    The first returns False, having done nothing, on unusual tensors. The second puts such a short
    way before the public function of that name; a call without a group means the one given to the
    third.
    """
