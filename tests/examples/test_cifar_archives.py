import hashlib
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cifar.archives import Archive, fetch, unpickle_arrays
from packed import tar_gz

FILES = {"set/train.bin": bytes(range(256)) * 40, "set/test.bin": b"test" * 500, "set/sub/names.txt": b"cat\ndog\n"}


def md5(content):
    return hashlib.md5(content).hexdigest()


def tree(folder):
    """What lies in a folder: relative path -> content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SET = {name.removeprefix("set/"): content for name, content in FILES.items()}


@dataclass
class Server:
    """An HTTP server with one archive, of which it sends the first `sent` bytes."""

    url: str
    body: bytes = b""
    sent: int | None = None
    before: Callable[[], object] = bool  # called before the answer
    after: Callable[[], object] = bool  # called before the connection ends
    requests: list[str] = field(default_factory=list)

    def archive(self, body, *, md5_of=None, sent=None):
        self.body, self.sent = body, sent
        return Archive(f"{self.url}/set.tar.gz", md5(body if md5_of is None else md5_of))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if self.path != "/set.tar.gz":
                self.send_error(404)
                return
            state.before()
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body[: state.sent])
            self.wfile.flush()
            state.after()

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def unreachable(monkeypatch):
    """An archive on a port of this machine where nobody listens."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return Archive("http://127.0.0.1:1/set.tar.gz", md5(tar_gz(FILES)))


@pytest.fixture(params=["filter", "no filter"])
def any_tarfile(request, monkeypatch):
    """tarfile with and without extraction filters, which Python 3.10 got in its twelfth release."""
    if request.param == "no filter":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


def run(archive, folder, *, download=True, progress=False):
    fetch(archive, folder, download=download, progress=progress)


@pytest.mark.usefixtures("any_tarfile")
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_download_is_kept_and_unpacked(server, tmp_path):
    body = tar_gz(FILES)
    run(server.archive(body), tmp_path / "data" / "set")
    assert tree(tmp_path / "data") == {"set.tar.gz": body, **FILES}
    assert server.requests == ["/set.tar.gz"]
    run(server.archive(body), tmp_path / "data" / "set")
    assert len(server.requests) == 1


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False)])
def test_progress_bar_counts_bytes(server, tmp_path, capsys, progress, shown):
    run(server.archive(tar_gz(FILES)), tmp_path / "set", progress=progress)
    err = capsys.readouterr().err
    assert ("set.tar.gz: 100%" in err) == shown
    assert bool(err) == shown


def test_truncated_download_is_named_and_not_kept(server, tmp_path):
    body = tar_gz(FILES)
    archive = server.archive(body, sent=100)
    with pytest.raises(
        ValueError, match=rf"{archive.url} must have the md5 {md5(body)}, got {md5(body[:100])} \(100 of"
    ):
        run(archive, tmp_path / "set")
    assert tree(tmp_path) == {}


def test_wrong_download_is_named_and_not_kept(server, tmp_path):
    archive = server.archive(b"a page of your hotel", md5_of=tar_gz(FILES))
    with pytest.raises(ValueError, match=f"md5 {archive.md5}, got {md5(b'a page of your hotel')}"):
        run(archive, tmp_path / "set")
    assert tree(tmp_path) == {}


def test_no_network_says_what_to_put_where(unreachable, tmp_path):
    by_hand = f"put {unreachable.url} (md5 {unreachable.md5}) at {tmp_path / 'set.tar.gz'}"
    with pytest.raises(OSError, match=re.escape(by_hand)) as caught:
        run(unreachable, tmp_path / "set")
    assert "refused" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert tree(tmp_path) == {}


def test_page_not_found_is_an_error(server, tmp_path):
    with pytest.raises(OSError, match=r"other.tar.gz could not be downloaded: <HTTPError 404"):
        run(Archive(f"{server.url}/other.tar.gz", "0" * 32), tmp_path / "set")


def test_download_off_says_what_to_put_where(server, tmp_path):
    archive = server.archive(tar_gz(FILES))
    path = tmp_path / "data" / "set.tar.gz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"put {archive.url} (md5 {archive.md5}) at {path}")):
        run(archive, tmp_path / "data" / "set", download=False)
    assert server.requests == []
    assert not (tmp_path / "data").exists()


def test_archive_that_lies_there_is_used(unreachable, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(tar_gz(FILES))
    archive = Archive(unreachable.url, md5((tmp_path / "set.tar.gz").read_bytes()))
    run(archive, tmp_path / "set", download=False)
    assert tree(tmp_path / "set") == SET


def test_truncated_archive_that_lies_there_is_named(unreachable, tmp_path):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(tar_gz(FILES)[:200])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} must .* {unreachable.md5}, got {md5(path.read_bytes())} \(200 b"
    ):
        run(unreachable, tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]


