"""No arrow points up: C++ folders and Python modules include and import only what lies below."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each folder may include itself and those before it.
CSRC_LAYERS = [
    "core",
    "kernels",
    "transport",
    "collectives",
    "nccl",
    "point_to_point",
    "group",
    "limits",
    "reducer",
    "bindings",
]

# Each line may import the lines before it, never its own neighbours.
PYTHON_LAYERS = [
    {"errors", "_core"},
    {"device", "compression", "gpu_libraries"},
    {
        "launch",
        "ulfm",
        "mpi_library",
        "mpi_cuda",
        "failure",
        "work",
        "arguments",
        "tensor_calls",
        "cost",
        "stacks",
    },
    {"memory", "rendezvous", "compressed_exchange"},
    {"connection"},
    {"runtime"},
    {"collectives", "point_to_point", "groups", "mesh"},
    {"shares"},
    {"objects", "clipping", "grad_scaler"},
    {"structures"},
    {"state", "end_of_backward", "finite_check", "gradient_layout", "optimizer_state"},
    {"gradient_sync", "replicas"},
    {"owned_parameters", "join"},
    {"optimizer", "sharded_optimizer"},
    {"pipeline", "tensor_parallel"},
    {"checkpoint"},
    {"elastic"},
    {"__init__"},
    {"torch_backend", "ultralytics"},
    {"bench"},
    {"cli"},
    {"__main__"},
]

# Within pycomm/collectives, likewise.
COLLECTIVES_LAYERS = [
    {"autograd"},
    {"packs"},
    {"all_reduce", "all_to_all", "barrier", "broadcast_reduce", "gather_scatter", "shards"},
    {"grouped_moves", "grouped_reductions", "lists"},
    {"__init__"},
]


# Within pycomm/torch_backend, likewise.
TORCH_BACKEND_LAYERS = [
    {"address", "backward", "compiler", "completions", "fallback", "membership", "tensors"}
    | {"monitored_barrier", "options"},
    {"messages", "moves", "reductions", "work"},
    {"process_group", "reducer"},
    {"__init__"},
]


# Within pycomm/elastic, likewise.
ELASTIC_LAYERS = [
    {"copies", "leaving", "membership", "preemption", "sampler", "values"},
    {"recruits", "state"},
    {"rescaling"},
    {"running"},
    {"__init__"},
]


def test_csrc_includes_point_down() -> None:
    checked = 0
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu"}:
            continue
        layer = CSRC_LAYERS.index(path.relative_to(ROOT / "csrc").parts[0])
        for included in re.findall(r'#include "([a-z_]+)/', path.read_text()):
            checked += 1
            assert CSRC_LAYERS.index(included) <= layer, f"{path} includes {included}/"
    assert checked > 100


def test_the_core_knows_neither_torch_nor_python() -> None:
    for folder in CSRC_LAYERS:
        for path in sorted((ROOT / "csrc" / folder).glob("*.[hc]*")):
            includes = re.findall(r"#include <([^>]+)>", path.read_text())
            assert not any(name.startswith(("torch", "ATen", "c10")) for name in includes), path
            if folder != "bindings":
                assert not any(name.startswith(("pybind11", "Python")) for name in includes), path
            if path.stem not in {"channel_mpi", "mpi_module"}:
                assert "mpi.h" not in includes, path
            if folder != "nccl":
                assert not any(name.startswith(("cuda", "nccl")) for name in includes), path


def test_waits_take_time_and_threads_from_where_a_simulation_can_replace_them() -> None:
    """What tests/simulation could not replay: see csrc/core/simulation.h."""
    machine = r"steady_clock|sched_yield|std::thread\b|std::condition_variable|sleep_for"
    outside = {"completions"}  # of threads above the core
    for folder in ("collectives", "point_to_point", "group"):
        for path in sorted((ROOT / "csrc" / folder).glob("*.[hc]*")):
            if path.stem not in outside:
                assert not re.search(machine, path.read_text()), path


def imported_modules(path: Path) -> set[str]:
    """Names of the pycomm modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("pycomm")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pycomm":
            if node.module == "pycomm":
                names |= {f"pycomm.{alias.name}" for alias in node.names}
            else:
                names.add(node.module or "")
    return {name.split(".")[1] if "." in name else "__init__" for name in names}


def test_python_imports_point_down() -> None:
    level = {name: i for i, names in enumerate(PYTHON_LAYERS) for name in names}
    for path in sorted((ROOT / "pycomm").rglob("*.py")):
        parts = path.relative_to(ROOT / "pycomm").with_suffix("").parts
        module = parts[0]
        assert module in level, f"{path}: give the module its place in PYTHON_LAYERS"
        for name in imported_modules(path) - {module}:
            if name == "_mpi":  # built where there is an MPI; loaded by mpi_library alone
                assert module == "mpi_library"
                continue
            assert name in level, f"{path} imports pycomm.{name}"
            assert level[name] < level[module], f"{path} imports pycomm.{name}, which lies above it"


@pytest.mark.parametrize(
    ("package", "layers"),
    [
        ("collectives", COLLECTIVES_LAYERS),
        ("torch_backend", TORCH_BACKEND_LAYERS),
        ("elastic", ELASTIC_LAYERS),
    ],
)
def test_packages_import_downward_within(package: str, layers: list[set[str]]) -> None:
    level = {name: i for i, names in enumerate(layers) for name in names}
    for path in sorted((ROOT / "pycomm" / package).glob("*.py")):
        assert path.stem in level, f"{path}: give the module its place in {package}'s layers"
        text = path.read_text()
        if package == "collectives":
            assert "from pycomm.collectives import" not in text, path
        names = re.findall(rf"^ *from pycomm\.{package}\.(\w+) import", text, re.M)
        for listed in re.findall(rf"^ *from pycomm\.{package} import (.*)", text, re.M):
            names += re.findall(r"\w+", listed)
        for name in names:
            assert level[name] < level[path.stem], f"{path} imports {name}, which lies above it"


def test_pycomm_launch_imports_neither_torch_nor_pycomm_when_it_is_imported() -> None:
    for path in sorted((ROOT / "pycomm_launch").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in {"torch", "pycomm"}, path
