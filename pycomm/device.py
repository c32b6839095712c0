"""Where a tensor lies, as the core wants to know it: in the host's memory, or on a GPU."""

import torch
from torch import Tensor

from pycomm._core import DeviceMemory
from pycomm.errors import InvalidArgumentError

# Of a GPU: its index here, and the stream (an address) whose work comes before the call.
Place = tuple[int, int]


def supported(t: Tensor) -> bool:
    """Whether ``t`` is on a device whose memory the core can reach."""
    return t.is_cpu or t.is_cuda


def place_of(t: Tensor) -> Place | None:
    """Where a collective on ``t`` takes place; None is the host."""
    if t.is_cpu:
        return None
    index = t.get_device()
    return index, current_stream(index)


def current_stream(index: int) -> int:
    """The stream that this thread's work for a GPU goes to."""
    return torch.cuda.current_stream(index).cuda_stream


def used_on_current_stream(t: Tensor) -> None:
    """Keep the memory of a CUDA tensor, once freed, from others until the stream has come by."""
    t.record_stream(torch.cuda.current_stream(t.get_device()))


def bytes_of(memory: DeviceMemory) -> Tensor:
    """GPU memory of the core as a tensor of bytes, which keeps it alive."""
    return torch.as_tensor(memory, device=torch.device("cuda", memory.device))


def like_remote(device_type: str) -> torch.device:
    """The device of this rank for what lies on one of ``device_type`` on another rank.

    Raises:
        InvalidArgumentError: this rank has none.
    """
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidArgumentError(
                "the root's tensors are on a GPU, and torch finds none on this rank.\n"
                "  Give every rank a GPU and a PyTorch for CUDA, or pass CPU tensors on the root."
            )
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_type)


def empty_like_remote(device_type: str, dtype: torch.dtype) -> Tensor:
    """A tensor of no elements there."""
    return torch.empty(0, dtype=dtype, device=like_remote(device_type))
