"""The machine code of the CUDA kernels is read: no GPU is needed, and none runs anything here.

What is read is what is shipped, the image in libpycomm_cuda.so beside the core. Each kernel, for
each architecture, moves 16 bytes at a time, keeps everything in registers, few enough of them for
its blocks to fill a multiprocessor, and computes by the operations that the host's fold is made of.
"""

import ctypes
import functools
import importlib.metadata
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pycomm import _core

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
PAIRS = [(dtype, dtype) for dtype in BITS] + [
    pair for dtype in ("float16", "bfloat16") for pair in ((dtype, "float32"), ("float32", dtype))
]
KERNELS = [f"pycomm_{verb}_{old}_to_{new}" for verb in ("copy", "fold") for old, new in PAIRS]

# Of 65536 in a multiprocessor. 256 threads of 40 fit six times, of 64 four times: enough loads in
# flight to keep the memory busy.
REGISTER_BUDGET = {"copy": 40, "fold": 64}


@dataclass
class Kernel:
    """One kernel as it is for one architecture."""

    name: str
    instructions: list[str]  # "LDG.E.128 R4, desc[UR4][R2.64]", predicate removed
    usage: dict[str, int]  # "REG", "STACK", "LOCAL", ...

    @property
    def verb(self) -> str:
        return self.name.split("_")[1]

    @property
    def dtypes(self) -> tuple[str, str]:
        _, _, old, _, new = self.name.split("_")
        return old, new

    def count(self, pattern: str) -> int:
        return len(self.matching(pattern))

    def matching(self, pattern: str) -> list[str]:
        """The instructions whose operation (the first word) is as ``pattern`` says."""
        return [i for i in self.instructions if re.fullmatch(pattern, i.split()[0])]


@functools.cache
def image_library() -> Path:
    beside_the_core = Path(_core.__file__).parent
    status = beside_the_core / "cuda_kernels.txt"
    assert status.exists(), f"{status} is missing: CMake always writes it (cmake/PycommCuda.cmake)"
    text = status.read_text().strip()
    if text.startswith("not built: "):
        pytest.skip(f"the CUDA kernels were {text}")
    assert text.startswith("built by nvcc "), text
    return beside_the_core / "libpycomm_cuda.so"


def tool(name: str) -> Path:
    """A program of the wheel ``nvidia-cuda-<name>``, of which constraints.txt has the version."""
    files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    return next(Path(file.locate()) for file in files if file.name == name)


@functools.cache
def dump(*options: str) -> str:
    """What cuobjdump prints; it calls nvdisasm for the rest."""
    path = os.pathsep.join([str(tool("nvdisasm").parent), os.environ["PATH"]])
    return subprocess.run(
        [tool("cuobjdump"), *options, image_library()],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@functools.cache
def kernels(architecture: str) -> dict[str, Kernel]:
    usages = {
        name: {what: int(number) for what, number in re.findall(r"(\w+):(\d+)", usage)}
        for name, usage in re.findall(
            r"Function (\w+):\s+(.*)", dump("-res-usage", "-arch", architecture)
        )
    }
    found = {}
    for text in dump("-sass", "-arch", architecture).split("Function : ")[1:]:
        name = text.split()[0]
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*?)\s*;", text)
        found[name] = Kernel(name, instructions, usages[name])
    return found


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    image_library()  # or skip
    return str(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, architecture: str) -> Kernel:
    return kernels(architecture)[request.param]


class Image(ctypes.Structure):
    """``Image`` in csrc/kernels/cuda/kernels.h."""

    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("code", ctypes.c_void_p),
        ("code_bytes", ctypes.c_size_t),
        ("built_by", ctypes.c_char_p),
    )


