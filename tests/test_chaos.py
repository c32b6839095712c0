"""Jobs that break at random, a few of them: ``make chaos`` runs hundreds, docs/chaos.md says what
is counted."""

from pathlib import Path

import pytest
from chaos import run
from chaos.plan import ELASTIC_KINDS, ELASTIC_PHASE, KINDS, PHASES, RANKS, Fault, fault_of


def test_a_round_follows_from_its_seed_and_number() -> None:
    assert fault_of(1, 17) == fault_of(1, 17)
    assert fault_of(1, 17) != fault_of(2, 17)
    assert Fault.decode(fault_of(1, 17).encode()) == fault_of(1, 17)


def test_every_kind_meets_every_phase_where_it_can_happen() -> None:
    faults = [fault_of(1, number) for number in range(len(KINDS) * len(PHASES))]
    met = {(fault.kind, fault.phase) for fault in faults}
    for kind in KINDS:
        for phase in PHASES:
            cannot = kind in ("differ", "leave") and phase in ("start-up", "shutdown")
            assert ((kind, phase) in met) == (kind not in ELASTIC_KINDS and not cannot)
    assert {kind for kind, phase in met if phase == ELASTIC_PHASE} == set(ELASTIC_KINDS)
    assert {fault.rank for fault in faults} == set(range(RANKS))


@pytest.mark.timeout(900)
def test_twenty_broken_jobs(tmp_path: Path) -> None:
    # All kinds twice, over all phases.
    arguments = ["--rounds", "20", "--stride", "13", "--seed", "1", "--folder", str(tmp_path)]
    assert run.main(arguments) == 0
