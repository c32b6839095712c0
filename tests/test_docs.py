"""What the documents say about files and functions is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_each_row_of_the_data_path_is_in_the_file_it_names() -> None:
    rows = re.findall(
        r"^\| (\d) \| (.+?) \| (.+?) \|", (ROOT / "docs/data-path.md").read_text(), re.MULTILINE
    )
    assert [int(number) for number, _, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
    for _, files, functions in rows:
        sources = [(ROOT / name).read_text() for name in re.findall(r"\[`([^`]+)`\]", files)]
        for function in re.findall(r"`([^`]+)`", functions):
            assert any(f"{function}(" in source for source in sources), f"{function} in {files}"
