"""What a writer and a stored teacher refuse, and what a writer shows while it writes."""

import io
import math
import os
import sys

import pytest
import torch

from distill import (
    Distiller,
    KLLoss,
    StoredTeacher,
    TeacherOutput,
    TeacherWriter,
    TopK,
    record,
)
from models import Net
from stored import integers, random, write

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def rejects(tmp_path, error, message, ids, output, tokens=None, *, mask=None, before=None, **options):
    with TeacherWriter(tmp_path, **options) as writer:
        if before is not None:
            writer.add(*before)
        with pytest.raises(error, match=message):
            writer.add(ids, output, tokens, mask=mask)
        assert len(writer) == (0 if before is None else len(before[0]))  # what was refused is not half added


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one, got"),
        ([0.5, 1.0], "got torch.float32"),
        ([[0, 1, 2]], r"got torch.int64 of shape \(1, 3\)"),
        (torch.tensor(3), r"of shape \(\)"),
        (["a", "b"], r"ids must be integers \(N,\), or pairs"),
        ([True], "got torch.bool"),
        ([3, 3], r"ids must differ, got 3 2 times"),
    ],
)
def test_rejects_what_are_no_ids(tmp_path, ids, message):
    rejects(tmp_path, ValueError, message, ids, random(2, 5))


