"""Every Python block on a page runs, the blocks of a page one after the other."""

import re
from pathlib import Path

import pytest
import torch

import distill

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_code_on_the_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names = {"__name__": "page"}
    with torch.random.fork_rng():
        for block in BLOCK.finditer(text):
            line = text[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(page), "exec"), names)


def test_every_loss_and_every_page_is_mentioned():
    table = (ROOT / "docs/losses.md").read_text()
    for name in distill.list_losses():
        assert f"| `{name}` |" in table, f"docs/losses.md must have a line for {name!r}"
    for name in distill.__all__:
        assert any(f"::: distill.{name}\n" in page.read_text() + "\n" for page in PAGES), (
            f"no page shows distill.{name}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
