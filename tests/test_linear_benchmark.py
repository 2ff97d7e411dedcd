"""The benchmark of LinearLoss on tiny sizes, and the precision that its table rests on."""

import types

import pytest
import torch
from torch import nn

import linear_losses
import without_logits
from distill import AlphaBetaLoss, CrossEntropyLoss, JSLoss, KLLoss, LinearLoss, ReverseKLLoss, SkewKLLoss


def test_every_loss_and_both_peers(monkeypatch, capsys):
    calls = []

    class Liger:
        def __init__(self, hard, soft, *, beta, compiled):
            assert (hard, soft, compiled) == (0.0, 1.0, False)
            calls.append(("liger", beta))

        def __call__(self, student, weight, teacher, other, labels):
            return (student @ weight.T).mean()

    class Trl:
        @staticmethod
        def apply(student, weight, bias, teacher, other, other_bias, beta):
            calls.append(("trl", beta))
            return (student @ weight.T).mean(-1), None

    modules = {
        "liger_kernel.chunked_loss.jsd_loss": types.SimpleNamespace(LigerFusedLinearJSDLoss=Liger),
        "trl.kernels.chunked_divergence": types.SimpleNamespace(ChunkedDivergenceFunction=Trl),
    }
    monkeypatch.setattr(linear_losses.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(linear_losses.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(linear_losses, "SHAPES", ((6, 40, 4, 5),))
    monkeypatch.setattr(linear_losses, "settle_allocator", lambda: None)
    monkeypatch.setattr(linear_losses, "peak_extra_bytes", lambda step, device: step())  # None: not told
    linear_losses.main(["--shapes", "0", "--repetitions", "2", "--dtypes", "float32", "bfloat16"])
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert "liger-kernel 1.0, trl 1.0" in first
    assert [row.split(" | ")[1] for row in rows] == [*linear_losses.LOSSES] * 2
    assert {*calls} == {(peer, beta) for peer in ("liger", "trl") for beta in (0.0, 0.5, 1.0)}
    assert "|  |  |" in rows[1]  # no peer has the cross-entropy in the same pass
    calls.clear()
    monkeypatch.setattr(linear_losses, "PLAN", ((0, "float32", ("js",), 2),))
    monkeypatch.setattr(linear_losses, "_PEERS_UP_TO", 6 * 40 - 1)
    linear_losses.main([])
    assert [row.split(" | ")[1:4] for row in capsys.readouterr().out.splitlines()[3:]] == [["js", "float32", "2"]]
    assert calls == []  # too large for peers


@pytest.mark.parametrize("name", [name for name in linear_losses.LOSSES if name != "alpha_beta"])
def test_the_formed_way_computes_the_loss(name):
    case, generator = linear_losses.LOSSES[name], torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 40, generator=generator)
    torch.testing.assert_close(case.formed(student, teacher), case.ours(student, teacher))


def test_absent_peers_are_said_to_be_absent(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(linear_losses.importlib, "import_module", missing)
    assert linear_losses.load_peers()[0] == {}
    assert all("absent (ModuleNotFoundError: No module named" in words for words in linear_losses.load_peers()[1])


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(
    "loss", [KLLoss(1.0), KLLoss(4.0), ReverseKLLoss(), JSLoss(), SkewKLLoss(), AlphaBetaLoss(0.5, 0.5)], ids=repr
)
def test_float32_against_float64(loss, share):
    """Values within 1e-6 and gradients within 5e-6 of float64, relative to their size."""
    generator = torch.Generator().manual_seed(0)
    heads = [nn.Linear(width, 3000) for width in (32, 64)]
    states = [torch.randn(48, width, generator=generator) for width in (32, 64)]
    with torch.no_grad():
        for parameter in (parameter for head in heads for parameter in head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    labels = torch.randint(3000, (48,), generator=generator)
    student = states[0].requires_grad_()
    linear = LinearLoss(loss, *heads, cross_entropy=share, rows=20)
    value = linear(student, states[1], labels)
    found = torch.autograd.grad(value, (student, heads[0].weight, heads[0].bias))
    exact = [x.detach().double().requires_grad_() for x in (student, heads[0].weight, heads[0].bias)]
    logits = nn.functional.linear(*exact)
    formed = loss(
        logits, nn.functional.linear(states[1].double(), *(p.detach().double() for p in heads[1].parameters()))
    )
    formed = formed + share * CrossEntropyLoss()(logits, labels)
    assert abs(value.double() - formed) <= 1e-6 * formed
    for got, expected in zip(found, torch.autograd.grad(formed, exact), strict=True):
        assert (got.double() - expected).norm() <= 5e-6 * expected.norm()


def test_the_recipe_without_logits_gives_the_same_loss(monkeypatch, capsys):
    monkeypatch.setattr(without_logits, "settle_allocator", lambda: None)
    monkeypatch.setattr(without_logits, "peak_extra_bytes", lambda step, device: step())  # None: not told
    without_logits.main(["--tokens", "2", "6", "--vocabulary", "40", "--widths", "8", "16", "--repetitions", "2"])
    _, loss, memory, time = capsys.readouterr().out.splitlines()
    formed, without = (float(word) for word in loss.split() if word[0].isdigit())
    assert abs(formed - without) < 1e-5
    assert memory.startswith("memory unknown with logits, unknown without; gradients are 0 MB")
    assert time.startswith("time with logits / without: ")
