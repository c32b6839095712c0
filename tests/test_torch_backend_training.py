"""What torch builds on a process group, trained on gloo and on pycomm: the same results.

The cases are in ``torch_training``, whose ``cases.py`` says which results have to have the same
bits, and how far the others may be off and why. One ``torchrun`` of two ranks, where all have the
same bits, runs them on both. `make test-torch-training` runs more of them, and on four ranks.
"""

import pytest
from torch_training.report import TIMEOUT_S, run_cases


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_training_gives_what_it_gives_on_gloo(tmp_path):
    run = run_cases(2, tmp_path)
    assert not run.failures, "\n\n".join(run.failures)
    assert not [v for of_ranks in run.verdicts.values() for v in of_ranks if v.difference]
