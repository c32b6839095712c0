"""How the GPU plane's libraries are found and refused. No GPU is needed, and none is used.

Each look is a process of its own: what is loaded once stays loaded. Stand-ins are compiled here.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pycomm import _core, gpu_libraries
from pycomm.cli import info
from pycomm.errors import InvalidArgumentError
from pycomm.gpu_libraries import transport

ROOT = Path(__file__).parent.parent

LOOK = """
import ctypes, json, sys
from pycomm import _core
first, *places = json.loads(sys.argv[1])
if first:
    ctypes.CDLL(first)  # as PyTorch would
report = _core.gpu_report(_core.GpuPlaces(*places))
fields = ("headers", "runtime", "driver", "nccl", "has_nccl", "kernels")
print(json.dumps({name: getattr(report, name) for name in fields}))
"""

BUILT = not _core.gpu_report(_core.GpuPlaces()).headers.startswith("not in this build")
built = pytest.mark.skipif(not BUILT, reason="built without the headers of CUDA and NCCL")


def look(
    cuda: list[Path] | None = None,
    nccl: list[Path] | None = None,
    kernels: str = "/nowhere/libpycomm_cuda.so",
    *,
    loaded_before: Path | None = None,
    **environment: str | Path,
) -> dict[str, str]:
    """What a fresh process finds."""
    places = [list(map(str, cuda or [])), list(map(str, nccl or [])), kernels]
    first = str(loaded_before) if loaded_before is not None else None
    result = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps([first, *places])],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


def functions_of(header: str, macro: str) -> list[str]:
    """The names that a table lists."""
    text = (ROOT / "csrc/nccl" / header).read_text()
    listed = re.search(rf"#define {macro}\(X\)((?:.*\\\n)*.*\n)", text)
    assert listed is not None
    return re.findall(r"X\((\w+)\)", listed[1])


def library(folder: Path, soname: str, bodies: dict[str, str]) -> Path:
    """A shared library of functions with these bodies."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "library.c"
    source.write_text("\n".join(f"int {name}(int *n) {{ {bodies[name]} }}" for name in bodies))
    file = folder / soname
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(file), str(source)]
    subprocess.run(command, check=True)
    return file


def stand_in_cudart(folder: Path, runtime: int, driver: int, count: str) -> Path:
    """A libcudart of this version; `count` is the body of cudaGetDeviceCount."""
    names = functions_of("cuda_table.h", "PYCOMM_CUDA_FUNCTIONS")
    names += functions_of("cuda_table.h", "PYCOMM_CUDA_OVERLOADED_FUNCTIONS")
    names += functions_of("cuda_table.h", "PYCOMM_CUDA_LIBRARY_FUNCTIONS") * (runtime >= 12080)
    versions = {"cudaRuntimeGetVersion": runtime, "cudaDriverGetVersion": driver}
    bodies = dict.fromkeys(names, "return 0;")
    bodies |= {name: f"*n = {value}; return 0;" for name, value in versions.items()}
    return library(folder, "libcudart.so.13", bodies | {"cudaGetDeviceCount": count})


def stand_in_nccl(folder: Path, version: int, without: str = "") -> Path:
    names = functions_of("nccl_table.h", "PYCOMM_NCCL_FUNCTIONS")
    bodies = {name: "return 0;" for name in names if name != without}
    bodies["ncclGetVersion"] = f"*n = {version}; return 0;"
    return library(folder, "libnccl.so.2", bodies)


def test_a_build_without_the_headers_says_what_to_install() -> None:
    if BUILT:
        pytest.skip("this one was built with them")
    report = _core.gpu_report(_core.GpuPlaces())
    assert "Install a PyTorch for CUDA" in report.headers
    assert report.nccl == report.runtime == "not looked for: see GPU headers"


