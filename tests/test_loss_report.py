"""The benchmarks' tables and files, and docs/performance.md, which shows them."""

import re
from pathlib import Path

import pytest

import loss_report
from benchmark_rows import make_row
from loss_report import Row

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "docs/results/performance").glob("*/losses.csv"))


@pytest.fixture
def _no_picture(monkeypatch):
    """What looks at tables alone is not to draw, which takes longer than all the rest."""
    monkeypatch.setattr(loss_report, "_picture", lambda rows: b"")


def some_rows():
    frozen = "linear/frozen/1024x1000x256x512/float32"
    return [
        *(make_row("ours", 4.0), make_row("eager", 10.0, extra=0.2), make_row("floor", 2.0, extra=None)),
        Row.from_dict(
            {**make_row("Liger", 1.0).to_dict(), "ms": "", "over_ours": "", "extra_mb": "", "note": "no GPU"}
        ),
        *(make_row("ours", 1234.5, case=frozen, note="factor"), make_row("eager", 99999.0, case=frozen)),
        make_row("ours", 0.01234, case="losses/logit/256x1000/bfloat16", revision="def"),
    ]


@pytest.mark.usefixtures("_no_picture")
def test_tables_say_what_the_rows_say(tmp_path):
    loss_report.write_report(tmp_path, some_rows())
    assert (tmp_path / "logits.md").read_text() == (
        "**KLLoss**\n\n"
        "| samples, classes | dtype | ours, ms | eager / ours | ours / floor "
        "| extra MB: ours | eager | gradients alone | n |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 1024, 1000 | float32 | 4.00 | 2.50 (2.00 to 5.00) | 2.00 (1.00 to 2.50) | 12 | < 1 | 4 | 7 |\n\n"
        "- Not measured: Liger: no GPU\n"
    )
    linear = (tmp_path / "linear.md").read_text()
    assert "**both heads frozen**" in linear
    assert "| 1024, 1000, 256, 512 | float32 | 1230 | factor | 24999.8 (" in linear
    assert "| `logit` | 256, 1000 | bfloat16 | 0.0123 |" in (tmp_path / "losses.md").read_text()
    assert (tmp_path / "setup.md").read_text() == (
        "- 2 cases: a box; PyTorch 2.13, Python 3.11; revision abc; 2026-11-22.\n"
        "- 1 case: a box; PyTorch 2.13, Python 3.11; revision def; 2026-11-22.\n"
    )


def test_files_are_read_back_and_written_the_same(tmp_path):
    loss_report.write_report(tmp_path / "first", some_rows())
    loss_report.write_report(tmp_path / "second", loss_report.read_rows(tmp_path / "first"))
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["linear.md", "logits.md", "losses.csv", "losses.md", "pixels.md", "setup.md", "vocabulary.png"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.usefixtures("_no_picture")
def test_tables_without_rows_say_so(tmp_path):
    loss_report.write_report(tmp_path, some_rows()[:1])
    assert (tmp_path / "linear.md").read_text() == "Not measured.\n"


@pytest.mark.usefixtures("_no_picture")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("case,table", "table,case", "line 1: the columns must be case, table"),
        (",abc,", ",abc", "line 2: there must be 22 cells, got 21"),
        (",4,3.6,", ",four,3.6,", "line 2: ms must be a finite number, got 'four'"),
        (",4,3.6,", ",inf,3.6,", "line 2: ms must be a finite number, got 'inf'"),
        (",7,1,", ",7.5,1,", "line 2: repeats must be a whole number, got '7.5'"),
        (",ours,", ",theirs,", "line 2: way and table must be of"),
        (",abc,", ',"a\nb",', "revision must be one line"),
        (",abc,", ',"abc" ,', "after line 2: "),
    ],
)
def test_rejects_a_malformed_file(old, new, message, tmp_path):
    loss_report.write_report(tmp_path, some_rows()[:1])
    path = tmp_path / "losses.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_report.read_rows(tmp_path)


def test_rejects_no_rows(tmp_path):
    with pytest.raises(ValueError, match="rows must hold at least one measurement, got none"):
        loss_report.write_report(tmp_path, [])


# --- docs/performance.md ---


@pytest.mark.usefixtures("_no_picture")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_tables_are_regenerated_byte_for_byte(folder, tmp_path):
    loss_report.write_report(tmp_path, loss_report.read_rows(folder))
    for path in folder.iterdir():
        if path.suffix != ".png":  # its pixels depend on the versions of matplotlib and of the fonts
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_page_shows_every_table_and_picture():
    assert FOLDERS
    page = (ROOT / "docs/performance.md").read_text()
    for folder in FOLDERS:
        for name in ("setup.md", *(f"{table}.md" for table in loss_report.TABLES)):
            assert f"{{include}} results/performance/{folder.name}/{name}\n" in page
        assert f"(results/performance/{folder.name}/vocabulary.png)" in page
        assert (folder / "vocabulary.png").is_file()


def test_numbers_in_the_text_are_those_of_the_tables():
    """Each ratio in the prose (such as 2.57 or 53.1), but for the goals, must stand in some generated table."""
    tables = "".join(path.read_text() for path in (ROOT / "docs/results/performance").rglob("*.md"))
    text = re.sub(r"^\| [^|]* \|", "", (ROOT / "docs/performance.md").read_text(), flags=re.MULTILINE)
    numbers = re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", text)
    assert numbers
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", tables), number
