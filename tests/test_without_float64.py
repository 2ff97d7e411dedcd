"""What runs on a device without float64, such as MPS: another one, and a rule against float64 there; and with it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill import (
    Distiller,
    HintLoss,
    KLLoss,
    Term,
    balance,
    calibrate,
    gradient_report,
    gradients,
    ofd_margin,
    rkd_loss,
)
from distill._merged import exact
from distill.losses import ofd, rkd
from models import Net, batch


class No64(TorchDispatchMode):
    """Refuses float64 on a type of device."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 and leaf.device.type == self.kind:
                raise TypeError(f"{self.kind} must have no float64, got {function}")
        return made


def test_what_needs_the_digits_is_computed_on_the_cpu(monkeypatch):
    moved = SimpleNamespace(device=torch.device("mps"), cpu=lambda: torch.ones(2))
    assert torch.equal(exact(moved), torch.ones(2, dtype=torch.float64))
    for module in (ofd, rkd):  # the meta device in place of MPS
        monkeypatch.setattr(module, "exact", lambda tensor: torch.ones(tensor.shape, dtype=torch.float64))
    features, norm = torch.ones(4, 3, device="meta"), torch.ones(3, device="meta")
    with No64("meta"):
        with pytest.raises(TypeError, match="meta must have no float64"):
            features.double()
        value, margin = rkd_loss(features, features), ofd_margin(norm, norm)
    assert (value.device.type, value.dtype) == ("meta", torch.float32)
    assert (margin.device.type, margin.dtype, margin.shape) == ("meta", torch.float32, (3,))


def test_gradients_are_measured_in_float32(monkeypatch):
    distiller = Distiller(Net(seed=1), Net(width=16), {"kl": KLLoss(), "hint": Term(HintLoss(8, 16), at="body")})
    shares = {"task": 0.5, "kl": 0.3, "hint": 0.2}
    for module in (balance, gradients):
        monkeypatch.setattr(module, "wide", torch.Tensor.float)  # as on MPS
    with No64("cpu"):
        calibrate(distiller, [batch(8)], shares, by="value")
        calibrate(distiller, [batch(8)], shares)
        report = gradient_report(distiller(*batch(8)), distiller.student)
    assert {name: entry.share for name, entry in report.items()} == pytest.approx(shares, rel=1e-4)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_a_gradient_that_one_process_lacks_is_sent_in_the_dtype_of_the_others(monkeypatch, dtype, expected):
    monkeypatch.setattr(balance, "_processes", lambda: 2)
    monkeypatch.setattr(balance.dist, "all_reduce", lambda tensor, op=None: tensor.fill_(1))
    (averaged,) = balance._averaged([None], [torch.ones(2, dtype=dtype)])
    assert averaged.dtype == expected
