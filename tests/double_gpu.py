"""Tensors on GPUs that are a double: no GPU runs here, and none is needed.

A ``DoubleTensor`` says that it is on ``cuda:n``, and its memory is "device" memory of the stand-in
for libcudart (``tests/double/``), which no host code can touch. What torch computes with it, it
computes on the CPU, once all that is on the double's current stream of that GPU is over, and before
anything that gets there later: a wait that pycomm forgets between its stream and the caller's is
seen as wrong numbers.

Rank ``n`` has GPU ``n``. Ranks are threads of this process, as ``run_ranks`` has them, or processes
of this host that call ``pycomm.init()``.
"""

import collections
import ctypes
import fcntl
import gc
import os
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from run_ranks import run_ranks
from torch.utils._pytree import tree_map_only

from pycomm import _core, device, gpu_libraries, gradient_sync

T = TypeVar("T")
Module = TypeVar("Module", bound=torch.nn.Module)

HERE = Path(__file__).parent
BUILD = Path(__file__).parent.parent / "build" / "dev"
NOBODY, CALLERS, NCCLS = 1 << 20, 0, -5  # priorities of streams, for starve()


class Double:
    """The stand-ins for libcudart and libnccl, loaded; built before, unless somebody else has."""

    def __init__(self, *, build: bool = True) -> None:
        targets = ["double_cudart", "double_nccl", "double_image"]
        if build:
            with (BUILD / "CMakeCache.txt").open() as turn:  # ranks may be processes
                fcntl.flock(turn, fcntl.LOCK_EX)
                subprocess.run(["cmake", "--build", BUILD, "--target", *targets], check=True)
        self.places = _core.GpuPlaces(
            kernels=str(BUILD / "libdouble_image.so"),
            scratch_bytes=1 << 20,  # there is little memory
        )
        self.cuda = ctypes.CDLL(str(BUILD / "libdouble_cudart.so"), mode=ctypes.RTLD_GLOBAL)
        self.cuda.gpu_double_reachable.restype = ctypes.c_void_p
        self.cuda.gpu_double_errors.restype = ctypes.c_char_p
        self._streams: dict[int, int] = {}
        self._lock = threading.Lock()

    def stream(self, gpu: int) -> int:
        """The stream that the GPU's rank works on."""
        with self._lock:
            if gpu not in self._streams:
                self._streams[gpu] = self._new_stream(gpu)
            return self._streams[gpu]

    def _new_stream(self, gpu: int) -> int:
        stream = ctypes.c_void_p()
        self._call("cudaSetDevice", gpu)
        self._call("cudaStreamCreateWithPriority", ctypes.byref(stream), 1, CALLERS)
        assert stream.value is not None
        return stream.value

    def synchronize(self, gpu: int) -> None:
        """Wait for the rank's stream."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream(gpu)))

    def allocate(self, gpu: int, nbytes: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaSetDevice", gpu)
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def bytes_at(self, address: int, nbytes: int) -> torch.Tensor:
        """The memory as the double's own steps find it."""
        reachable = self.cuda.gpu_double_reachable(ctypes.c_void_p(address))
        array = (ctypes.c_byte * max(nbytes, 1)).from_address(reachable)
        return torch.frombuffer(array, dtype=torch.uint8)[:nbytes]

    def hold(self, gpu: int, held: bool) -> None:
        """The stream of the GPU's rank stops before its next step."""
        self.cuda.gpu_double_hold(ctypes.c_void_p(self.stream(gpu)), held)

    def starve(self, priority: int) -> None:
        self.cuda.gpu_double_starve(priority)

    def forget(self, function: str, priority: int) -> None:
        self.cuda.gpu_double_forget(function.encode(), priority)

    def kernel_launches(self) -> int:
        return int(self.cuda.gpu_double_kernel_launches())

    def errors(self) -> str:
        return str(self.cuda.gpu_double_errors().decode())

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self.cuda, function)(*arguments)
        assert result == 0, f"{function} of the double returned {result}"


def autograd_library() -> Path:
    """Built anew: what a process loads before torch, for ``backward()`` to work on the double."""
    torch_folder = Path(torch.__file__).parent
    library = BUILD / "libdouble_autograd.so"
    made = library.with_suffix(f".{os.getpid()}")
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC"),
            *("-isystem", torch_folder / "include", HERE / "double" / "autograd.cpp"),
            *("-o", made, "-L", torch_folder / "lib", "-ltorch_cpu", "-lc10"),
            f"-Wl,-rpath,{torch_folder / 'lib'}",
        ],
        check=True,
    )
    made.replace(library)  # at once: other processes load it
    return library