REFUSED = {
    "samples": (ValueError, r"output must be \(N, ...\) for the 2 ids, got shape \(3, 5\)", random(3, 5), {}),
    "scalar": (ValueError, r"for the 2 ids, got shape \(\)", random(1)[0], {}),
    "dtype": (ValueError, "must be float16, bfloat16 or float32, got torch.float64", random(2, 5).double(), {}),
    "integers": (ValueError, "must be floating-point, got torch.int64", integers(3, 2, 5), {"dtype": torch.float16}),
    "nan": (ValueError, "must have no NaN", torch.full((2, 5), math.nan), {}),
    "nan in k": (ValueError, "NaN|sum to", torch.full((2, 5), math.nan), {"k": 2}),
    "range": (
        ValueError,
        r"must fit into torch.float16, got values to 100000",
        torch.full((2, 5), 1e5),
        {"dtype": torch.half},
    ),
    "kind": (TypeError, "must be a tensor, a TopK, a list .* got tuple", (random(2, 5),), {}),
    "nothing": (ValueError, "must be something to store", TeacherOutput(), {}),
    "root": (ValueError, "must have the path of a module in the model", TeacherOutput(None, {"": random(2, 5)}), {}),
    "method": (ValueError, "got 'ids.0'", TeacherOutput(None, {"ids.0": random(2, 5)}), {}),
    "feature": (TypeError, "feature/fc must be a tensor, or a list .*, got str", TeacherOutput(None, {"fc": "x"}), {}),
    "feature top-k": (
        TypeError,
        "only the output may be a TopK",
        TeacherOutput(None, {"fc": TopK.of(random(2, 5), 2)}),
        {},
    ),
    "no vocabulary": (ValueError, "vocabulary must be given to store a TopK", TopK.of(random(2, 5), 2), {}),
    "vocabulary": (ValueError, "classes of the vocabulary, 6, got 5", random(2, 5), {"k": 2, "vocabulary": 6}),
    "classes": (ValueError, "classes from 0 to 1, got", TopK.of(random(2, 5), 4), {"vocabulary": 2}),
    "too many": (ValueError, "k must be at most the number of classes, 5, got 6", random(2, 5), {"k": 6}),
    "no classes": (ValueError, r"with k the output must be logits .* got shape \(2,\)", random(2), {"k": 1}),
    "k": (ValueError, "writer's k=3 and temperature=1.0, got k=2", TopK.of(random(2, 5), 2), {"k": 3, "vocabulary": 5}),
    "temperature": (
        ValueError,
        "got k=2 and temperature=2.0",
        TopK.of(random(2, 5), 2, temperature=2.0),
        {"vocabulary": 5},
    ),
    "dense vocabulary": (ValueError, "classes of the vocabulary, 6, got 5", random(2, 5), {"vocabulary": 6}),
    "k for nothing": (ValueError, "got k=3 and temp", TeacherOutput(None, {"fc": random(2, 5)}), {"k": 3}),
    "temperature for nothing": (ValueError, "got k=None and temperature=2.0", random(2, 5), {"temperature": 2.0}),
    "dtype for nothing": (ValueError, "dtype must have a tensor", random(2, 5), {"dtype": torch.float16, "k": 2}),
    "short list": (ValueError, r"for each of the 2 ids, got 1 of \['Tensor'\]", [random(2, 5)], {}),
    "mixed list": (
        ValueError,
        r"got 2 of \['TopK', 'Tensor'\]|got 2 of \['Tensor', 'TopK'\]",
        [TopK.of(random(2, 5), 2), random(2, 5)],
        {},
    ),
    "unlike list": (
        ValueError,
        r"alike but for a T of at least 1, got \[\(4,\), \(5,\)\]",
        [random(2, 5), random(2, 4)],
        {},
    ),
    "empty list": (ValueError, "alike but for a T of at least 1", [random(2, 5), random(0, 5)], {}),
    "temperatures": (
        ValueError,
        "must have one temperature",
        [TopK.of(random(2, 5), 2, temperature=t) for t in (1.0, 2.0)],
        {"vocabulary": 5},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejects_outputs(tmp_path, case):
    error, message, output, options = REFUSED[case]
    rejects(tmp_path, error, message, [0, 1], output, **options)


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        ("text", None, TypeError, "tokens must be a tensor, got str"),
        (torch.zeros(3, 4), None, ValueError, r"tokens must be \(N, ...\) for the 2 ids, got shape \(3, 4\)"),
        ([torch.zeros(3)], None, ValueError, "tokens must be one tensor for each of the 2 ids, got 1"),
        ([[1], [2]], None, TypeError, "tokens must be a tensor, got list"),
        (None, [[1, 1]], TypeError, "mask must be a tensor, got list"),
        (None, torch.ones(2, 3), ValueError, r"mask must be bools or integers \(N, T\) .* got torch.float32"),
        (None, torch.ones(3, 3).bool(), ValueError, r"for the 2 ids, got torch.bool of shape \(3, 3\)"),
        (None, torch.tensor([[1, 1], [0, 0]]), ValueError, "must leave a position of every sample"),
        (
            torch.zeros(2, 4).long(),
            torch.ones(2, 3).bool(),
            ValueError,
            r"the same \(N, T\), got \(2, 4\) and \(2, 3\)",
        ),
    ],
)
def test_rejects_tokens_and_masks(tmp_path, tokens, mask, error, message):
    rejects(tmp_path, error, message, [0, 1], random(2, 3, 5), tokens, mask=mask)


def test_rejects_what_is_unlike_what_was_added_before(tmp_path):
    before = ([0, 1], TeacherOutput(random(2, 5), {"fc": random(2, 3)}))
    cases = [
        (TeacherOutput(random(2, 5)), r"feature/fc must be tensor \(3\) of float32, got None"),
        (
            TeacherOutput(random(2, 5), {"fc": random(2, 4)}),
            r"feature/fc must be tensor \(3\) of float32, got tensor \(4\)",
        ),
        (TeacherOutput(random(2, 5), {"fc": random(2, 3).half()}), r"got tensor \(3\) of float16"),
        (TeacherOutput(random(2, 5), {"fc": [random(2, 3)] * 2}), r"got tensor \(T, 3\) of float32"),
        (
            TeacherOutput(random(2, 5), {"fc": random(2, 3), "x": random(2, 1)}),
            r"feature/x must be None, got tensor \(1\)",
        ),
    ]
    for at, (output, message) in enumerate(cases):
        rejects(tmp_path / str(at), ValueError, message, [2, 3], output, before=before)
    rejects(tmp_path / "ids", ValueError, "ids must be 1, got 2", [[2, 0], [3, 0]], before[1], before=before)
    rejects(
        tmp_path / "tokens",
        ValueError,
        "tokens must be False, got True",
        [2, 3],
        before[1],
        random(2, 3),
        before=before,
    )


