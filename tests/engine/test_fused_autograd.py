"""The fused losses as a part of autograd: backward, hooks, transforms, and what it must notice."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from contract import gradient, make_pair
from distill import KLLoss, LogitLoss, kl_loss, logit_loss
from distill._engine import fused as engine
from distill._reduction import REDUCTIONS
from distill.losses import _from_teacher
from rowwise import LOSSES, is_fused


@pytest.mark.parametrize("factor", [0.1, 1 / 3, -700.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
def test_factor_from_above_is_not_rounded_to_the_students_dtype(fused, dtype, factor):
    student, teacher = make_pair(64, 1024, dtype=dtype)
    ours = gradient(lambda s: factor * LogitLoss()(s, teacher), student).double()
    exact = factor * 2 * (student.detach().double() - teacher.double()) / (64 * 1024)
    # 0.1 in bfloat16 is 0.10010: every element would be 0.1 % too large. Roundings of the elements cancel in the sum.
    assert abs((ours * exact).sum() / (exact * exact).sum() - 1) < (1e-6 if dtype == torch.float32 else 1e-4)


def test_gradient_in_half_survives_until_the_scaler(fused):
    student = torch.full((2, 2**15), 1e-3, dtype=torch.half, requires_grad=True)
    (LogitLoss()(student, torch.zeros_like(student)) * 2**16).backward()  # 2^16 * 2 * 1e-3 / 2^16; unscaled: 3e-8
    torch.testing.assert_close(student.grad, torch.full_like(student, 2e-3))


@pytest.mark.parametrize("loss", [LogitLoss(), KLLoss()])
def test_backward_twice_gives_the_same_and_leaves_the_first_alone(fused, loss):
    student, teacher = make_pair(6, 10)
    value = loss(student, teacher)
    (first,) = torch.autograd.grad(value, student, torch.tensor(3.0).double(), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, student, torch.tensor(3.0).double(), retain_graph=True)
    first.zero_()
    (third,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(second, kept)
    torch.testing.assert_close(3 * third, kept)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward(fused, loss, reduction):
    rows, options = LOSSES[loss]
    student, teacher = make_pair(4, 5)
    for mask in (None, torch.tensor([1.0, 0.0, 2.0, 0.5]).double()):
        full = {**options, "dim": -1, "reduction": reduction, "mask": mask}

        def call(s, options=full):
            return rows.reduced(s, teacher, **options)

        assert is_fused(call(student))
        assert torch.autograd.gradcheck(call, student)
        assert torch.autograd.gradgradcheck(call, student)


@pytest.mark.parametrize("which", ["student", "teacher", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_change_in_place_before_backward_is_noticed(fused, which, reduction):
    student, teacher = make_pair(6, 10)
    tensors = {"student": student * 1, "teacher": teacher, "mask": torch.ones(6, dtype=torch.float64)}
    value = LogitLoss(reduction=reduction)(tensors["student"], tensors["teacher"], mask=tensors["mask"])
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_weights_that_learn_get_their_gradient(fused):
    student, teacher = make_pair(6, 10)
    weights = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ours = torch.autograd.grad(KLLoss()(student, teacher, mask=weights), (student, weights))
    values = _from_teacher._formula(student, teacher, dim=-1, temperature=4.0)
    theirs = torch.autograd.grad((weights * values).sum() / weights.sum(), (student, weights))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss", LOSSES)
def test_activation_checkpointing(fused, loss):
    rows, options = LOSSES[loss]
    student, teacher = make_pair(6, 10)
    options = {**options, "dim": -1, "reduction": "mean", "mask": torch.arange(6) % 2}

    def call(s):
        return rows.reduced(s * 2, teacher, **options)

    expected = gradient(call, student)
    for reentrant in (False, True):
        student.grad = None
        checkpoint(call, student, use_reentrant=reentrant).backward()
        torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_hooks_on_saved_tensors_see_the_inputs_and_nothing_of_the_blocks(fused, loss):
    rows, options = LOSSES[loss]
    student, teacher = make_pair(6, 10)
    mask = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packed, unpacked = [], []

    def unpack(x):
        unpacked.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.detach(), unpack):
        value = rows.reduced(student, teacher, dim=-1, reduction="sum", mask=mask, **options)
    assert [x.data_ptr() for x in packed] == [x.data_ptr() for x in (student, teacher, mask)]
    assert unpacked == []
    value.backward()
    assert len(unpacked) == 3


def test_a_gradient_times_one_is_not_written_again():
    gradient = torch.ones(3)
    engine.scale(gradient, torch.tensor(1.0))
    assert gradient._version == 0
    engine.scale(gradient, torch.tensor(2.0))
    assert gradient.tolist() == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:.torch.jit")  # forward-mode's own imports
def test_transforms_and_tracing_get_the_plain_form(fused):
    student, teacher = make_pair(6, 10)
    expected = gradient(LogitLoss(), student, teacher)
    hessian = torch.func.hessian(lambda s: LogitLoss()(s, teacher))(student.detach())
    torch.testing.assert_close(hessian.view(60, 60), torch.eye(60).double() * 2 / 60)
    jacobian = torch.func.jacrev(lambda s: logit_loss(s, teacher))(student.detach())
    torch.testing.assert_close(jacobian.sum(0) / 6, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), torch.ones_like(teacher))
        tangent = forward_ad.unpack_dual(LogitLoss()(dual, teacher)).tangent
    torch.testing.assert_close(tangent, expected.sum())
    exported = torch.export.export(LogitLoss(), (student, teacher)).module()
    torch.testing.assert_close(exported(student, teacher), LogitLoss()(student, teacher))
    assert LogitLoss()(student.to("meta"), teacher.to("meta")).shape == ()


def test_an_option_of_a_function_that_learns_gets_its_gradient(fused):
    student, teacher = make_pair(6, 10)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kl_loss(student.detach(), teacher, temperature=t), temperature)


def test_subclasses_of_tensor_stay_what_they_are(fused):
    class Sub(torch.Tensor):
        pass

    student, teacher = make_pair(6, 10)
    assert type(LogitLoss()(student.as_subclass(Sub), teacher)) is Sub
    assert type(LogitLoss()(student, teacher.as_subclass(Sub))) is Sub
    assert is_fused(LogitLoss()(torch.nn.Parameter(student.detach()), teacher))
