"""What stands in code on a page works: Python runs, commands are accepted, TOML says what it should."""

import importlib
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import cifar_resnet
import distill
import linear_losses
import losses
import losses_page
import step_ideas
import stored_teacher

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FAMILIES = sorted((ROOT / "docs/losses").glob("*.md"))
RECIPES = sorted((ROOT / "docs/recipes").glob("*.md"))  # whose code test_recipes.py runs
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\n*^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # right after a block: what it prints
PLAIN_COMMANDS = (  # shown with their defaults
    "examples/image_classifier.py",
    "examples/vit_to_cnn.py",
    "examples/segmentation.py",
    "examples/detector.py",
    "examples/fetch.py",
    "examples/sentence_encoder.py",
    "examples/causal_lm.py",
    "examples/balance.py",
    "benchmarks/neighbours.py",
)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND_LINES = [
    (page.name, line)
    for page in PAGES
    for block in COMMANDS.finditer(page.read_text())
    for line in block[1].splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_code_on_the_page_runs_and_prints_what_it_says(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    if "SwinModel" in text and int(version("transformers").split(".")[0]) < 5:
        pytest.skip("what the page shows of models is what transformers 5 makes them of")
    names = {"__name__": "page"}
    with torch.random.fork_rng():
        for block in BLOCK.finditer(text):
            line = text[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
            said, shown = capsys.readouterr().out, PRINTED.match(text, block.end())
            if shown:
                assert said == shown[1]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_command_on_the_page_is_accepted(page, line):
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program.endswith("python"):
        script, *options = arguments
        commands = {
            "examples/cifar_resnet.py": cifar_resnet,
            "benchmarks/linear_losses.py": linear_losses,
            "benchmarks/losses.py": losses,
            "benchmarks/step_ideas.py": step_ideas,
            "benchmarks/stored_teacher.py": stored_teacher,
        }
        if script in PLAIN_COMMANDS:
            assert (ROOT / script).exists()
            assert not options, "these are shown with their defaults"
        elif script == "examples/seeds.py":
            pytest.importorskip("transformers")
            importlib.import_module("seeds").parse_arguments(options)
        else:
            commands[script].parse_arguments(options)  # exits with 2 if it refuses
    else:
        assert (program, arguments) == ("pip", ["install", "."])


def test_every_block_on_the_pages_is_of_a_kind_that_is_tested():
    of_sphinx = ("{eval-rst}", "{toctree}", "{include}", "bibtex")
    for page in (*PAGES, *FAMILIES, *RECIPES):
        for kind in re.findall(r"^```(\S+)", page.read_text(), re.MULTILINE):
            assert kind in ("python", "bash", "toml", *of_sphinx), f"{page.name} has a block of {kind}"


def test_entry_point_on_the_page_names_our_group():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    block = re.search(r"^```toml\n(.*?)^```$", (ROOT / "docs/adding-a-loss.md").read_text(), re.MULTILINE | re.DOTALL)
    points = tomllib.loads(block[1])["project"]["entry-points"]
    assert list(points) == [distill._registry.GROUP]


def test_every_public_name_is_shown_on_a_page():
    pages = "\n".join(losses_page.fill(page.read_text()) for page in (*PAGES, *FAMILIES))
    shown = re.findall(r"^\.\. auto\w+:: distill\.(\w+)$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(distill.__all__)  # each once


@pytest.mark.parametrize("page", [*PAGES, *FAMILIES, *RECIPES], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