def test_an_unknown_transport_is_refused() -> None:
    assert transport({}) is _core.GpuTransport.AUTO
    assert transport({"PYCOMM_GPU_TRANSPORT": "staged"}) is _core.GpuTransport.STAGED
    with pytest.raises(
        InvalidArgumentError, match=r"'ucx' carries nothing.*auto, nccl, staged, mpi"
    ):
        transport({"PYCOMM_GPU_TRANSPORT": "ucx"})


@pytest.mark.parametrize(
    ("asked", "has_nccl", "told"),
    [
        ("auto", True, "NCCL, if every rank has the same"),
        ("auto", False, "between hosts MPI, from GPU memory where MPI takes that, else the hosts'"),
        ("nccl", True, "NCCL, if every rank has the same"),
        ("nccl", False, "none: PYCOMM_GPU_TRANSPORT=nccl"),
        ("staged", True, "the hosts' memory and collectives, as PYCOMM_GPU_TRANSPORT says"),
        ("mpi", True, "between hosts MPI, from GPU memory, as PYCOMM_GPU_TRANSPORT says"),
        ("ucx", True, "PYCOMM_GPU_TRANSPORT='ucx' carries nothing"),
    ],
)
def test_info_says_what_would_carry_calls(
    monkeypatch: pytest.MonkeyPatch, asked: str, has_nccl: bool, told: str
) -> None:
    monkeypatch.setenv("PYCOMM_GPU_TRANSPORT", asked)
    report = SimpleNamespace(has_nccl=has_nccl)
    assert info._gpu_transport(cast(_core.GpuReport, report)).startswith(told)


@built
def test_what_is_nowhere_is_named_with_every_place_and_a_remedy(tmp_path: Path) -> None:
    found = look([tmp_path], [tmp_path / "a", tmp_path / "b"], PYCOMM_CUDART_LIBRARY="/nowhere")
    if "(found by the dynamic loader)" in found["nccl"]:
        pytest.skip("the loader of this machine knows an NCCL")
    assert found["nccl"] == (
        "NCCL: none was found. PYCOMM_NCCL_LIBRARY is not set; this process has not loaded "
        f"libnccl.so.2; searched {tmp_path}/a, {tmp_path}/b and the dynamic loader's own places."
        "\n  Install a PyTorch for CUDA, which brings it, or nvidia-nccl-cu13, or name the file in "
        "PYCOMM_NCCL_LIBRARY."
    )
    assert not found["has_nccl"]
    assert found["runtime"].startswith("CUDA runtime: PYCOMM_CUDART_LIBRARY=/nowhere cannot be")
    assert found["driver"] == "unknown without a CUDA runtime"
    assert "/nowhere/libpycomm_cuda.so" in found["kernels"]
    assert "built without nvcc" in found["kernels"]


@built
def test_the_first_place_that_has_it_decides(tmp_path: Path) -> None:
    wheel = stand_in_nccl(tmp_path / "wheel", 22803)
    loaded = stand_in_nccl(tmp_path / "loaded", 22907)
    named = stand_in_nccl(tmp_path / "named", 23000)
    folders = [wheel.parent]
    from_wheel = look(nccl=folders)["nccl"]
    assert from_wheel.startswith(f"2.28.3, {wheel} (from a wheel)")
    assert look(nccl=folders)["has_nccl"]
    already = look(nccl=folders, loaded_before=loaded)["nccl"]
    assert already.startswith(f"2.29.7, {loaded} (already loaded)")
    override = look(nccl=folders, loaded_before=loaded, PYCOMM_NCCL_LIBRARY=named)["nccl"]
    assert override.startswith(f"2.30.0, {named} (named by the environment)")
    by_loader = look(LD_LIBRARY_PATH=wheel.parent)["nccl"]
    assert by_loader.startswith(f"2.28.3, {wheel} (found by the dynamic loader)")


