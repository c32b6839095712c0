"""Every collective of torch.distributed gives on pycomm what it gives on gloo.

The cases are those of ``torch_collectives_program.py``; all run in one go, on 2 and on 4 ranks.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch_collectives_program as program
from forked_ranks import Outcome, run_program

SIZES = (2, 4)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Outcome]]:
    folder: Path = tmp_path_factory.mktemp("collectives")
    return run_program("torch_collectives_program.py", folder, timeout_s=400)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("size", SIZES)
def test_the_ranks_end(outcomes: Mapping[str, list[Outcome]], size: int) -> None:
    for outcome in outcomes[f"{size} ranks"]:
        assert outcome.returncode == 0, outcome.err
        assert set(program.CASES) <= set(outcome.report)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", program.CASES)
def test_pycomm_does_as_gloo(outcomes: Mapping[str, list[Outcome]], case: str, size: int) -> None:
    for rank, outcome in enumerate(outcomes[f"{size} ranks"]):
        problem = outcome.report.get(case, f"was not reached\n{outcome.err}")
        assert problem == "", f"on rank {rank}: {problem}"
