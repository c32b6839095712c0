"""Environment variables: all are in docs/environment.md, and nonsense is an error that names it."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from launchers import alone

from pycomm import mpi_cuda
from pycomm.connection import MOST_TIMEOUT_S, host_key, read_card, read_settings
from pycomm.cost import CostModel, load
from pycomm.errors import CommError, InvalidArgumentError
from pycomm.launch import Launch, detect

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/environment.md").read_text()
NOT_PYCOMMS = {  # which pycomm's code reads all the same
    *("HOME", "XDG_CACHE_HOME", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    *("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_RESTART_COUNT", "GLOO_SOCKET_IFNAME", "OMPI_COMM_WORLD_RANK"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "PALS_RANKID"),
    *("SLURM_STEP_ID", "SLURM_PROCID", "PMIX_RANK", "PMIX_NAMESPACE"),
}


def names_in_code() -> set[str]:
    """Every name that a string of the sources could be, of a variable of pycomm's."""
    names: set[str] = set()
    for folder in ("csrc", "pycomm", "pycomm_launch"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h"}:
                names |= set(re.findall(r"PYCOMM_[A-Z0-9_]*[A-Z0-9]", path.read_text()))
    defined = ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()
    build = {
        name for path in defined for name in re.findall(r"PYCOMM_[A-Z_0-9]+", path.read_text())
    }
    macros = {"PYCOMM_INLINE", "PYCOMM_HD"}
    return {name for name in names - build - macros if name not in macros_of_code()}


def macros_of_code() -> set[str]:
    return {
        name
        for path in (ROOT / "csrc").rglob("*.*")
        for name in re.findall(
            r"#\s*(?:define|ifdef|ifndef|undef)\s+(PYCOMM_\w+)", path.read_text()
        )
    }


def test_every_variable_is_on_its_page():
    missing = [name for name in sorted(names_in_code()) if f"`{name}`" not in PAGE]
    assert not missing
    assert not [name for name in sorted(NOT_PYCOMMS) if f"`{name}`" not in PAGE]


def test_the_page_names_no_variable_that_nobody_reads():
    assert set(re.findall(r"`(PYCOMM_[A-Z_]+)`", PAGE)) <= names_in_code()


NONSENSE = {
    "PYCOMM_TIMEOUT_S": [
        "",
        "soon",
        "0",
        "-1",
        "nan",
        "inf",
        "1e300",
        "10000000000",
        "1e-400",
    ],
    "PYCOMM_ARENA_BYTES": ["", "0", "-4096", "1e9", "8 GiB", "9" * 30, "²", "0x1000"],
    "PYCOMM_ALGORITHM": ["", "fastest", "exact_order", "RING", "direct "],
    "PYCOMM_GPU_TRANSPORT": ["", "tcp", "NCCL"],
    "PYCOMM_HOST": ["\udcff\udcfe", "two\nlines", "\x1b[2J"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values]
)
def test_nonsense_is_named(name, value):
    environ = {name: value, "XDG_CACHE_HOME": "/nonexistent"}
    with pytest.raises(InvalidArgumentError, match=name):
        host_key(environ) if name == "PYCOMM_HOST" else read_settings(None, environ)


@pytest.mark.parametrize("seconds", [1e-3, 600, MOST_TIMEOUT_S])
def test_times_at_the_limits_are_taken(seconds):
    settings = read_settings(None, {"PYCOMM_TIMEOUT_S": repr(seconds), "XDG_CACHE_HOME": "/none"})
    assert settings.timeout_s == seconds


GOOD = {"alpha_s": 1e-5, "beta_s_per_byte": 1e-10, "gamma_s_per_byte": 1e-10, "meeting_s": 1e-6}
BAD_FILES = {
    "binary": b"\xff\xfe\x00\x01",
    "empty": b"",
    "no object": b"[1, 2]",
    "deep": b"[" * 100_000,
    "other names": b'{"alpha": 1}',
    "text": json.dumps({**GOOD, "alpha_s": "fast"}).encode(),
    "negative": json.dumps({**GOOD, "alpha_s": -1}).encode(),
    "not a number": json.dumps({**GOOD, "alpha_s": float("nan")}).encode(),
    "endless": json.dumps(GOOD).replace("1e-05", "9" * 400).encode(),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_cost_file_of_nonsense_is_named(content, tmp_path):
    file = tmp_path / "cost.json"
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=re.escape(str(file))):
        load({"PYCOMM_COST_FILE": str(file)})


def test_a_user_without_a_home_has_the_default_costs(monkeypatch):
    """As in a container that runs under a number: Path.home() raised RuntimeError in init()."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    with pytest.raises(RuntimeError):
        Path.home()
    assert load({}) == CostModel()


@pytest.mark.parametrize("value", ["", "yes", "2", "01"])
def test_whether_mpi_takes_gpu_memory_is_0_or_1(value):
    with pytest.raises(InvalidArgumentError, match="PYCOMM_MPI_CUDA"):
        mpi_cuda.detect({"PYCOMM_MPI_CUDA": value}, "")


def test_what_the_core_and_torch_read():
    """In one process of its own, since libraries and kernels are chosen once."""
    done = alone(
        """
        import os, warnings
        import pycomm
        from pycomm import _core, gpu_libraries

        for value in ("fast", "AVX2"):
            os.environ["PYCOMM_SIMD"] = value
            try:
                pycomm.init()
            except pycomm.InvalidArgumentError as error:
                assert f"PYCOMM_SIMD={value}" in str(error), error
            else:
                raise SystemExit(f"PYCOMM_SIMD={value} was taken")
        for name in ("PYCOMM_CUDART_LIBRARY", "PYCOMM_NCCL_LIBRARY"):
            os.environ[name] = "/nonexistent/library.so"
        found = _core.gpu_report(gpu_libraries.places())
        assert "PYCOMM_CUDART_LIBRARY=/nonexistent/library.so" in found.runtime, found.runtime
        assert "PYCOMM_NCCL_LIBRARY=/nonexistent/library.so" in found.nccl, found.nccl
        for name in ("PYCOMM_CUDART_LIBRARY", "PYCOMM_NCCL_LIBRARY"):
            os.environ[name] = ""  # as if it were not set: "" is what dlopen calls this program
        found = _core.gpu_report(gpu_libraries.places())
        assert "named by the environment" not in found.runtime + found.nccl, found.nccl

        from pycomm_launch import autoload
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not autoload._wants_redirection({"PYCOMM_TORCH_BACKEND": "yes"})
        assert "PYCOMM_TORCH_BACKEND='yes'" in str(caught[0].message)
        print("all named")
        """
    )
    assert (done.returncode, done.out.strip()) == (0, "all named"), done.err


# --------------------------------------------------------------------------------------- launchers

LAUNCHER_VARIABLES = [
    *("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE"),
    *("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PALS_RANKID"),
    *("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_PROCID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "PMIX_RANK", "PMIX_NAMESPACE"),
]
VALUES = st.one_of(
    st.integers(-2, 9).map(str),
    st.sampled_from(
        [
            *("", " ", " 3 ", "+1", "-0", "1.0", "1e3", "0x2", "٣", "²", "1_0", "65536"),
            *("2147483647", "2147483648", "4294967291", "99999999999", "9" * 5000),
            *("\udcff", "host1", "a\nb"),
        ]
    ),
    st.text(max_size=8),
)


@given(environ=st.dictionaries(st.sampled_from(LAUNCHER_VARIABLES), VALUES, max_size=10))
@example(environ={"SLURM_STEP_ID": "9" * 5000})  # int() refuses so many digits: was a ValueError
@example(environ={"RANK": "9" * 5000, "WORLD_SIZE": "2"})
@example(environ={"RANK": "0", "WORLD_SIZE": str(10**30)})  # was a rank that no int of MPI holds
def test_any_environment_is_a_launch_or_an_error_with_a_remedy(environ):
    before = dict(environ)
    try:
        launch = detect(environ)
    except InvalidArgumentError as mistake:
        text = str(mistake)
        assert text.startswith("init: ")
        assert "\n  " in text, "what to do stands in a line of its own"
        assert any(name in text for name in LAUNCHER_VARIABLES)
        assert len(text) < 1000
    else:
        assert isinstance(launch, Launch)
        assert 0 <= launch.rank < (launch.world_size or 2**31) <= 2**31
        assert launch.local_rank is None or launch.local_rank >= 0
        assert launch.local_size is None or launch.local_size >= 1
        assert launch.announcement(environ) is not None
    assert environ == before


# -------------------------------------------------------------------------------------------- cards

FIELDS = {"size": int, "job": (str, type(None))}


@given(data=st.binary(max_size=60))
@example(data=b"")
@example(data=b"[" * 100_000)
@example(data=b'{"size": "2", "job": null}')
@example(data=b'{"size": 2}')
@example(data=b'{"size": 2, "job": null, "more": 1}')
@example(data=b"\xff")
def test_what_a_rank_says_is_a_card_or_an_error_that_names_it(data):
    with pytest.raises(CommError, match="init on rank 0: rank 3 sent"):
        read_card(data, FIELDS, "init on rank 0", 3)


def test_a_card_is_read():
    assert read_card(b'{"size": 2, "job": null}', FIELDS, "init", 1) == {"size": 2, "job": None}