def test_rejects_options_and_use_after_the_end(tmp_path, monkeypatch):
    for options, message in (
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"vocabulary": -1}, "vocabulary must be a positive integer"),
        ({"shard_bytes": 0}, "shard_bytes must be a positive integer"),
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherWriter(tmp_path, **options)
    with pytest.raises(TypeError, match="the model must be an nn.Module, got int"):
        TeacherWriter(tmp_path, model=3)
    writer = TeacherWriter(tmp_path)
    writer.close()
    with pytest.raises(ValueError, match="a writer must be open, got one that was closed"):
        writer.add([0], random(1, 5))
    writer = TeacherWriter(tmp_path)
    writer.add([0], random(1, 5))
    with monkeypatch.context() as context:
        context.setattr(os, "getpid", lambda: 1)
        for use in (lambda: writer.add([1], random(1, 5)), writer.flush, writer.close):
            with pytest.raises(ValueError, match="must be used by the process that made it, got a fork: make one here"):
                use()
    writer.close()
    assert StoredTeacher(tmp_path).ids().tolist() == [0]


def test_a_writer_without_safetensors_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'TeacherWriter needs safetensors: pip install "distill\[store\]"'):
        TeacherWriter(tmp_path)


def test_rejects_questions(tmp_path):
    asked = write(tmp_path, [3, 8], random(2, 5))
    with pytest.raises(KeyError, match=r"got 4, one of 2 that are not; .* has 2 samples, from 3 to 8"):
        asked([3, 4, 9])
    with pytest.raises(ValueError, match=r"ids in .* are samples \(N,\), got pairs"):
        asked([[3, 0]])
    with pytest.raises(ValueError, match="ids must be integers"):
        Distiller(Net(), asked, KLLoss())(random(2, 6), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"must be asked with ids \(teacher_inputs=ids\), got input_ids"):
        asked(input_ids=torch.zeros(1, 3))
    with pytest.raises(TypeError, match="got nothing"):
        asked()


def test_record_keeps_what_taps_see_and_rejects_what_they_reject():
    model = Net(inplace=True).eval()
    output, features = record(model, (random(4, 6),), ["body.1", "fc:input", "body.1"])
    assert torch.equal(output, model(random(4, 6)))
    assert list(features) == ["body.1", "fc:input"]
    assert (features["body.1"] < 0).any()  # before the ReLU changed it in place
    assert not output.requires_grad
    with pytest.raises(TypeError, match="the model must be an nn.Module, got function"):
        record(random, random(4, 6))
    with pytest.raises(ValueError, match="must name a module of the teacher, got 'head'"):
        record(model, random(4, 6), ["head"])
    with pytest.raises(ValueError, match=r"must be in eval mode \(model.eval\(\)\), got training mode"):
        record(model.train(), random(4, 6))


# --- the progress line ---


def test_a_progress_line_stands_on_a_terminal_only(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    seen = {}
    for name, stream, progress in (
        ("terminal", Terminal(), None),
        ("file", io.StringIO(), None),
        ("asked", io.StringIO(), True),
        ("not asked", Terminal(), False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("distill._store.progress.time.monotonic", iter(range(10)).__next__)
        with TeacherWriter(tmp_path / name, total=3 if progress is None else None, progress=progress) as writer:
            writer.add([0, 1], random(2, 5))
        seen[name] = stream.getvalue()
    assert seen["file"] == seen["not asked"] == ""
    assert seen["terminal"].startswith("\r2 of 3 (67%) samples, 0.0 MB written, 2 samples/s")
    assert seen["terminal"].endswith("  \n")
    assert seen["asked"].startswith("\r2 samples, ")
