"""The files of a stored teacher: killed, full, torn, damaged, shared; nothing is lost, and nothing wrong is read."""

import errno
import json
import os
import runpy
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stored_teacher as campaign
from distill import StoredTeacher, StoreError, TeacherWriter, TopK
from distill._store import files
from distill.store import describe, main
from stored import integers, random, same, shards, write

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


# --- killed, full, torn ---


@forks
def test_a_flush_that_is_killed_at_any_step_loses_nothing_that_was_reported(tmp_path, monkeypatch):
    """Every step of the file system in turn is the last of the process."""
    found = []
    for last in range(40):
        process = os.fork()
        if process == 0:  # pragma: no cover - another process
            _write_until(monkeypatch, tmp_path, last)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        reported = json.loads((tmp_path / "reported").read_text()) if (tmp_path / "reported").exists() else []
        there = []
        if (tmp_path / "folder" / files.HEADER).exists() and shards(tmp_path / "folder"):
            asked = StoredTeacher(tmp_path / "folder")
            there = asked.ids().tolist()
            for sample in there:
                assert torch.equal(asked([sample]), random(1, 5, seed=sample))
        assert {*reported} <= {*there}
        found.append(len(there))
        if status == 0:
            break
    assert status == 0
    assert there == [0, 1, 2, 3]
    assert len({*found}) > 1


def _write_until(monkeypatch, folder, last):  # pragma: no cover - in a process of its own
    """Write four samples in two flushes, and end this process without any cleaning after `last` steps."""
    steps = []
    code = 9
    try:
        writer = TeacherWriter(folder / "folder", progress=False)

        def counted(step):
            def run(*arguments, **options):
                if len(steps) == last:
                    os._exit(9)
                steps.append(step)
                return step(*arguments, **options)

            return run

        monkeypatch.setattr(os, "fsync", counted(os.fsync))
        monkeypatch.setattr(os, "open", counted(os.open))
        monkeypatch.setattr(Path, "replace", counted(Path.replace))
        monkeypatch.setattr(Path, "open", counted(Path.open))
        todo = [sample for sample in range(4) if writer.missing([sample])[0]]
        for sample in todo:
            writer.add([sample], random(1, 5, seed=sample))
            if sample % 2:
                writer.flush()
                steps_before, steps[:] = list(steps), []
                (folder / "reported").write_text(json.dumps([*range(sample + 1)]))
                steps[:] = steps_before
        writer.close()
        code = 0
    finally:
        os._exit(code)


def test_flush_syncs_before_it_renames_and_the_folder_after(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def rename(self, target):
        steps.append(Path(target).suffix)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    with TeacherWriter(tmp_path) as writer:
        writer.add([0], random(1, 5))
        writer.flush()
        assert steps == [
            "folder",
            "file",
            ".json",
            "folder",
            "file",
            ".safetensors",
            "folder",
            "file",
            ".json",
            "folder",
        ]
        steps.clear()
        writer.flush()
        assert not steps
        assert 0 in StoredTeacher(tmp_path)  # while the writer is open


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, monkeypatch, failing):
    calls = []
    sync = os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2 * failing - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    writer = TeacherWriter(tmp_path)
    writer.add([0, 1], random(2, 5))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        OSError, match="the disk is full: what was added .* is not written but still in memory"
    ) as caught:
        writer.flush()
    assert caught.value.errno == errno.ENOSPC
    assert not [*tmp_path.glob("*.tmp")]
    writer.add([2], random(1, 5, seed=1))
    writer.close()
    assert torch.equal(StoredTeacher(tmp_path)([0, 1, 2]), torch.cat([random(2, 5), random(1, 5, seed=1)]))


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, monkeypatch):
    writer = TeacherWriter(tmp_path)
    writer.add([0], random(1, 5))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        writer.flush()