@built
def test_an_override_that_cannot_be_loaded_is_an_error_whatever_else_there_is(
    tmp_path: Path,
) -> None:
    wheel = stand_in_nccl(tmp_path / "wheel", 22803)
    text = look(nccl=[wheel.parent], PYCOMM_NCCL_LIBRARY="/nowhere/libnccl.so.2")["nccl"]
    assert "PYCOMM_NCCL_LIBRARY=/nowhere/libnccl.so.2 cannot be loaded" in text
    assert text.endswith("or unset PYCOMM_NCCL_LIBRARY.")


@built
def test_a_wheel_that_the_loader_refuses_is_passed_over_and_told(tmp_path: Path) -> None:
    (tmp_path / "libnccl.so.2").write_text("half a download")
    text = look(nccl=[tmp_path])["nccl"]
    assert f"the dynamic loader refuses the wheel's: {tmp_path}/libnccl.so.2" in text


@built
@pytest.mark.parametrize(
    ("version", "without", "problem"),
    [
        (21703, "", "is version 2.17.3, and pycomm needs 2.18.0."),
        (2804, "", "is version 2.8.4, and pycomm needs 2.18.0."),
        (22803, "ncclReduceScatter", "version 2.28.3, has no ncclReduceScatter."),
    ],
)
def test_an_old_or_crippled_nccl_is_refused(
    tmp_path: Path, version: int, without: str, problem: str
) -> None:
    file = stand_in_nccl(tmp_path, version, without)
    text = look(nccl=[tmp_path])["nccl"]
    assert text.startswith(f"NCCL: {file}") and problem in text
    assert "Install 2.18.0 or newer" in text


@built
def test_what_is_no_nccl_is_refused(tmp_path: Path) -> None:
    file = library(tmp_path, "libnccl.so.2", {"hello": "return 0;"})
    assert f"{file} does not tell its version" in look(nccl=[tmp_path])["nccl"]


NO_DEVICE, INSUFFICIENT_DRIVER = "return 100;", "return 35;"


@built
@pytest.mark.parametrize(
    ("runtime", "driver", "count", "expected"),
    [
        (13000, 0, NO_DEVICE, "no NVIDIA driver is loaded"),
        (13000, 12040, INSUFFICIENT_DRIVER, "install a PyTorch for CUDA 12."),
        (13000, 13000, NO_DEVICE, "shows this process no GPU"),
        (13000, 13000, "*n = 0; return 0;", "shows this process no GPU"),
        (12080, 13000, "*n = 1; return 0;", "for CUDA 13.0, 1 GPU"),
        (12080, 13000, "*n = 8; return 0;", "for CUDA 13.0, 8 GPUs"),
    ],
)
def test_the_driver_is_asked_for_its_gpus(
    tmp_path: Path, runtime: int, driver: int, count: str, expected: str
) -> None:
    stand_in_cudart(tmp_path, runtime, driver, count)
    assert expected in look([tmp_path])["driver"]


@built
def test_a_runtime_without_kernel_loading_is_told(tmp_path: Path) -> None:
    image = Path(_core.__file__).with_name("libpycomm_cuda.so")
    if not image.exists():
        pytest.skip("built without the CUDA kernels")
    old = stand_in_cudart(tmp_path / "old", 12060, 13000, "*n = 1; return 0;")
    new = stand_in_cudart(tmp_path / "new", 12080, 13000, "*n = 1; return 0;")
    text = look([old.parent], kernels=str(image))["kernels"]
    assert text.startswith("built by nvcc")
    assert text.endswith("this CUDA runtime cannot load them, 12.8 can")
    assert "cannot" not in look([new.parent], kernels=str(image))["kernels"]


@built
def test_this_installation_finds_its_own_kernels() -> None:
    """An editable one, too, whose modules lie elsewhere than their sources."""
    if not Path(_core.__file__).with_name("libpycomm_cuda.so").exists():
        pytest.skip("built without the CUDA kernels")
    assert gpu_libraries.report().kernels.startswith("built by nvcc")


