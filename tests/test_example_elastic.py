"""examples/train_elastic.py, started as a user starts it."""

import re

import example_runs
import pytest


@pytest.mark.timeout(240)
def test_two_killed_and_one_that_joins_reach_the_accuracy_of_an_undisturbed_run(tmp_path):
    done = example_runs.run(
        "train_elastic.py",
        4,
        *("--kill-at", "1:30,0:60", "--respawns", "1"),
        cwd=tmp_path,
        survivors=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.findall(r"rank (\d) is killed", done.stdout)
    assert killed == ["1", "0"], done.stdout
    counts = re.findall(r"pycomm.elastic: .*?(\d) go on from commit", done.stderr)
    assert counts == ["3", "4", "3"], done.stderr
    # tests/test_example.py asks as much of train.py on one rank.
    accuracy = re.search(r"test accuracy ([\d.]+)% after 15 epochs on 3 ranks", done.stdout)
    assert float(accuracy[1]) >= 97
