"""The Triton kernels: in the interpreter, and when they are imported at all."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contract import gradient, make_pair
from distill import CosineLoss, KLLoss, LinearLoss, LogitLoss, ReverseKLLoss, SigmoidKLLoss, TopK
from distill._engine import kernels as engine
from distill._engine.rows import Rows
from distill.losses import _from_teacher, cosine, logit, reverse_kl, sigmoid_kl

WORKER = Path(__file__).parents[1] / "support/triton_worker.py"


def test_triton_kernels_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: `make triton` runs this file in an environment that has it")
    result = subprocess.run([sys.executable, WORKER], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_triton_is_asked_for_float32_on_a_gpu_only(monkeypatch):
    class OnGpu:
        is_cuda, device = True, torch.device("cuda:1")

    monkeypatch.setattr(engine, "_import_triton", lambda device: device)
    assert engine._kernels(torch.ones(2), torch.float32) is None
    assert engine._kernels(OnGpu, torch.float64) is None
    assert engine._kernels(OnGpu, torch.float32) == OnGpu.device


def test_triton_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "distill._engine.triton", None)  # makes its import fail
    assert engine._import_triton.__wrapped__(torch.device("cpu")) is None


def test_triton_must_run_before_it_is_used(monkeypatch):
    class Kernels:
        @staticmethod
        def scale(gradient, factor):
            if gradient.device.type == "meta":
                raise RuntimeError("Failed to find C compiler")
            gradient.mul_(factor)

    monkeypatch.setitem(sys.modules, "distill._engine.triton", Kernels)
    assert engine._import_triton.__wrapped__(torch.device("cpu")) is Kernels
    with pytest.warns(
        RuntimeWarning, match="Triton does not run on meta, .* blocks of rows: Failed to find C compiler"
    ):
        assert engine._import_triton.__wrapped__(torch.device("meta")) is None


def test_without_a_gpu_triton_is_not_even_imported(tmp_path, fresh):
    """It would look for a driver, and torch.compile in the same process for a GPU."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise RuntimeError('0 active drivers')")
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import distill
student, teacher = torch.randn(4096, 1024, requires_grad=True), torch.randn(4096, 1024)
for loss in (distill.LogitLoss(), distill.KLLoss(), distill.ReverseKLLoss()):
    value = loss(student, teacher)
    assert "Fused" in type(value.grad_fn).__name__
    (0.5 * value).backward()
heads = torch.nn.Linear(32, 3000), torch.nn.Linear(64, 3000)
for method in ("gram", "blocks", "logits"):
    loss = distill.LinearLogitLoss(*heads, method=method)
    (0.5 * loss(student[:, :32], teacher[:, :64])).backward()