def test_a_writer_stays_in_its_folder_when_the_process_changes_its_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere/answers").mkdir(parents=True)  # another job has a folder of that name, too
    monkeypatch.chdir(tmp_path)
    writer = TeacherWriter("answers")
    writer.add(np.arange(3)[::-1], random(3, 5))  # ids that lie backwards in memory
    monkeypatch.chdir(tmp_path / "elsewhere")
    writer.close()
    assert not any((tmp_path / "elsewhere/answers").iterdir())
    assert torch.equal(StoredTeacher(tmp_path / "answers")([2, 1, 0]), random(3, 5))


def test_a_writer_goes_on_where_another_was_killed(tmp_path):
    ids = torch.arange(6)
    writer = TeacherWriter(tmp_path, k=2, model="mine")
    writer.add(ids[:3], random(3, 5))
    writer.flush()
    writer.add(ids[3:5], random(2, 5, seed=1))  # and is gone before it flushes
    del writer
    (tmp_path / "0123456789ab-000007.safetensors.12345678.tmp").write_bytes(b"half a shard")
    with TeacherWriter(tmp_path, k=2, model="mine") as writer:
        assert len(writer) == 3
        assert writer.missing(ids).tolist() == [False] * 3 + [True] * 3
        with pytest.raises(
            ValueError, match=r"a sample must be added once, got 2 again, one of 1; missing\(ids\) says"
        ):
            writer.add([2, 3], random(2, 5))
        new = ids[writer.missing(ids)]
        writer.add(new, random(3, 5, seed=2))
        assert not writer.missing(ids).any()
    asked = StoredTeacher(tmp_path)
    assert same(asked(ids), TopK.of(torch.cat([random(3, 5), random(3, 5, seed=2)]), 2).to(torch.float16))
    assert "1 files of killed writers" in describe(tmp_path)


def test_add_flushes_by_itself_when_much_was_added(tmp_path):
    with TeacherWriter(tmp_path, shard_bytes=100) as writer:
        for sample in range(6):
            writer.add([sample], random(1, 15, seed=sample))
        assert len(shards(tmp_path)) == 3
    assert len(StoredTeacher(tmp_path)) == 6


def test_several_writers_share_a_folder(tmp_path):
    first, second = TeacherWriter(tmp_path), TeacherWriter(tmp_path)
    tokens = integers(9, 4, 3)
    first.add([0, 2], random(2, 5), tokens[[0, 2]])
    second.add([3, 1, 0], random(3, 5, seed=1), tokens[[3, 1, 0]])  # 0 as well: samplers repeat to make shares even
    for writer in (second, first):
        writer.close()
    asked = StoredTeacher(tmp_path)
    assert asked.ids().tolist() == [0, 1, 2, 3]
    assert torch.equal(asked([3, 1, 2]), torch.cat([random(3, 5, seed=1)[:2], random(2, 5)[1:]]))
    assert any(torch.equal(asked([0])[0], row) for row in (random(2, 5)[0], random(3, 5, seed=1)[2]))


@pytest.mark.parametrize("tokens", [True, False])
def test_an_id_that_two_writers_gave_to_different_samples_is_named(tmp_path, tokens):
    first, second = TeacherWriter(tmp_path), TeacherWriter(tmp_path)
    first.add([4], random(1, 5), torch.zeros(1, 3) if tokens else None)
    second.add([4], random(1, 5, seed=1), torch.ones(1, 3) if tokens else None)
    first.close()
    second.close()
    what = "tokens or pixels" if tokens else "content"
    with pytest.raises(
        StoreError, match=rf"an id must be stored once, got 4 twice with other {what}: .* in .* and .* in "
    ):
        StoredTeacher(tmp_path)


def test_writers_that_disagree_are_stopped_before_they_write(tmp_path):
    first, second = TeacherWriter(tmp_path, model="a"), TeacherWriter(tmp_path, model="b")
    first.add([0], random(1, 5))
    second.add([1], random(1, 5))
    first.close()
    with pytest.raises(ValueError, match="what is added to .* must be like what it has: model must be a, got b"):
        second.close()
    assert len(StoredTeacher(tmp_path)) == 1


