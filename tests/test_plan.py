"""The plan command, the stored constants and PYCOMM_ALGORITHM."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import run_ranks

from pycomm import InvalidArgumentError, ReduceOp, _core, cli, connection, cost


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return {row["algorithm"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.fixture(autouse=True)
def nothing_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYCOMM_COST_FILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_one_algorithm_runs(capsys: pytest.CaptureFixture[str]) -> None:
    small = plan(capsys, "--hosts", "4", "--ranks-per-host", "8", "--bytes", "1024")
    large = plan(capsys, "--hosts", "4", "--ranks-per-host", "8", "--bytes", "26214400")
    assert [name for name, row in small.items() if row["runs"]] == ["gather_fold"]
    assert [name for name, row in large.items() if row["runs"]] == ["direct"]
    # Each lane of four hosts sends 2 * 3/4 of its eighth, and the first one the opening.
    assert large["direct"]["bytes"] == pytest.approx(1.5 * 26214400 / 8, abs=2000)
    # Two rounds collect four hosts' sums.
    assert small["gather_fold"]["messages"] == 2


def test_a_world_of_100_000_ranks_is_planned_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan(capsys, "--hosts", "100000", "--bytes", "26214400")
    # Host 0 owns one of the longer chunks, which it sends to all others.
    assert rows["direct"]["bytes"] == pytest.approx(2 * 26214400, rel=0.2)
    rows = plan(capsys, "--hosts", "1", "--ranks-per-host", "100000", "--bytes", "4")
    assert rows["shared memory"]["messages"] == 0


def test_the_table_names_every_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--hosts", "4", "--bytes", "26214400", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("direct", "ring", "gather_fold", "runs", "26,214,400"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "0", "--bytes", "4"], "--hosts is 0"),
        (["--hosts", "2", "--bytes", "6"], "--bytes is 6, no whole number of float32"),
        (["--hosts", "2", "--bytes", "-4"], "--bytes is -4"),
        (["--hosts", "2", "--bytes", "4", "--ranks-per-host", "0"], "--ranks-per-host is 0"),
        (["--hosts", "100001", "--bytes", "4"], "is 100001 ranks. Pass at most 100000"),
        (["--hosts", "4", "--bytes", "1152921504606846976"], "Pass at most 17592186044416"),
    ],
)
def test_bad_arguments_get_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_constants_come_back_as_they_were_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost.load({"XDG_CACHE_HOME": "/nowhere"}) == cost.CostModel()
    model = cost.CostModel(alpha_s=1e-3, beta_s_per_byte=2e-9)
    path = model.save()
    assert cost.load({"PYCOMM_COST_FILE": str(path)}) == model
    assert [file.name for file in path.parent.iterdir()] == ["cost.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list"),
        ('{"alpha_s": 1}', "holds ['alpha_s'] instead of"),
        (json.dumps({**dataclasses.asdict(cost.CostModel()), "alpha_s": -1}), "alpha_s is -1"),
        (json.dumps({**dataclasses.asdict(cost.CostModel()), "alpha_s": "x"}), "alpha_s is 'x'"),
    ],
)
def test_a_broken_file_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError) as raised:
        cost.load({"PYCOMM_COST_FILE": str(path)})
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    with pytest.raises(InvalidArgumentError, match="does not exist"):
        cost.load({"PYCOMM_COST_FILE": str(tmp_path / "none")})


def test_an_unknown_algorithm_is_refused() -> None:
    assert connection._algorithm({"PYCOMM_ALGORITHM": "ring"}) is _core.Algorithm.RING
    assert connection._algorithm({}) is _core.Algorithm.AUTO
    with pytest.raises(InvalidArgumentError, match="auto, direct, ring, gather_fold"):
        connection._algorithm({"PYCOMM_ALGORITHM": "tree"})


@pytest.mark.parametrize("hosts", [[0, 1], [0, 0, 1, 1, 2], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_never_changes_the_bits(hosts: list[int], dtype: torch.dtype) -> None:
    """Direct, gather-and-fold, and their mixture by size: large tensors go in many pieces."""

    def reduced(group: _core.Group) -> list[torch.Tensor]:
        results = []
        for count in (1, 3, 1000, 20_001):
            generator = torch.Generator().manual_seed(100 * group.rank + count)
            t = torch.randn(count, generator=generator).to(dtype)
            for algorithm in ("AUTO", "DIRECT", "GATHER_FOLD"):
                out = torch.empty_like(t)
                group.all_reduce(
                    t.data_ptr(),
                    out.data_ptr(),
                    count,
                    _core.DType.FLOAT32 if dtype is torch.float32 else _core.DType.BFLOAT16,
                    ReduceOp.AVG,
                    algorithm=getattr(_core.Algorithm, algorithm),
                )
                results.append(out)
        return results

    of_ranks = run_ranks(len(hosts), reduced, hosts=hosts, piece_bytes=1024)
    for results in of_ranks:
        for i in range(0, len(results), 3):
            for other in (results[i + 1], results[i + 2], of_ranks[0][i]):
                assert torch.equal(results[i].view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_what_calibration_times_adds_in_place(count: int) -> None:
    sum = torch.arange(count + 1, dtype=torch.float32)  # one more than is added
    other = torch.full((count + 1,), 0.5)
    _core.add_in_place(sum.data_ptr(), other.data_ptr(), count)
    expected = torch.arange(count + 1, dtype=torch.float32)
    expected[:count] += 0.5
    assert torch.equal(sum, expected)
    assert torch.equal(other, torch.full((count + 1,), 0.5))


def test_calibration_measures_something_on_every_rank() -> None:
    models = run_ranks(2, cost.calibrate, hosts=[0, 1])
    assert models[0] == models[1]
    assert 0 < models[0].gamma_s_per_byte < 1e-6
    assert models[0].alpha_s > 0