# By GPU: how often the host waited for what the rank computes there, as torch does when a value
# goes from one to the other.
host_waits: collections.Counter[int] = collections.Counter()

_double: Double | None = None


def the_double() -> Double:
    global _double
    if _double is None:
        _double = Double()
    return _double


class Block:
    """Memory of the double, freed with the last tensor in it, in the order of the rank's stream.

    So does torch's allocator: what is freed is used again by what gets to the same stream later.
    """

    def __init__(self, gpu: int, nbytes: int) -> None:
        self.address = the_double().allocate(gpu, nbytes)
        weakref.finalize(self, self._free, gpu, self.address)

    @staticmethod
    def _free(gpu: int, address: int) -> None:
        the_double().synchronize(gpu)
        the_double().free(address)


class DoubleTensor(torch.Tensor):
    """A tensor on a GPU of the double."""

    _inner: torch.Tensor  # the same memory, where the CPU can reach it
    _gpu: int
    _begin: int  # where `_inner`'s storage begins on the GPU
    _keeps: object

    @staticmethod
    def __new__(cls, inner: torch.Tensor, gpu: int, begin: int, keeps: object) -> "DoubleTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", gpu),
        )
        made._inner, made._gpu, made._begin, made._keeps = inner, gpu, begin, keeps
        return made

    def __init__(self, *_: object) -> None:
        pass

    def data_ptr(self) -> int:
        return self._begin + self._inner.storage_offset() * self._inner.element_size()

    @property
    def data(self) -> "DoubleTensor":
        return self.detach()

    @data.setter
    def data(self, other: "DoubleTensor") -> None:
        torch.Tensor.data.__set__(self, other)
        self._inner, self._gpu, self._begin, self._keeps = (
            *(other._inner, other._gpu),
            *(other._begin, other._keeps),
        )

    # These ask torch's CUDA for the device before anything else; the others do not.

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        if self.is_contiguous(memory_format=memory_format):
            return self
        return torch.ops.aten.clone(self, memory_format=memory_format)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        place, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        given: dict[str, Any] = {}
        if place is not None and place != self.device:
            given |= {"device": place, "non_blocking": non_blocking}
        if dtype is not None and dtype != self.dtype:
            given["dtype"] = dtype
        return torch.ops.aten._to_copy(self, **given) if given or copy else self

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "DoubleTensor":
        the_double().synchronize(self._gpu)
        host_waits[self._gpu] += source.is_cpu and not non_blocking
        self._inner.copy_(source._inner if isinstance(source, DoubleTensor) else source)
        return self

    def split(self, sizes: list[int], dim: int = 0) -> Any:
        return torch.ops.aten.split_with_sizes(self, sizes, dim)

    def double(self) -> Any:
        return self.to(torch.float64)

    def cpu(self) -> Any:
        return self.to("cpu")

    def __repr__(self, **_: object) -> str:
        return f"DoubleTensor({tuple(self.shape)}, {self.dtype}, cuda:{self._gpu})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            return _moved(args[0], kwargs)
        given: list[DoubleTensor] = []
        tree_map_only(DoubleTensor, given.append, (args, kwargs))
        gpu = given[0]._gpu
        assert all(t._gpu == gpu for t in given), "tensors on two GPUs"
        the_double().synchronize(gpu)
        host_waits[gpu] += func in _WAITED_FOR or (
            func is torch.ops.aten.copy_.default and args[0].is_cpu != args[1].is_cpu
        )
        kwargs.pop("device", None)
        inner_args, inner_kwargs = tree_map_only(DoubleTensor, lambda t: t._inner, (args, kwargs))
        results = func(*inner_args, **inner_kwargs)

        def wrapped(result: torch.Tensor) -> torch.Tensor:
            for t in given:
                if result is t._inner:
                    return t  # an operation in place
            storage = result.untyped_storage().data_ptr()
            for t in given:
                if storage == t._inner.untyped_storage().data_ptr() and storage != 0:
                    return DoubleTensor(result, gpu, t._begin, t._keeps)
            return on_gpu(result, gpu)

        return tree_map_only(torch.Tensor, wrapped, results)


_WAITED_FOR = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), bool(t), tolist()
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}


def _empty(size: list[int], *, device: torch.device, dtype: Any = None, **_: Any) -> DoubleTensor:
    return on_gpu(torch.empty(size, dtype=dtype), device.index)


