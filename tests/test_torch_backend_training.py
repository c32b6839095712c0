"""What torch builds on a process group, trained on gloo and on pycomm: the same results.

The cases are in ``torch_training``, whose ``cases.py`` says which results have to have the same
bits, and how far the others may be off and why. One ``torchrun`` for each world size runs them on
both. `make test-torch-training` runs more of them.
"""

import pytest
from torch_training.report import TIMEOUT_S, WORLD_SIZES, run_cases


@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_gives_what_it_gives_on_gloo(world_size, tmp_path):
    run = run_cases(world_size, tmp_path)
    assert not run.failures, "\n\n".join(run.failures)
    differing = [v for of_ranks in run.verdicts.values() for v in of_ranks if v.difference]
    # Nothing would differ if the two runs were of one backend.
    assert bool(differing) == (world_size > 2)
