"""The tables and pictures of docs/results.md are what the committed CSV files say."""

import re
from pathlib import Path

import pytest

from cifar.report import read_results, write_report

DOCS = Path(__file__).parents[2] / "docs"
FOLDERS = sorted(path.parent for path in (DOCS / "results").glob("*/results.csv"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_tables_are_regenerated_byte_for_byte(folder, tmp_path):
    write_report(tmp_path, read_results(folder))
    for name in ("results.csv", "curves.csv", "results.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_page_shows_every_table_and_picture():
    assert FOLDERS
    page = (DOCS / "results.md").read_text()
    for folder in FOLDERS:
        assert f"{{include}} results/{folder.name}/results.md\n" in page
        assert f"(results/{folder.name}/curves.png)" in page
        assert (folder / "curves.png").is_file()


def test_numbers_in_the_text_are_those_of_the_tables():
    """Each `NN.NN %` in the prose must stand in some generated table."""
    tables = "".join((folder / "results.md").read_text() for folder in FOLDERS)
    for number in re.findall(r"(\d\d\.\d\d) ?%", (DOCS / "results.md").read_text()):
        assert number in tables, number