def _empty_strided(
    size: list[int], stride: list[int], *, device: torch.device, dtype: Any = None, **_: Any
) -> DoubleTensor:
    return on_gpu(torch.empty_strided(size, stride, dtype=dtype), device.index)


# All of torch's functions that make tensors begin with these two, so ``device="cuda:1"`` works.
_factories = torch.library.Library("aten", "IMPL")
if torch.version.cuda is None:
    _factories.impl("empty.memory_format", _empty, "CUDA")
    _factories.impl("empty_strided", _empty_strided, "CUDA")


def _moved(t: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """``t.to(...)`` with a device in it."""
    place = torch.device(kwargs["device"])
    source = t
    if isinstance(t, DoubleTensor):
        the_double().synchronize(t._gpu)
        host_waits[t._gpu] += place.type == "cpu" and not kwargs.get("non_blocking")
        source = t._inner
    copied = source.to(kwargs.get("dtype") or source.dtype, copy=True)
    return copied if place.type == "cpu" else on_gpu(copied, place.index)


def on_gpu(values: torch.Tensor, gpu: int) -> DoubleTensor:
    """A copy of a CPU tensor, with its strides."""
    # Of the whole storage that the strides span, so that a view keeps its meaning.
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    count = span if values.numel() else 0
    block = Block(gpu, count * values.element_size())
    memory = the_double().bytes_at(block.address, count * values.element_size())
    inner = memory.view(values.dtype).as_strided(values.shape, values.stride())
    inner.copy_(values)
    return DoubleTensor(inner, gpu, block.address, block)


def module_on_gpu(module: Module, gpu: int) -> Module:
    """The same module, its parameters and buffers moved there; what is shared stays so."""
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if param not in moved:
                there = on_gpu(param.detach(), gpu)
                moved[param] = torch.nn.Parameter(there, param.requires_grad)
            part.register_parameter(name, moved[param])
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, on_gpu(buffer, gpu))
    return module


def from_gpu(t: torch.Tensor) -> torch.Tensor:
    """A copy of what the rank's stream finds in ``t``."""
    assert isinstance(t, DoubleTensor), f"{type(t).__name__} is not on a GPU"
    the_double().synchronize(t._gpu)
    return t._inner.clone()


def _bytes_of(memory: _core.DeviceMemory) -> torch.Tensor:
    inner = the_double().bytes_at(memory.address, len(memory))
    return DoubleTensor(inner, memory.device, memory.address, memory)


def _lies_like(t: torch.Tensor, other: torch.Tensor) -> bool:
    return t.stride() == other.stride() and not t.is_neg() and not t.is_conj()


@contextmanager
def doubles_in_place_of_gpus() -> Iterator[Double]:
    """pycomm asks torch for streams, and torch has no GPU: it asks the double instead."""
    double = the_double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYCOMM_CUDART_LIBRARY", str(BUILD / "libdouble_cudart.so"))
        patch.setenv("PYCOMM_NCCL_LIBRARY", str(BUILD / "libdouble_nccl.so"))
        patch.setattr(gpu_libraries, "places", lambda: double.places)
        patch.setattr(device, "current_stream", double.stream)
        patch.setattr(device, "bytes_of", _bytes_of)
        patch.setattr(device, "used_on_current_stream", lambda t: None)  # a GPU's is but one
        patch.setattr(gradient_sync, "lies_like", _lies_like)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        yield double
    errors = double.errors()  # asking forgets them
    assert errors == "", errors


def open_files() -> int:
    """How many files of the double this process has open: its memory, and one a communicator."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += "memfd:gpu double" in os.readlink(entry)
        except FileNotFoundError:  # that of the folder itself, for one
            continue
    return count


def run_double_gpu_ranks(
    world_size: int,
    fn: Callable[[_core.Group], T],
    *,
    starving: int = NOBODY,
    hosts: list[int] | None = None,
    transport: _core.GpuTransport = _core.GpuTransport.AUTO,
) -> list[T]:
    """``run_ranks`` where each rank has a GPU of the double, its number the rank's.

    Args:
        starving: priority of the streams that move only when nothing else can.
    """
    with doubles_in_place_of_gpus() as double:
        double.starve(starving)
        # The collector runs in any rank's thread, and freeing memory waits for its GPU: one rank
        # would wait for another's stream, which waits for what this one has yet to launch.
        gc.collect()
        gc.disable()
        try:
            return run_ranks(
                world_size, fn, hosts=hosts, gpu_places=double.places, gpu_transport=transport
            )
        finally:
            gc.enable()
            double.starve(NOBODY)
