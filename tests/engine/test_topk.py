"""The block of k + 1 classes against its formula, and what it may not cost."""

import pytest
import torch

from contract import gradient, make_pair
from distill import KLLoss, TopK, create_loss
from distill._engine import fused as engine
from divergences import peak_bytes
from rowwise import is_fused

LOSSES = {
    "kl": {},
    "reverse_kl": {},
    "js": {},
    "skew_kl": {},
    "skew_reverse_kl": {},
    "tvd": {},
    "alpha_beta": {"alpha": 0.3, "beta": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
@pytest.mark.parametrize("name", LOSSES)
def test_large_inputs_take_blocks_and_give_the_same(name, dtype, monkeypatch):
    student, teacher = make_pair(12, 40, dtype=dtype)
    topk = TopK.of(teacher, 4)
    mask = torch.arange(12) % 5 * 0.5
    for reduction in ("mean", "none"):
        loss = create_loss(name, **LOSSES[name], temperature=1.0, reduction=reduction)
        plain = loss(student, topk, mask=mask)
        slope = gradient(lambda s, loss=loss: loss(s, topk, mask=mask).sum(), student.double())
        with monkeypatch.context() as patch:
            patch.setattr(engine, "SMALL", 0)
            patch.setattr(engine, "_block_elements", lambda device: 90)
            value = loss(student, topk, mask=mask)
            assert is_fused(value)
            assert not is_fused(plain)
            torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-6)
            (found,) = torch.autograd.grad(value.sum(), student)
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.half: 2**-9}[dtype]
            torch.testing.assert_close(found.double(), slope, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_classes_of_one_map_may_lie_in_front(name, monkeypatch):
    student, teacher = make_pair(1, 9, 3, 4)
    for samples in (0, 2) if name == "kl" else (0,):
        topk = TopK.of(teacher.movedim(1, -1), 4, samples=samples)
        loss = create_loss(name, **LOSSES[name], temperature=1.0, dim=1)
        plain = gradient(loss, student, topk)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "SMALL", 0)
            patch.setattr(engine, "_block_elements", lambda device: 40)
            assert is_fused(loss(student, topk))
            torch.testing.assert_close(gradient(loss, student, topk), plain, rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
@pytest.mark.parametrize("samples", [0, 4])
def test_holds_nothing_of_the_students_size_but_the_gradient(samples, monkeypatch):
    monkeypatch.setattr(engine, "SMALL", 0)
    monkeypatch.setattr(engine, "_block_elements", lambda device: 2**13)
    student, teacher = make_pair(64, 2**13, dtype=torch.float32)
    topk = TopK.of(teacher, 32, samples=samples)
    size = student.numel() * 4
    names = ["kl"] if samples else ["reverse_kl", "js", "alpha_beta"]
    for name in names:
        loss = create_loss(name, **LOSSES[name], temperature=1.0)
        assert size <= peak_bytes(lambda loss=loss: loss(student, topk).backward()) <= 1.1 * size
        student.grad = None
        with torch.no_grad():
            assert peak_bytes(lambda loss=loss: loss(student, topk)) <= 0.1 * size


def test_making_one_holds_nothing_of_the_teachers_size(monkeypatch):
    monkeypatch.setattr("distill._merged._BLOCK", 2**13)
    teacher = make_pair(64, 2**12, dtype=torch.float32)[1]
    size = teacher.numel() * 4
    assert peak_bytes(lambda: TopK.of(teacher, 32, samples=4)) <= 0.2 * size
    topk = TopK.of(teacher, 32)
    assert peak_bytes(lambda: topk.gather(teacher)) <= 0.2 * size


def test_rows_that_softmax_cannot_do_are_done_by_the_formula(monkeypatch):
    student, teacher = make_pair(6, 20, dtype=torch.float32)
    topk = TopK.of(teacher, 3)
    rows = student.detach().clone()
    rows[1].scatter_(0, topk.indices[1], 300.0)  # nothing is left for the rest
    rows[3].scatter_(0, topk.indices[3], -300.0)  # nor for what is given
    rows.requires_grad_()
    exact = KLLoss(1.0)(rows.double(), topk), gradient(KLLoss(1.0), rows.double(), topk)
    monkeypatch.setattr(engine, "SMALL", 0)
    torch.testing.assert_close(KLLoss(1.0)(rows, topk).double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(KLLoss(1.0), rows, topk).double(), exact[1], rtol=1e-5, atol=1e-7)
