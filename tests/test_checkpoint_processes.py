"""Checkpoints of real processes."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import SAVED_AT, Layout, Run, differences

import pycomm
from pycomm import checkpoint


@pytest.mark.mpi
def test_processes_save_and_resume_in_other_layouts() -> None:
    pycomm.init()
    ranks = pycomm.size()
    group = pycomm.new_group(range(ranks))
    assert group is not None
    with tempfile.TemporaryDirectory() as made:
        path = Path(pycomm.broadcast_object(made)) / "c"
        first: dict[str, Any] | None = None
        for layout in (
            Layout(dp=ranks // 2, pp=2),
            Layout(dp=ranks, sharded=True),
            Layout(pp=ranks, schedule="zero_bubble"),
            Layout(dp=ranks),
        ):  # each goes on from what the one before it has saved
            run = Run(layout, group, fresh=True)
            if first is None:
                run.train(0, SAVED_AT)
            else:
                assert checkpoint.load(path, run.state) == {"step": SAVED_AT}
            checkpoint.save(path, {**run.state, "step": SAVED_AT})
            found = checkpoint.read(path)
            first = first or copy.deepcopy(found)
            assert not list(differences(found, first)), layout
            pycomm.barrier()