@forks
def test_a_short_campaign_of_kills(tmp_path):
    counts = campaign.kill_campaign(tmp_path, 4, seed=0)
    assert counts["killed"] == 4
    assert counts["lost"] == counts["wrong"] == 0
    assert counts["found"] >= counts["reported"] > 0


def test_a_short_campaign_of_damage(tmp_path):
    counts = campaign.damage_campaign(tmp_path, 30, seed=1)
    assert counts["undamaged: harmless"] == 1
    assert sum(counts.values()) == 31
    assert not [name for name in counts if name.split(": ")[1] not in ("named", "harmless")]


@pytest.fixture
def folder(tmp_path):
    """Two writers, one with two shards."""
    for first in (0, 4):
        with TeacherWriter(tmp_path, k=3, model="mine") as writer:
            for sample in range(first, first + 4):
                writer.add([sample], random(1, 2, 9, seed=sample), integers(9, 1, 2))
                if first == 0:
                    writer.flush()
    return tmp_path


def counting(folder, shards_counted):
    return next(f for f in folder.glob("*.json") if json.loads(f.read_text()).get("shards") == shards_counted)


def change(path, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))


def test_every_damage_says_what_is_wrong(folder):
    backup = {path: path.read_bytes() for path in folder.iterdir()}
    of_four = counting(folder, 4)
    first, second, *_, last = sorted(folder.glob(f"{of_four.stem}-*.safetensors"))
    single = counting(folder, 1)
    size = first.stat().st_size
    header = folder / files.HEADER

    def swap(a, b):
        (x, y) = a.read_bytes(), b.read_bytes()
        a.write_bytes(y)
        b.write_bytes(x)

    def flip(path, place):
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)

    damages = [
        (lambda: os.truncate(first, size - 1), f"must have {size} bytes, got {size - 1}: it is torn"),
        (lambda: os.truncate(first, 200), "must be a safetensors file, but it is torn or damaged, 200 bytes"),
        (lambda: os.truncate(first, 0), "must be a safetensors file, but it is torn or damaged, 0 bytes"),
        (lambda: first.write_bytes(first.read_bytes() + b"more"), "it is torn"),
        (lambda: change(first, b'"shape":[1,1]', b'"shape":[1,2]'), "must have the checksum of its header"),
        (lambda: change(first, b'"checksum":"', b'"checkpum":"'), "must have the checksum of its header"),
        (lambda: flip(first, -1), r"the output of id 0 must have the checksum [0-9a-f]{8}, got [0-9a-f]{8}"),
        (lambda: change(first, b'"version":"1"', b'"version":"2"'), "must have version 1 of the format, got version 2"),
        (lambda: change(first, b'"format":"distill', b'"format":"Distill'), "must be of the format 'distill teacher'"),
        (lambda: change(header, b'"version": 1', b'"version": 2'), "must have version 1 of the format, got version 2"),
        (lambda: change(header, b'"k": 3', b'"k": 2'), "must have the checksum of what it says"),
        (lambda: change(header, b'"k": 3', b'"k: 3'), "must be JSON, but it is damaged"),
        (lambda: change(header, b"mine", b"m\xffne"), "must be JSON, but it is damaged"),
        (lambda: header.write_text("[]"), "must be of the format 'distill teacher'; it is another file, or damaged"),
        (
            header.unlink,
            f"must have a file {files.HEADER}, got none in .*: nothing was stored there, or it was deleted",
        ),
        (lambda: swap(first, second), "must be the shard .*, got the content of "),
        (lambda: swap(header, of_four), "must be a header, got the content of another file"),
        (lambda: swap(of_four, single), "must count the shards of writer .*, got the content of "),
        (first.unlink, "must have the shard .*-000000, one of 4: it was deleted"),
        (last.unlink, "must have the shard .*-000003, one of 4: it was deleted"),
        (of_four.unlink, r"\.json must count the shards of its writer, at least 3, got 0: it was deleted"),
        (
            lambda: first.rename(folder / "shard.safetensors"),
            "no other safetensors files than its shards, got shard.saf",
        ),
    ]
    for damage, message in damages:
        damage()
        with pytest.raises(StoreError, match=message):
            StoredTeacher(folder)(range(8))
        for path in folder.iterdir():
            path.unlink()
        for path, data in backup.items():
            path.write_bytes(data)
    assert len(StoredTeacher(folder)) == 8
    single.unlink()  # nothing is lost with the count of one shard
    assert len(StoredTeacher(folder)) == 8


