"""The package as a whole: public names, what importing it costs, what a newcomer may forget."""

import inspect
import json
import pickle
import re
import runpy
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import hatchling.build
import pytest
import torch

import distill
import write_index
from contract import pickled_modules

ROOT = Path(__file__).parents[1]
LOSSES = sorted(path.stem for path in (ROOT / "src/distill/losses").glob("[a-z]*.py"))


def test_index_is_what_the_script_writes():
    text = (ROOT / "src/distill/__init__.py").read_text()
    assert write_index.render() == text, "make format writes src/distill/__init__.py"
    public = {name for name, value in vars(distill).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public <= {*distill.__all__}
    assert all(hasattr(distill, name) for name in distill.__all__)


def test_public_names_have_docstrings_with_the_sections_of_a_manual_page():
    for name in distill.__all__:
        thing = getattr(distill, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):  # a type alias or a module
            continue
        doc = inspect.getdoc(thing)
        wanted = ["Examples:"]
        if inspect.isfunction(thing):
            wanted.append("Returns:")
            if thing.__module__.startswith("distill.losses.") and name.endswith("_loss"):
                wanted += ["Args:", "Raises:", "Reference:", "loss = "]
        if name == "DistillerOutput":
            wanted = ["Attributes:"]
        for section in wanted:
            assert section in doc, f"the docstring of distill.{name} lacks the section {section!r}"


def test_every_loss_file_has_its_name_and_its_twin():
    for stem in LOSSES:
        assert stem in distill.list_losses(), f"the class in losses/{stem}.py must carry @register_loss({stem!r})"
        assert distill.get_loss(stem).__name__.lower() == f"{stem}loss".replace("_", "")
        assert distill.get_loss(stem).__module__ == f"distill.losses.{stem}"
        assert f"{stem}_loss" in distill.__all__, f"losses/{stem}.py must have the function {stem}_loss"
        assert (ROOT / f"tests/losses/test_{stem}.py").is_file(), f"tests/losses/test_{stem}.py must exist"


@pytest.mark.parametrize("name", distill.__all__)
def test_a_pickle_of_a_public_name_outlives_a_move(name):
    thing = getattr(distill, name)
    if inspect.ismodule(thing):
        pytest.skip("modules are not pickled")
    assert not [module for module in pickled_modules(thing) if "._" in module]


def test_a_pickle_of_an_instance_outlives_a_move():
    heads = torch.nn.Linear(4, 5), torch.nn.Linear(6, 5)
    student, teacher = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    terms = {"kl": distill.KLLoss(), "hint": distill.Term(distill.HintLoss(), at="", weight=0.5)}
    things = [
        distill.Distiller(student, teacher, terms),
        distill.Teachers(a=student, b=teacher),
        distill.LinearLogitLoss(*heads),
        distill.LinearLoss(distill.KLLoss(), *heads),
        distill.LinearCrossEntropyLoss(heads[0]),
        distill.CrossEntropyLoss(),
        distill.Term(distill.KLLoss(), at="fc"),
    ]
    for thing in things:
        assert not [module for module in pickled_modules(thing) if "._" in module], thing
    twin = pickle.loads(pickle.dumps(things[0]))
    inputs, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    assert twin(inputs, labels).loss == things[0](inputs, labels).loss
    assert dict(twin.weights) == {"kl": 1.0, "hint": 0.5, "task": 1.0}


def test_version_is_the_one_of_the_distribution_and_the_changelog():
    assert distill.__version__ == version("distill")
    assert f"## [{distill.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {distill.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{distill.__version__}}}" in (ROOT / "docs/cite.md").read_text()


def test_wheel_holds_the_package_and_nothing_else(tmp_path, monkeypatch, fresh):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        assert (ROOT / "README.md").read_text() in wheel.read(metadata).decode()
        wheel.extractall(tmp_path / "installed")
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    assert "distill/py.typed" in names
    code = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "import distill\n"
        "for name in distill.__all__: getattr(distill, name)\n"
        "for name in distill.list_losses(): distill.get_loss(name)\n"
        "print(distill.__file__)"
    )
    assert fresh.run(code).strip() == str(tmp_path / "installed/distill/__init__.py")


def test_published_readme_has_absolute_links():
    absolute, text = runpy.run_path(str(ROOT / "hatch_build.py"))["absolute"], (ROOT / "README.md").read_text()
    assert absolute(text, {}) == text
    made = absolute(text, {"Documentation": "https://site.test/", "Repository": "https://forge.test/distill"})
    assert not re.findall(r"\]\((?!https://)", made)
    assert "(https://site.test/distiller.html#other-kinds-of-teachers)" in made
    assert "(https://site.test/recipes/trl.html)" in made
    assert "(https://forge.test/distill/blob/HEAD/CONTRIBUTING.md)" in made
    assert made.count("](") == text.count("](")


def test_needs_only_torch_numpy_and_typing_extensions(fresh):
    runtime = [line for line in requires("distill") if "extra ==" not in line]
    assert sorted(line.split(">=")[0] for line in runtime) == ["numpy", "torch", "typing-extensions"]
    code = (
        "import sys, json\n"
        "before = set(sys.modules)\n"
        "import distill\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    added = set(json.loads(fresh.run(code))) - set(sys.stdlib_module_names)
    assert added == {"distill"}


def test_import_costs_at_most_50_ms_on_top_of_torch(tmp_path, fresh):
    code = (
        "import sys, time\n"
        # As installed: compiled to bytecode, which the first of these writes.
        "sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]\n"
        "t = time.process_time()\n"  # since machines are shared
        "import distill\n"
        "print(time.process_time() - t)"
    )
    seconds = [float(fresh.run(code, str(tmp_path))) for _ in range(8)]
    assert list(tmp_path.rglob("distill/__init__.*.pyc"))
    # The others are of a machine that does something else too, which then takes longer.
    assert min(seconds[1:]) < 0.050


@pytest.mark.subprocess
def test_the_command_for_the_lowest_versions_reads_them():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ranges = [*project["dependencies"], *(each for name in extras if name != "examples" for each in extras[name])]
    asked = subprocess.run([ROOT / ".ci/bounds", "versions"], check=True, capture_output=True, text=True).stdout
    assert asked.split() == [f"{each.replace('>=', '==')}.*" for each in ranges]