@built
def test_a_runtime_before_cuda_12_is_refused(tmp_path: Path) -> None:
    stand_in_cudart(tmp_path, 11080, 13000, "return 0;")
    assert "is version 11.8, and pycomm needs 12.0 or newer" in look([tmp_path])["runtime"]


@built
def test_kernels_of_another_build_are_refused(tmp_path: Path) -> None:
    body = "static struct { unsigned abi; } image = {99}; return &image;"
    source = tmp_path / "old.c"
    source.write_text(f"void *pycomm_cuda_image(void) {{ {body} }}")
    file = tmp_path / "libpycomm_cuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(file), str(source)], check=True)
    text = look(kernels=str(file))["kernels"]
    assert f"the CUDA kernels in {file} are of another build of pycomm (number 99" in text


def real_nccl() -> Path:
    """The file in NVIDIA's wheel."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec is not None else None) or []
    files = [Path(place) / "nccl/lib/libnccl.so.2" for place in places]
    found = [file for file in files if file.exists()]
    if not found:
        pytest.skip("needs nvidia-nccl-cu13")
    return found[0]


@built
def test_the_real_nccl_loads_without_a_gpu_and_has_all_that_the_tables_name() -> None:
    text = look(nccl=[real_nccl().parent])["nccl"]
    assert re.match(r"2\.\d+\.\d+, .*libnccl\.so\.2 \(from a wheel\); has ncclCommRegister", text)
    assert "ncclCommWindowRegister, ncclCommShrink" in text


# --- the real NCCL, without a driver --------------------------------------------------------------

REAL = """
import ctypes, os, sys
import torch
import double_gpu, pycomm
from pycomm import device
from run_ranks import RankError, run_ranks

nccl = sys.argv[1]
unique_id = (ctypes.c_byte * 128)()
print("ncclGetUniqueId:", ctypes.CDLL(nccl).ncclGetUniqueId(unique_id), any(unique_id))

# CUDA's runtime is the double, since ours must believe in a GPU before it asks NCCL.
os.environ["PYCOMM_NCCL_LIBRARY"] = nccl
os.environ["PYCOMM_CUDART_LIBRARY"] = str(double_gpu.BUILD / "libdouble_cudart.so")
double = double_gpu.the_double()
device.current_stream = double.stream

def body(group):
    pycomm.all_reduce(double_gpu.on_gpu(torch.ones(4), group.rank), group=group)

try:
    run_ranks(2, body, gpu_places=double.places)
except RankError as error:
    print(error)
"""

NO_DRIVER = """
import torch, pycomm
from pycomm import _core, runtime
pycomm.init()
t = torch.ones(4)
address = t.data_ptr()
try:
    runtime.world_group("test").all_reduce(
        address, address, 4, _core.DType.FLOAT32, _core.ReduceOp.SUM, place=(0, 0)
    )
except pycomm.CommError as error:
    print(error)
print("CPU:", pycomm.all_reduce(t).tolist())
"""

without_driver = pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists(), reason="this machine has a driver"
)


def printed_by(program: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=70,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@built
@without_driver
def test_double_of_cuda_and_the_real_nccl_end_in_an_error_that_names_the_call() -> None:
    printed = printed_by(REAL, str(real_nccl()))
    assert "ncclGetUniqueId: 0 True" in printed
    # The rank that hears of it first may be the other one.
    call = r"(CommError|PeerLostError): all_reduce of 4 float32, .* \(call #\d+ .*\) on rank [01]"
    assert re.search(call + ": NCCL: ncclCommInitRankConfig failed: unhandled cuda error", printed)
    assert "NCCL_DEBUG=WARN makes NCCL say more" in printed


@built
@without_driver
def test_a_cuda_tensor_without_a_driver_is_an_error_and_cpu_tensors_go_on() -> None:
    printed = printed_by(NO_DRIVER)
    assert "no NVIDIA driver is loaded, so no GPU can be used" in printed
    assert "CPU: [1.0, 1.0, 1.0, 1.0]" in printed
