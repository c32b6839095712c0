"""Each defect that ``make test-mutants`` builds can still be put into the core, which has changed
since it was written: building them all takes minutes, and is not part of every run."""

import subprocess
from pathlib import Path

import pytest

SIMULATION = Path(__file__).parent / "simulation"
MUTANTS = sorted((SIMULATION / "mutants").glob("*.mutant"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda path: path.stem)
def test_a_mutant_finds_its_place(mutant: Path, tmp_path: Path) -> None:
    root = SIMULATION.parent.parent
    made = tmp_path / "mutant.cpp"
    command = ["cmake", f"-DMUTANT={mutant}", f"-DROOT={root}", f"-DOUT={made}"]
    done = subprocess.run(
        [*command, "-P", SIMULATION / "mutate.cmake"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    source = root / mutant.read_text().splitlines()[0]
    assert made.read_text() != source.read_text()


def test_there_are_mutants() -> None:
    assert MUTANTS
