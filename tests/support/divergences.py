"""What the divergences of softened distributions promise beyond the contract: for their own test files."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from contract import gradient, make_pair
from distill._engine import fused

INF = math.inf
# Classes of which the student, the teacher or both say that they have no chance; row 3 is whole.
OF_STUDENT = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
NOBODY = torch.zeros(4, 6, dtype=torch.bool)
OF_TEACHER = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()


def assert_knows_zeros(
    build: Callable[..., nn.Module],
    reference: Callable[[Any, Any], Any],
    *,
    infinite: tuple[bool, bool] = (False, False),
) -> None:
    """A logit of -inf is a probability of 0, on either side and on both.

    Args:
        build: Gives the loss.
        reference: Gives the values of logits in NumPy, where 0 times the logarithm of 0 is 0.
        infinite: Whether the divergence is infinite where the student alone and where the teacher alone has a 0.
    """
    student, teacher = make_pair(4, 6)
    values_of, mean = build(reduction="none"), build()
    for ours, theirs in (
        (OF_STUDENT, OF_TEACHER),
        (OF_STUDENT, OF_STUDENT),
        (NOBODY, OF_TEACHER),
        (OF_STUDENT, NOBODY),
    ):
        hidden = student.detach().masked_fill(ours, -INF), teacher.masked_fill(theirs, -INF)
        far = student.detach().masked_fill(ours, -1e5), teacher.masked_fill(theirs, -1e5)
        none = (infinite[0] & (ours & ~theirs).any(-1)) | (infinite[1] & (theirs & ~ours).any(-1))
        values = values_of(*hidden)
        expected = torch.as_tensor(reference(*(x.numpy() for x in hidden)))
        assert torch.equal(values == INF, none)
        torch.testing.assert_close(values[~none], expected[~none], rtol=1e-12, atol=1e-12)
        # Where it is finite, all that changes is that the gradient at a probability of 0 is 0.
        kept = ~none
        if kept.any():
            slope = gradient(mean, hidden[0][kept], hidden[1][kept])
            torch.testing.assert_close(slope, gradient(mean, far[0][kept], far[1][kept]), rtol=1e-12, atol=1e-12)
            assert slope[ours[kept]].abs().sum() < 1e-15
            hessian = torch.autograd.functional.hessian(lambda s, t=hidden[1][kept]: mean(s, t), hidden[0][kept])
            assert hessian.isfinite().all()
        low = [x.float() for x in hidden]
        torch.testing.assert_close(values_of(*low), values.float(), rtol=1e-5, atol=1e-6)
        if kept.any():
            assert gradient(mean, low[0][kept], low[1][kept]).isfinite().all()
    # A class that neither gives a chance might as well not be there.
    dead = torch.full((4, 2), -INF, dtype=torch.float64)
    more = [torch.cat([x.detach(), dead], 1) for x in (student, teacher)]
    torch.testing.assert_close(values_of(*more), values_of(student, teacher), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient(mean, *more)[:, :6], gradient(mean, student, teacher), rtol=1e-13, atol=1e-15)


def assert_shows_nan(loss: nn.Module) -> None:
    """A logit that is no number shows, beside probabilities of 0 too."""
    student, teacher = make_pair(2, 6)
    for side in (0, 1):
        pair = [student.detach().clone(), teacher.clone()]
        pair[side][0, 0] = math.nan
        pair[1 - side][0, :2] = -INF
        assert loss(*pair).isnan()


def assert_keeps_digits(build: Callable[..., nn.Module], *, temperatures: bool = True) -> None:
    """In float32 values near agreement are right to a few digits, and never negative."""
    cases = [(50257, 4.0, 1e-2), (10, 1000.0, 1.0)] if temperatures else []
    for classes, temperature, apart in [*cases, (100, 4.0, 1e-1), (10, 1.0, 1e-3)]:
        teacher = 2 * make_pair(3, classes, dtype=torch.float32)[1]
        student = teacher + apart * make_pair(3, classes, seed=1, dtype=torch.float32)[1]
        loss = build(temperature=temperature, reduction="none")
        torch.testing.assert_close(
            loss(student, teacher).double(), loss(student.double(), teacher.double()), rtol=5e-3, atol=0
        )
    teacher = make_pair(200, 10, dtype=torch.float32)[1]
    apart = torch.tensor([0.0, 1e-8, 1e-7, 1e-6, 1e-5])[:, None, None]
    with mock.patch.object(fused, "_block_elements", return_value=500):  # a row's value does not depend on its block
        assert (build(reduction="none")(teacher * (1 + apart), teacher.expand(5, -1, -1).contiguous()) >= 0).all()


def assert_hessian_where_equal(
    build: Callable[..., nn.Module], scale: float, *, power: float = 1.0, temperature: float = 1.0
) -> None:
    """Where student and teacher agree, the second derivative is the closed form, whatever PyTorch does at ties.

    A divergence f(p, q) = sum of phi(p, q) has there, in the logits, scale times J diag(p^(power - 2)) J with
    J = diag(p) - p p'.
    """
    logits = make_pair(1, 5)[1][0]
    p = (logits / temperature).softmax(-1)
    jacobian = torch.diag(p) - p[:, None] * p
    with NoTies():
        hessian = torch.autograd.functional.hessian(lambda s: build()(s[None], logits[None]), logits.clone())
    torch.testing.assert_close(hessian, scale * jacobian @ torch.diag(p ** (power - 2)) @ jacobian)


class NoTies(TorchFunctionMode):
    """Fails where a gradient would rest on what PyTorch makes of a tie, which changed between its versions."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if (
            first is not None
            and torch.is_grad_enabled()
            and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            bounds: list[Any] = []
            if name in ("abs", "relu", "sign", "hardtanh", "leaky_relu"):
                bounds = [0.0]
            elif name in ("clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum"):
                bounds = [b for b in (*args[1:], *kwargs.values()) if isinstance(b, (int, float, Tensor))]
            elif name in ("amax", "amin", "max", "min", "aminmax"):
                raise AssertionError(f"{name} of what wants a gradient may have ties")
            assert not any(bool((first == bound).any()) for bound in bounds), f"{name} at a tie"
        return function(*args, **kwargs)


def assert_light(loss: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of large inputs hold little beyond the gradient: at most 1.6 times the student in all."""
    monkeypatch.setattr(fused, "_block_elements", lambda device: 2**12)
    student, teacher = make_pair(64, 2**12, dtype=torch.float32)
    peak = peak_bytes(lambda: loss(student, teacher).backward())
    assert student.numel() * 4 <= peak <= 1.6 * student.numel() * 4


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that a function's tensors took at a time."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