def test_folder_that_lies_there_is_left_alone(unreachable, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_bytes(b"mine")
    run(unreachable, tmp_path / "set")
    assert tree(tmp_path) == {"set/mine": b"mine"}


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("set/../../evil"),
        member("/tmp/evil"),
        member("..\\evil"),
        member("C:evil"),
        member("..", tarfile.DIRTYPE),
        member("set/link", tarfile.SYMTYPE, "/etc"),
        member("set/link", tarfile.SYMTYPE, "train.bin"),
        member("set/link", tarfile.LNKTYPE, "set/train.bin"),
        member("set/pipe", tarfile.FIFOTYPE),
        member("set/device", tarfile.CHRTYPE),
    ],
    ids=lambda evil: f"{evil.name} {evil.type.decode()} {evil.linkname}",
)
@pytest.mark.usefixtures("any_tarfile")
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_rejects_members_that_could_leave_the_folder(unreachable, tmp_path, evil):
    body = tar_gz(FILES, extra=[evil])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set.tar.gz").write_bytes(body)
    with pytest.raises(ValueError, match=re.escape(f"got the member {evil.name!r}")):
        run(Archive(unreachable.url, md5(body)), tmp_path / "data" / "set")
    assert tree(tmp_path) == {"data/set.tar.gz": body}


def test_rejects_archive_without_the_folder(server, tmp_path):
    with pytest.raises(ValueError, match=r"must hold the folder other"):
        run(server.archive(tar_gz(FILES)), tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]


def test_leftovers_are_not_used_and_go_after_a_day(server, tmp_path):
    for age, name in ((0, "set.tar.gz.new.part"), (25 * 3600, "set.tar.gz.old.part")):
        (tmp_path / name / "set").mkdir(parents=True)
        (tmp_path / name / "set.tar.gz").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    run(server.archive(tar_gz(FILES)), tmp_path / "set")
    assert tree(tmp_path / "set") == SET
    # The newer one may belong to a process that is still at it.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.tar.gz", "set.tar.gz.new.part"]


def test_killed_download_leaves_nothing_that_looks_whole(server, tmp_path):
    archive = server.archive(tar_gz(FILES), sent=100)
    killed = threading.Event()
    server.after = killed.wait
    code = (
        "import sys; from pathlib import Path; from cifar.archives import Archive, fetch\n"
        "fetch(Archive(*sys.argv[1:3]), Path(sys.argv[3]), download=True, progress=False)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, archive.url, archive.md5, str(tmp_path / "set")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("set.tar.gz.*.part/set.tar.gz")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
    killed.set()
    server.sent = None
    run(archive, tmp_path / "set")
    assert tree(tmp_path / "set") == SET


def test_two_at_the_same_time_both_succeed(server, tmp_path):
    archive = server.archive(tar_gz(FILES))
    server.before = threading.Barrier(2, timeout=60).wait  # neither is answered before both have asked
    with ThreadPoolExecutor(2) as pool:
        for attempt in [pool.submit(run, archive, tmp_path / "set") for _ in range(2)]:
            attempt.result()
    assert tree(tmp_path) == {"set.tar.gz": server.body, **FILES}


@pytest.mark.parametrize("protocol", [2, 4])
def test_unpickles_arrays_and_containers(protocol):
    batch = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3], "x": ("a", None, 1.5, b"\xff")}
    got = unpickle_arrays(Path("batch"), pickle.dumps(batch, protocol))
    np.testing.assert_array_equal(got.pop("data"), batch.pop("data"))
    assert got == batch


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, f"{os.name}.mkdir"), (exec, "exec"), (np.save, "numpy.save"), (getattr, "getattr")],
)
def test_rejects_and_does_not_run_other_pickles(tmp_path, protocol, function, name):
    made = tmp_path / "made"
    args = {exec: (f"open({str(made)!r}, 'w')",), np.save: (str(made), [1]), getattr: ("", "join")}
    content = pickle.dumps({"data": Call(function, *args.get(function, (str(made),)))}, protocol)
    with pytest.raises(ValueError, match=rf"batch_1 must be a pickle of arrays .*{name} is not admitted"):
        unpickle_arrays(Path("batch_1"), content)
    assert list(tmp_path.iterdir()) == []


def test_rejects_other_encodings_and_cut_pickles():
    import codecs

    with pytest.raises(ValueError, match="latin1 only, got 'rot13'"):
        unpickle_arrays(Path("batch"), pickle.dumps(Call(codecs.encode, "abc", "rot13"), 2))
    with pytest.raises(ValueError, match="batch must be a pickle"):
        unpickle_arrays(Path("batch"), pickle.dumps([1, 2, 3])[:-3])
    with pytest.raises(ValueError, match="batch must be a pickle"):
        unpickle_arrays(Path("batch"), b"")