def test_the_library_opens_without_cuda_and_hands_its_image_out() -> None:
    library = ctypes.CDLL(str(image_library()))
    library.pycomm_cuda_image.restype = ctypes.POINTER(Image)
    image = library.pycomm_cuda_image().contents
    header = (ROOT / "csrc/kernels/cuda/kernels.h").read_text()
    assert [str(image.abi)] == re.findall(r"kImageAbi = (\d+);", header)
    assert all(name in image.built_by.decode() for name in (*ARCHITECTURES, "compute_100"))
    code = ctypes.string_at(image.code, image.code_bytes)
    assert code[:4] == b"\x50\xed\x55\xba"  # a fatbin
    # Its header's last field is how much follows it: nothing is cut off, nothing comes after.
    assert len(code) == 16 + int.from_bytes(code[8:16], "little")


def test_each_architecture_has_every_kernel_and_nothing_else(architecture: str) -> None:
    assert sorted(kernels(architecture)) == sorted(KERNELS)


def test_newer_processors_have_ptx_of_every_kernel() -> None:
    image_library()
    ptx = dump("-ptx")
    assert re.findall(r"\.target (\w+)", ptx) == ["sm_100"]
    assert sorted(re.findall(r"\.entry (\w+)", ptx)) == sorted(KERNELS)


def test_memory_is_moved_16_bytes_at_a_time(kernel: Kernel) -> None:
    old, new = (BITS[dtype] for dtype in kernel.dtypes)
    # Vectors of one group, which is as many elements as fill one of the narrower side.
    loads_of_group, stores_of_group = old // min(old, new), new // min(old, new)
    if kernel.verb == "copy":
        variants = 2 if old == new else 1  # scaled; verbatim
        groups = 4 if old == new == 32 else 2  # copy_groups() in arguments.h
        loads, stores = groups, groups
    else:
        variants = 4  # a loop for each op,
        loads, stores = 1 + 4, 1  # of the first source and of four at a time
    assert kernel.count(r"LDG\.E\.128\b.*") >= variants * loads * loads_of_group
    assert kernel.count(r"STG\.E\.128\b.*") >= variants * stores * stores_of_group
    # The elements at the ends go one by one. Nothing else is narrow, except that a copy also reads
    # device_scale and writes found_nonfinite, and that a compiler may write a loop twice.
    assert kernel.count(r"LDG\.(?!E\.128\b).*") <= 3 * variants
    assert kernel.count(r"STG\.(?!E\.128\b).*") <= 2 * variants


def test_only_global_memory_is_touched(kernel: Kernel) -> None:
    """No spill (local memory), and no address whose memory the processor has to find out."""
    assert kernel.matching(r"(LDL|STL|LD|ST|LDS|STS)(\..*)?") == []
    assert kernel.usage["STACK"] == kernel.usage["LOCAL"] == kernel.usage["SHARED"] == 0


def test_registers_are_within_budget(kernel: Kernel) -> None:
    assert 0 < kernel.usage["REG"] <= REGISTER_BUDGET[kernel.verb]


def test_no_thread_waits_for_another(kernel: Kernel) -> None:
    """Otherwise the tests that run threads one after the other on a CPU would prove nothing."""
    assert kernel.matching(r"(BAR|SHFL|VOTE|MATCH|REDUX|ATOM\w*|RED|MEMBAR|ERRBAR)(\..*)?") == []


def test_min_and_max_are_comparisons(kernel: Kernel) -> None:
    """The instructions for both prefer a number to a NaN, and 0 to -0."""
    assert kernel.matching(r"[FDH]\w*MNMX.*") == []


def test_arithmetic_is_rounded_once_an_operation_and_keeps_subnormals() -> None:
    """Said by the PTX: machine code for a division has fused steps of its own."""
    image_library()
    operations = set(
        re.findall(r"^\s*(?:@%p\d+ )?((?:\w+\.)+f(?:16|32|64)\w*)", dump("-ptx"), re.MULTILINE)
    )
    arithmetic = {o for o in operations if o.split(".")[0] in {"add", "sub", "mul", "div"}}
    for dtype in ("f32", "f64"):
        assert {f"{name}.rn.{dtype}" for name in ("add", "mul", "div")} <= arithmetic
    assert all(".rn." in operation for operation in arithmetic), arithmetic
    assert not [o for o in operations if o.startswith(("fma", "mad", "min", "max"))]
    assert not [o for o in operations if ".ftz" in o or ".approx" in o or ".sat" in o]
