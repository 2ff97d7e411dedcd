"""A full disk, files that a killed process left, and files that are not ours."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import cifar_resnet
from cifar import files
from cifar.files import remove_leftovers, temporary_name


class Full:
    """A file on a disk that is full."""

    def __init__(self, file):
        self.file, self.free = file, 1000

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.free -= len(content)
        if self.free < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)


def test_a_full_disk_is_named_and_costs_the_epoch_only(resumed, monkeypatch):
    sound, resume = resumed
    before = sound.checkpoint.read_bytes()
    open_file = type(sound.checkpoint).open
    with monkeypatch.context() as patch:
        patch.setattr(
            type(sound.checkpoint),
            "open",
            lambda path, mode="r", *rest, **more: (
                Full(open_file(path, mode)) if mode == "xb" else open_file(path, mode, *rest, **more)
            ),
        )
        with pytest.raises(OSError, match=r"No space left on device: .*\.pt"):
            resume()
    assert sound.checkpoint.read_bytes() == before
    assert not [*sound.checkpoint.parent.glob(".*"), *sound.checkpoint.parent.glob("*.tmp")]
    resume()


def test_temporary_names_never_meet_and_do_not_stay(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    assert len({temporary_name("x") for _ in range(100)}) == 100
    mine, theirs = tmp_path / temporary_name("mine"), tmp_path / "runs" / temporary_name("mine")
    dead = tmp_path / mine.name.replace(f".{os.getpid()}.", ".999999999.")
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere.example")
    far = tmp_path / temporary_name("far")
    monkeypatch.undo()
    first_format, not_ours = tmp_path / "run.pt.123.tmp", tmp_path / "notes.tmp"
    for path in (mine, theirs, dead, far, first_format, not_ours):
        path.write_bytes(b"half")
    remove_leftovers(tmp_path)
    left = {mine, theirs, far, first_format, not_ours}  # all of these may still be written
    assert set(tmp_path.rglob("*.tmp")) == left
    for path in left:
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert set(tmp_path.rglob("*.tmp")) == {not_ours}


def test_stray_files_beside_the_numbers_are_passed_over(resumed, tmp_path):
    sound, resume = resumed
    resume()
    folder = sound.result.parent
    (folder / "._x.json").write_bytes(b"\x00\x05\x16\x07")
    (folder / "notes.json").write_text("[1]")
    shutil.copy(sound.result, folder / "copy of it.json")
    results, left_out = cifar_resnet.read_finished(tmp_path / "runs")
    assert sorted(result.method for result in results) == ["logit", "teacher"]
    assert len(left_out) == 1
    assert "notes.json is no readable result" in left_out[0]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_clean_keeps_what_took_weeks(tmp_path):
    shutil.copy(Path(__file__).parents[3] / "Makefile", tmp_path)
    kept = {tmp_path / name for name in ("runs/digits/results.md", "data/cifar-10-binary.tar.gz", "runs-cifar10/x.pt")}
    built = {tmp_path / name for name in (".venv/ready", "dist/a.whl", "site/index.html")}
    for path in kept | built:
        path.parent.mkdir(parents=True)
        path.touch()
    subprocess.run(["make", "--silent", "clean"], cwd=tmp_path, check=True)
    assert all(path.exists() for path in kept)
    assert not any(path.parent.exists() for path in built)
