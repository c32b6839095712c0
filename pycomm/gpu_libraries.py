"""Where the libraries of the GPU plane may lie. None is loaded before it is asked for."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from pycomm import _core
from pycomm.errors import InvalidArgumentError


def report() -> _core.GpuReport:
    """What of the GPU plane this process has: headers, CUDA runtime, driver, NCCL and kernels.

    Loads CUDA's runtime and NCCL, unless the process has already.
    """
    return _core.gpu_report(places())


def places() -> _core.GpuPlaces:
    """Where this installation has them."""
    return _core.GpuPlaces(
        _in_wheels("cu13/lib", "cuda_runtime/lib"),
        _in_wheels("nccl/lib"),
        # Beside the core, which an editable installation has elsewhere than these sources.
        str(Path(_core.__file__).with_name("libpycomm_cuda.so")),
    )


def transport(environ: Mapping[str, str]) -> _core.GpuTransport:
    """What the environment says should carry calls on GPUs.

    Raises:
        InvalidArgumentError: ``PYCOMM_GPU_TRANSPORT`` names nothing that could.
    """
    text = environ.get("PYCOMM_GPU_TRANSPORT", "auto")
    choices = {transport.name.lower(): transport for transport in _core.GpuTransport}
    if text not in choices:
        raise InvalidArgumentError(
            f"init: PYCOMM_GPU_TRANSPORT={text!r} carries nothing. "
            f"Choose one of {', '.join(choices)}."
        )
    return choices[text]


def _in_wheels(*folders: str) -> list[str]:
    """Those of ``folders`` that NVIDIA's wheels have made, where the dynamic loader never looks.

    The wheels share one namespace package, which may be spread over several site-packages.
    """
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec is not None else None) or []
    candidates = [Path(place) / folder for place in places for folder in folders]
    return [str(folder) for folder in candidates if folder.is_dir()]