assert "triton" not in sys.modules and "distill._engine.triton" not in sys.modules
import importlib.util
assert importlib.util.find_spec("triton").origin == sys.argv[1] + "/triton/__init__.py"
"""
    fresh.run(code, str(tmp_path))


def test_kernels_may_decline_and_scale_where_they_are(fused, monkeypatch):
    class Kernels:
        scaled = 0

        @staticmethod
        def run(kernel, *tensors, temperature):
            assert (kernel, temperature) == (KLLoss, 4.0)
            return False

        @classmethod
        def scale(cls, gradient, factor):
            cls.scaled += 1
            gradient.mul_(factor)

    student, teacher = make_pair(6, 10)
    expected = gradient(lambda s: 2 * KLLoss()(s, teacher), student)
    monkeypatch.setattr(engine, "_kernels", lambda x, dtype: Kernels)
    monkeypatch.setattr(KLLoss, "rows", Rows(_from_teacher._formula, block=_from_teacher._block, kernel=lambda: KLLoss))
    torch.testing.assert_close(gradient(lambda s: 2 * KLLoss()(s, teacher), student), expected)
    assert Kernels.scaled == 1


@pytest.mark.parametrize(
    ("loss", "rows"), [(_from_teacher, KLLoss.rows), (logit, LogitLoss.rows), (reverse_kl, ReverseKLLoss.rows)]
)
def test_a_loss_holds_its_kernel(monkeypatch, loss, rows):
    kernels = SimpleNamespace(kl=_from_teacher, logit=logit, reverse_kl=reverse_kl)
    monkeypatch.setitem(sys.modules, "distill._engine.triton", kernels)
    assert rows.kernel() is loss


@pytest.mark.parametrize("takes", [True, False])
def test_a_top_k_has_a_kernel_of_its_own_alone_and_inside_another_loss(fused, monkeypatch, takes):
    calls = []

    def run(formula, student, teacher, indices, values, factors, gradient, *, temperature):
        calls.append((teacher.shape, indices.shape, temperature, factors is None))
        assert not takes or formula(teacher, teacher, dim=-1, temperature=temperature).abs().max() < 1e-6
        if takes:
            values.fill_(3.0)
            if gradient is not None:
                gradient.copy_(factors.unsqueeze(-1).expand_as(gradient))
        return takes

    student, teacher = make_pair(3, 5, dtype=torch.float32)
    topk, head = TopK.of(teacher, 2), torch.nn.Linear(4, 5)
    labels, hidden = torch.tensor([0, -100, 2]), torch.ones(3, 4)

    def found():
        linear = LinearLoss(KLLoss(1.0), head, cross_entropy=0.5)
        return gradient(KLLoss(1.0), student, topk), linear(hidden, topk, labels).detach(), KLLoss(1.0)(teacher, topk)

    (slope, both, alone), kernels = found(), SimpleNamespace(scale=lambda gradient, factor: gradient.mul_(factor))
    monkeypatch.setitem(sys.modules, "distill._engine.triton_topk", SimpleNamespace(run=run))
    monkeypatch.setattr(engine, "_kernels", lambda x, dtype: kernels)
    wanted = (torch.full((3, 5), 1 / 3), 3.0 + 0.5 * linear_cross_entropy(head, hidden, labels), torch.tensor(3.0))
    torch.testing.assert_close(found(), wanted if takes else (slope, both, alone))
    wanted = [((3, 3), (3, 2), 1.0, without) for without in (False, False, True)]
    # What a kernel has declined as a whole is asked once more for each block.
    assert calls == (wanted if takes else [wanted[0], *wanted, wanted[2]])


def linear_cross_entropy(head, hidden, labels):
    return torch.nn.functional.cross_entropy(head(hidden), labels).detach()


@pytest.mark.parametrize(
    ("loss", "rows", "looks", "options"),
    [
        (_from_teacher, KLLoss.rows, "compare_rows", {"temperature": 2.0}),
        (reverse_kl, ReverseKLLoss.rows, "compare_rows", {"temperature": 2.0}),
        (sigmoid_kl, SigmoidKLLoss.rows, "far_rows", {"temperature": 2.0, "classes": "mean"}),
        (cosine, CosineLoss.rows, "not_ordinary", {}),
    ],
)
def test_blocks_on_a_gpu_without_a_kernel_look_at_no_value(fused, monkeypatch, loss, rows, looks, options):
    student, teacher = make_pair(6, 10)
    teacher[0, 3] = -torch.inf

    def call(s):
        return rows.reduced(s, teacher, dim=-1, reduction="mean", mask=torch.arange(6) % 5, **options)

    expected = call(student), gradient(call, student)
    monkeypatch.setattr(loss, "may_look", lambda x: False)
    monkeypatch.setattr(loss, looks, None)
    torch.testing.assert_close((call(student), gradient(call, student)), expected)


@pytest.mark.parametrize("takes", [True, False])
def test_a_loss_inside_another_takes_its_kernel(monkeypatch, takes):
    """As beside a cross-entropy or under a soft cap, where the whole has none."""

    class Kernels:
        @staticmethod
        def run(kernel, student, teacher, values, factors, gradient, *, temperature):
            assert (kernel, temperature) == (KLLoss, 2.0)
            if takes:
                values.fill_(3.0)
                if gradient is not None:
                    gradient.copy_(factors.unsqueeze(-1).expand_as(gradient))
            return takes

    monkeypatch.setattr(engine, "_kernels", lambda x, dtype: Kernels)
    block = Rows(_from_teacher._formula, block=_from_teacher._block, kernel=lambda: KLLoss).in_blocks()
    student, teacher = (x.detach().float() for x in make_pair(3, 5))
    factors, gradient, spare = torch.tensor([[1.0], [2.0], [3.0]]), torch.empty(3, 5), torch.empty(3, 5)
    values = block(student, teacher, factors, gradient, spare, temperature=2.0)
    assert (values == 3.0).all() == takes
    assert torch.equal(gradient, factors.expand(3, 5)) == takes
    expected = values if takes else _from_teacher._formula(student, teacher, dim=-1, temperature=2.0)
    torch.testing.assert_close(block(student, teacher, None, gradient, spare, temperature=2.0), expected)