def test_index_under_another_checksum_and_shards_of_another_teacher_are_named(tmp_path, folder):
    other = tmp_path / "other"
    write(other, [9], random(1, 2, 9), integers(9, 1, 2), k=3, model="theirs")
    (shard,) = shards(other)
    (folder / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(StoreError, match="must be of the teacher of its folder: model must be mine, got theirs"):
        StoredTeacher(folder)
    (folder / shard.name).unlink()
    first = shards(folder)[0]
    data = bytearray(first.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    place = start + json.loads(data[8:start])["index/ids"]["data_offsets"][0]
    data[place] ^= 1
    first.write_bytes(data)
    with pytest.raises(StoreError, match="must have the checksum of its index, got another: it is damaged"):
        StoredTeacher(folder)


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(StoreError, match=f"must have a file {files.HEADER}, got none in"):
        StoredTeacher(tmp_path)
    writer = TeacherWriter(tmp_path)
    writer.close()
    assert not [*tmp_path.iterdir()]
    write(tmp_path, [0], random(1, 5))
    for path in [*shards(tmp_path), *tmp_path.glob("????????????.json")]:
        path.unlink()
    with pytest.raises(StoreError, match="must have a sample, got none: its writer had written nothing yet"):
        StoredTeacher(tmp_path)
    assert TeacherWriter(tmp_path).missing([0]).tolist() == [True]
    write(tmp_path / "b", [0], random(1, 5))
    (tmp_path / "b" / files.HEADER).unlink()
    with pytest.raises(StoreError, match=f"must have a file {files.HEADER} beside its shards: it was deleted"):
        TeacherWriter(tmp_path / "b")


# --- the command and the progress line ---


def test_info_says_what_is_in_a_folder(folder, capsys):
    assert main(["info", str(folder), "--check"]) == 0
    said = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert lines["teacher"] == "mine"
    assert lines["samples"] == "8, by a number"
    assert lines["tokens"] == "16"
    assert lines["output"] == "top-k (T, k) of float16, k=3 of 9, temperature 1.0"
    assert lines["shards"] == "5 of 2 writers, every sample as it was written"
    size = sum(path.stat().st_size for path in shards(folder))
    assert lines["bytes"] == f"{size:,}, {size / 16:.1f} a token"
    data = bytearray(shards(folder)[0].read_bytes())
    data[-1] ^= 1
    shards(folder)[0].write_bytes(data)
    assert main(["info", str(folder)]) == 0
    capsys.readouterr()
    assert main(["info", str(folder), "--check"]) == 1
    assert "it is damaged" in capsys.readouterr().err


def test_info_of_images_counts_samples(tmp_path):
    write(tmp_path, [[0, 1], [1, 1]], random(2, 5))
    said = describe(tmp_path)
    assert "2, by a sample and a seed" in said
    assert "a sample\n" in said
    assert "not known" in said


def test_info_is_a_command(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "distill.store")  # which nothing else imports, or Python would warn of it
    monkeypatch.setattr(sys, "argv", ["store.py", "info", str(folder)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("distill.store", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == describe(folder) + "\n"
