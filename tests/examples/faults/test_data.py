"""Data from elsewhere: crafted pickles, and downloads."""

import os

import numpy as np
import pytest

from cifar import archives
from cifar.archives import unpickle_arrays


def reduce_of(function, *arguments):
    import pickle

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps({"data": Call()}, 2)


def array_of(shape, dtype, content):
    import pickle

    class Array:
        def __reduce__(self):
            made_by = np.zeros(0).__reduce__()[0]
            return made_by, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, content)

    return pickle.dumps(Array(), 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (reduce_of(np.ndarray, (1 << 40,), np.dtype("u1")), "a call of numpy.ndarray"),  # would allocate
        (reduce_of(np.ndarray, (3,), np.dtype("O")), "a call of numpy.ndarray"),  # would hold what is no object
        (b"cnumpy\nndarray\n(K\x03tR.", "a call of numpy.ndarray"),
        (b"cnumpy\nndarray\n)\x81.", "the instruction NEWOBJ"),
        (b"cnumpy\ndtype\n}b.", "a state of dtype"),
        (b"cnumpy\ndtype\n.", "_Marker"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR.", "an array must be a call of"),
        (b"Nr\xff\xff\xff\xff.", "the instruction LONG_BINPUT"),  # a place in the memo far beyond the file
        (b"]q\x00h\x00a.", "containers may be nested 8 deep"),  # a list that holds itself
        (b"(" * 1000, ""),
        (b"\x80\x02cposix\nsystem\n.", "posix.system"),
        (array_of((1 << 40,), "u1", b"abc"), "an array must have a shape of sizes"),
        (array_of((-1,), "u1", b"abc"), "an array must have a shape of sizes"),
        (array_of(3, "u1", b"abc"), "an array must have a shape of sizes"),
        (array_of((4,), "u1", b"abc"), r"an array of shape \(4,\) must have as many bytes"),
        (array_of((3,), "O", [1, 2, 3]), "an array must be of numbers"),
    ],
)
def test_a_crafted_pickle_is_refused(content, reason):
    with pytest.raises(ValueError, match=f"batch must be a pickle of arrays and plain containers: {reason}"):
        unpickle_arrays("batch", content)


def test_arrays_of_objects_are_refused_and_of_numbers_read(monkeypatch):
    import pickle

    with pytest.raises(ValueError, match="must be of numbers, got the dtype 'O8'"):
        unpickle_arrays("batch", pickle.dumps(np.array([{}], object), 2))
    for array in (np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3))):
        np.testing.assert_array_equal(unpickle_arrays("batch", pickle.dumps(array, 2)), array)


@pytest.mark.parametrize(
    ("limit", "value", "message"), [("_LARGEST", 10, "at most 10 bytes"), ("_LONGEST", -1.0, "must come within")]
)
def test_a_download_is_bounded_in_size_and_time(monkeypatch, tmp_path, limit, value, message):
    class Response(dict):
        headers = {"Content-Length": None}  # noqa: RUF012
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731
        chunks = iter([b"x" * 11, b"x" * 11, b""])
        read1 = lambda self, size: next(self.chunks)  # noqa: E731

    def urlopen(_url, *, timeout):
        assert timeout == archives._TIMEOUT  # else a connection that is dead is waited for for ever
        return Response()

    monkeypatch.setattr(archives.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(archives, limit, value)
    archive = archives.Archive("http://127.0.0.1/set.tar.gz", "0")
    with pytest.raises(OSError, match=f"could not be downloaded: .*{message}"):
        archives.fetch(archive, tmp_path / "set", download=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_file_far_too_large_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"x" * 11)
    monkeypatch.setattr(archives, "_LARGEST", 10)
    with pytest.raises(ValueError, match=r"set.tar.gz must have at most 10 bytes, got 11: it is another file"):
        archives.fetch(
            archives.Archive("http://127.0.0.1/set.tar.gz", "0"), tmp_path / "set", download=False, progress=False
        )


def test_what_a_killed_download_leaves_goes_after_a_day(tmp_path):
    archive, old, new = (
        archives.Archive("http://127.0.0.1/set.tar.gz", "0"),
        *(tmp_path / f"set.tar.gz.{name}.part" for name in ("old", "new")),
    )
    for part in (old, new):
        part.mkdir()
        (part / "set.tar.gz").write_bytes(b"half")
    os.utime(old, (0, 0))
    (tmp_path / "set.tar.gz").write_bytes(b"another file")
    with pytest.raises(ValueError, match="must have the md5"):
        archives.fetch(archive, tmp_path / "set", download=False, progress=False)
    assert (old.exists(), new.exists()) == (False, True)
