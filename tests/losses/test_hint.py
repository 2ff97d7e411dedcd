"""HintLoss against the mean squared error of RepDistiller, and its learned map against Romero et al. (2015)."""

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import HintLoss, hint_loss


def reference(student, teacher, weight=None, bias=None):
    """Mean squared error per sample of maps (N, C, H, W), the student through a linear map at each position."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        if weight is not None:
            s = np.array([sum(w * channel for w, channel in zip(row, s, strict=True)) for row in weight])
            s = s + bias[:, None, None]
        values.append(((s - t) ** 2).sum() / t.size)
    return np.array(values)


def make_loss(student_channels, teacher_channels, **options):
    """A HintLoss with a learned map that is the same each time."""
    loss = HintLoss(student_channels, teacher_channels, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return loss


def numbers(loss):
    return [parameter.detach().double().numpy() for parameter in (loss.regressor.weight, loss.regressor.bias)]


@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (2, 1, 1, 1)])
def test_matches_reference_on_equal_channels(shape):
    student, teacher = make_pair(*shape)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(hint_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    for loss in (HintLoss(), HintLoss(shape[1], shape[1])):
        assert loss.regressor is None
        torch.testing.assert_close(loss(student, teacher).detach(), expected.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "teacher_channels"), [(2, 5), (5, 2)])
def test_matches_reference_through_the_learned_map(channels, teacher_channels):
    student, teacher = make_pair(5, channels, 3, 4, teacher_shape=(5, teacher_channels, 3, 4))
    loss = make_loss(channels, teacher_channels, reduction="none")
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), *numbers(loss)))
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3), (4, 2, 3), (2, 3, 2, 2, 3), (3,)])
def test_matches_reference_on_vectors(shape):
    student, teacher = make_pair(*shape, teacher_shape=(*shape[:-1], 5))
    loss = make_loss(3, 5, reduction="none")
    flat = [x.detach().numpy().reshape(-1, x.shape[-1], 1, 1) for x in (student, teacher)]
    expected = torch.from_numpy(reference(*flat, *numbers(loss))).reshape(shape[:-1])
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    flat[1] = flat[1][:, :3]
    expected = torch.from_numpy(reference(*flat)).reshape(shape[:-1])
    torch.testing.assert_close(hint_loss(student, teacher[..., :3]).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "build"), [(3, HintLoss), (5, lambda **options: make_loss(3, 5, **options))])
def test_the_larger_map_is_average_pooled(channels, build):
    loss = build(reduction="none")
    weights = [] if loss.regressor is None else numbers(loss)
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, channels, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = torch.from_numpy(reference(blocks, teacher.numpy(), *weights))
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    student, teacher = make_pair(4, 3, 2, 3, teacher_shape=(4, channels, 4, 6))
    blocks = teacher.numpy().reshape(4, channels, 2, 2, 3, 2).mean((3, 5))
    expected = torch.from_numpy(reference(student.detach().numpy(), blocks, *weights))
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient_for_student_and_learned_map():
    student, teacher = make_pair(2, 3, 2, 2, teacher_shape=(2, 4, 2, 2))
    loss = make_loss(3, 4).double()

    def value(student, weight, bias):
        return torch.func.functional_call(
            loss, {"regressor.weight": weight, "regressor.bias": bias}, (student, teacher)
        )

    assert torch.autograd.gradcheck(value, (student, *loss.parameters()))
    assert torch.autograd.gradcheck(lambda s: hint_loss(s, teacher[:, :3]), student)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_parameter_gets_a_gradient(reduction):
    loss = make_loss(3, 4, reduction=reduction)
    loss(*make_pair(2, 3, 2, 2, teacher_shape=(2, 4, 2, 2), dtype=torch.float32)).backward()
    assert [p.grad.abs().max() > 0 for p in loss.parameters()] == [True, True]


def test_contract():
    assert_loss_contract(HintLoss, shape=(5, 3, 2, 3), maps=True)
    assert_loss_contract(HintLoss, shape=(4, 3, 5))


def test_contract_with_a_learned_map():
    def build(**options):
        return make_loss(3, 4, **options)

    assert_loss_contract(build, shape=(5, 3, 2, 4), teacher_shape=(5, 4, 4, 2), maps=True)
    student, teacher = make_pair(6, 3, teacher_shape=(6, 4))
    with pytest.raises(ValueError, match=r"same shape but for the channels \(nothing is broadcast\), got \(6, 3\)"):
        build()(student, teacher[:1])
    with pytest.raises(ValueError, match=r"must be floating-point, got torch.float64 and torch.int64"):
        build()(student, teacher.long())


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
def test_the_learned_map_may_be_of_any_dtype(dtype):
    loss = make_loss(3, 4).to(dtype)
    student, teacher = make_pair(5, 3, 2, 3, teacher_shape=(5, 4, 2, 3), dtype=torch.float32)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    weight, bias = (parameter.float() for parameter in loss.parameters())
    expected = hint_loss(nn.functional.conv2d(student, weight[..., None, None], bias), teacher).mean()
    torch.testing.assert_close(value, expected)


def test_equals_mse_loss_of_torch():
    student, teacher = make_pair(5, 3, 2, 3)
    torch.testing.assert_close(HintLoss()(student, teacher), nn.MSELoss()(student, teacher))
    student, teacher = make_pair(5, 7, 3)
    torch.testing.assert_close(HintLoss()(student, teacher), nn.MSELoss()(student, teacher))


def test_zero_when_equal_and_for_a_teacher_that_is_a_linear_map_of_the_student():
    student, _ = make_pair(4, 3, 2, 3)
    assert HintLoss()(student, student.detach()) == 0
    loss = make_loss(3, 5).double()
    teacher = nn.functional.conv2d(student, loss.regressor.weight[..., None, None], loss.regressor.bias)
    assert loss(student, teacher) < 1e-24


def test_finite_on_extreme_maps_and_on_zeros():
    student, teacher = make_pair(4, 3, 2, 3, dtype=torch.float32)
    assert gradient(HintLoss(), 1e4 * student, -1e4 * teacher).isfinite().all()
    assert gradient(HintLoss(), torch.zeros(4, 3, 2, 3), torch.zeros(4, 3, 2, 3)).abs().max() == 0


def test_state_dict_holds_the_learned_map():
    loss, twin = make_loss(3, 4), HintLoss(3, 4)
    assert sorted(loss.state_dict()) == ["regressor.bias", "regressor.weight"]
    twin.load_state_dict(loss.state_dict())
    pair = make_pair(5, 3, 2, 3, teacher_shape=(5, 4, 2, 3))
    assert torch.equal(twin(*pair), loss(*pair))
    assert HintLoss().state_dict() == HintLoss(4, 4).state_dict() == {}


@pytest.mark.parametrize("channels", [(3, None), (None, 3)])
def test_rejects_channels_of_one_side(channels):
    with pytest.raises(ValueError, match=r"must both be given or both None, got \("):
        HintLoss(*channels)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((0, 3), "student_channels must be a positive integer, got 0"),
        ((3, -1), "teacher_channels must be a positive integer, got -1"),
        ((2.0, 3), "student_channels must be a positive integer, got 2.0"),
        ((3, True), "teacher_channels must be a positive integer, got True"),
    ],
)
def test_rejects_bad_channels(channels, message):
    with pytest.raises(ValueError, match=message):
        HintLoss(*channels)


@pytest.mark.parametrize("channels", [(3, 4), (3, 3)])
def test_rejects_inputs_of_other_channels(channels):
    loss = HintLoss(*channels)
    student, teacher = make_pair(4, 3, 2, 2, teacher_shape=(4, channels[1], 2, 2))
    with pytest.raises(ValueError, match=r"student must have 3 channels, got shape \(4, 2, 2, 2\)"):
        loss(student[:, :2], teacher)
    with pytest.raises(ValueError, match=r"teacher must have . channels, got shape \(4, 2, 2, 2\)"):
        loss(student, teacher[:, :2])
    with pytest.raises(ValueError, match=r"student must have 3 channels, got shape \(\)"):
        loss(student.sum(), teacher.sum())


def test_rejects_unequal_channels_without_a_learned_map():
    student, teacher = make_pair(4, 3, 2, 2, teacher_shape=(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"of the same N and C, got \(4, 3, 2, 2\) and \(4, 1, 2, 2\)"):
        HintLoss()(student, teacher)


def test_repr_shows_options():
    assert repr(HintLoss()) == "HintLoss(student_channels=None, teacher_channels=None, dim=None, reduction='mean')"
    expected = "HintLoss(\n  student_channels=3, teacher_channels=4, dim=1, reduction='sum'\n  (regressor): Linear"
    assert repr(HintLoss(3, 4, reduction="sum", dim=1)).startswith(expected)


def flat_maps(*maps):
    return [m.detach().numpy().reshape(*m.shape[:2], 1, -1) for m in maps]


@pytest.mark.parametrize("size", [(6,), (2, 3, 2)])
def test_maps_of_one_and_three_dimensions(size):
    student, teacher = make_pair(4, 3, *size, teacher_shape=(4, 5, *size))
    loss = make_loss(3, 5, reduction="none")  # only the second dimension has these channels
    expected = torch.from_numpy(reference(*flat_maps(student, teacher), *numbers(loss)))
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    twice = teacher.repeat_interleave(2, dim=-1)  # average-pooled to what it was
    torch.testing.assert_close(loss(student, twice).detach(), expected, rtol=1e-12, atol=1e-12)
    same = torch.from_numpy(reference(*flat_maps(student, teacher[:, :3])))
    for plain in (
        lambda s, t: hint_loss(s, t, dim=1),
        HintLoss(dim=1, reduction="none"),
        HintLoss(3, 3, reduction="none"),
    ):
        torch.testing.assert_close(plain(student, twice[:, :3]).detach(), same, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"same shape \(nothing is broadcast\)"):
        hint_loss(student, twice[:, :3])


def test_what_may_be_vectors_or_a_map_is_vectors_unless_dim_says_so():
    student, teacher = make_pair(4, 3, 3, teacher_shape=(4, 5, 5))
    assert make_loss(3, 5, reduction="none")(student, teacher[:, :3]).shape == (4, 3)
    assert make_loss(3, 5, reduction="none", dim=1)(student, teacher[..., :3]).shape == (4,)
    assert hint_loss(student, teacher[:, :3, :3]).shape == (4, 3)
    student, teacher = make_pair(4, 2, 2, 3)  # (N, H, W, C)
    assert hint_loss(student, teacher, dim=-1).shape == (4, 2, 2)
    expected = hint_loss(student, teacher, dim=-1).mean((1, 2))
    torch.testing.assert_close(hint_loss(student.movedim(-1, 1), teacher.movedim(-1, 1)), expected)


def test_tokens_of_other_widths_are_no_maps():
    tokens, wider = make_pair(2, 7, 4, teacher_shape=(2, 7, 6))
    for loss in (hint_loss, HintLoss(), HintLoss(4, 5)):
        with pytest.raises(ValueError, match="must have"):
            loss(tokens, wider)


def test_contract_of_maps_of_one_and_three_dimensions():
    for size in ((8,), (2, 4, 2)):
        shape, teacher_shape = (5, 3, *size), (5, 4, *(n // 2 for n in size))
        assert_loss_contract(
            lambda **options: make_loss(3, 4, dim=1, **options), shape=shape, teacher_shape=teacher_shape, maps=True
        )


@pytest.mark.parametrize("dim", [0, 2, -2, "1"])
def test_rejects_a_dim_of_something_else(dim):
    for build in (lambda: HintLoss(dim=dim), lambda: hint_loss(*make_pair(4, 3), dim=dim)):
        with pytest.raises(ValueError, match=f"dim must be 1 for maps, -1 for vectors, or None, got {dim!r}"):
            build()


def weighted(student, teacher, w, weight=None, bias=None):
    """sum w (s - t)^2 / (C sum w) of maps, position by position, the student through a linear map."""
    above = 0.0
    for n, i, j in np.ndindex(w.shape):
        s, t = student[n, :, i, j], teacher[n, :, i, j]
        s = s if weight is None else weight @ s + bias
        above += w[n, i, j] * ((s - t) ** 2).sum()
    return above / (teacher.shape[1] * w.sum())


@pytest.mark.parametrize("channels", [(3, 3), (3, 5)])
def test_matches_reference_with_weights_of_positions(channels):
    student, teacher = make_pair(4, channels[0], 2, 3, teacher_shape=(4, channels[1], 2, 3))
    loss = make_loss(*channels)
    w = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = [] if loss.regressor is None else numbers(loss)
    expected = torch.tensor(weighted(student.detach().numpy(), teacher.numpy(), w.numpy(), *weights))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(loss(student, teacher, mask=w).detach(), expected, **close)
    torch.testing.assert_close(loss(student, (teacher, w)).detach(), expected, **close)
    torch.testing.assert_close(loss(student, (teacher, w / 2), mask=2 * torch.ones(4)).detach(), expected, **close)
    torch.testing.assert_close(loss(student, teacher, mask=w, denominator=7).detach(), expected * w.sum() / 7, **close)
    # Weights and a mask of positions multiply.
    mask = w > 0.4
    expected = torch.tensor(weighted(student.detach().numpy(), teacher.numpy(), (w * mask).numpy(), *weights))
    torch.testing.assert_close(loss(student, (teacher, w), mask=mask).detach(), expected, **close)


def test_equal_weights_of_positions_are_no_weights():
    student, teacher = make_pair(4, 3, 2, 2)
    loss = HintLoss()
    torch.testing.assert_close(loss(student, teacher, mask=torch.ones(4, 2, 2)), loss(student, teacher))
    torch.testing.assert_close(loss(student, (teacher, torch.full((4, 2, 2), 0.3))), loss(student, teacher))
    constant = torch.full((4, 2, 2), 0.3, requires_grad=True)
    loss(student, (teacher, constant)).backward()
    assert constant.grad is None
    per_position = hint_loss(student, teacher, positions=True)
    assert per_position.shape == (4, 2, 2)
    torch.testing.assert_close(per_position.mean((1, 2)), hint_loss(student, teacher))
    torch.testing.assert_close(hint_loss(student[..., 0, 0], teacher[..., 0, 0], positions=True), per_position[:, 0, 0])


@pytest.mark.parametrize("channels", [(3, 3), (3, 5)])
def test_hidden_positions_count_nowhere(channels):
    student, teacher = make_pair(4, channels[0], 3, 3, teacher_shape=(4, channels[1], 3, 3))  # 3 channels, 3 rows
    mask = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.4
    spoilt = [x.detach().movedim(1, -1).clone() for x in (student, teacher)]
    for side in spoilt:
        side[~mask] = torch.nan
    spoilt = [side.movedim(-1, 1) for side in spoilt]
    spoilt[0].requires_grad_()
    weights = torch.where(mask, 0.5, torch.nan)
    loss = make_loss(*channels).double()
    wanted = list(loss.parameters())
    expected = loss(student, teacher, mask=mask)
    slopes = torch.autograd.grad(expected, [student, *wanted])
    for value in (loss(*spoilt, mask=mask), loss(spoilt[0], (spoilt[1], weights), mask=mask)):
        assert torch.equal(value, expected)
        assert all(map(torch.equal, torch.autograd.grad(value, [spoilt[0], *wanted]), slopes))
    assert (slopes[0].movedim(1, -1)[~mask] == 0).all()
    nothing = loss(*spoilt, mask=torch.zeros(4, 3, 3))
    assert nothing == 0
    assert all((slope == 0).all() for slope in torch.autograd.grad(nothing, [spoilt[0], *wanted]))


def test_weights_are_those_of_the_smaller_map():
    student, teacher = make_pair(4, 3, 4, 4, teacher_shape=(4, 3, 2, 2))
    w = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1))
    pooled = nn.functional.avg_pool2d(student, 2)
    torch.testing.assert_close(HintLoss()(student, (teacher, w)), HintLoss()(pooled, teacher, mask=w))
    for call in (lambda w: HintLoss()(student, teacher, mask=w), lambda w: HintLoss()(student, (teacher, w))):
        with pytest.raises(
            ValueError, match=r"must be shaped like the per-sample values, \(4, 2, 2\), got \(4, 4, 4\)"
        ):
            call(torch.ones(4, 4, 4))


def test_weights_of_positions_none_keeps_them_and_sum_adds_them():
    student, teacher = make_pair(4, 3, 2, 2)
    w = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = w * hint_loss(student, teacher, positions=True)
    torch.testing.assert_close(HintLoss(reduction="none")(student, teacher, mask=w), values)
    torch.testing.assert_close(HintLoss(reduction="sum")(student, teacher, mask=w), values.sum())
    tokens = student.flatten(2).mT, teacher.flatten(2).mT
    torch.testing.assert_close(HintLoss()(tokens[0], (tokens[1], w.flatten(1))), values.sum() / w.sum())


def test_scores_of_the_teacher_weigh_a_level_of_a_detector():
    from distill import Distiller, Term

    class Detector(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.neck, self.head = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 4, 1)

        def forward(self, x):
            return self.head(self.neck(x))

    def with_scores(sides):
        level, logits = sides
        return level, logits.sigmoid().amax(1)

    student, teacher, loss = Detector(5), Detector(6), make_loss(5, 6)
    term = Term(loss, at=("neck", ("neck", "head")), teacher=with_scores, weight=6.0)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = Distiller(student, teacher, term, task_loss=None)(x)
    with torch.no_grad():
        level = teacher.neck(x)
        expected = 6 * loss(student.neck(x), level, mask=teacher.head(level).sigmoid().amax(1))
    torch.testing.assert_close(out.loss.detach(), expected)
    out.loss.backward()
    assert loss.regressor.weight.grad.abs().max() > 0


def test_rejects_weights_that_are_no_tensor_or_do_not_fit():
    student, teacher = make_pair(4, 3, 2, 2)
    with pytest.raises(TypeError, match="the teacher's weights must be a tensor, got list"):
        HintLoss()(student, (teacher, [1.0]))
    maps, scores = torch.ones(4, 3, 2, 2), torch.full((4, 2, 2), -1.5)
    with pytest.raises(ValueError, match=r"the teacher's weights must be zero or positive, got -1\.5: those of logits"):
        HintLoss()(maps, (maps, scores))
    assert HintLoss()(maps, (maps, scores), mask=torch.zeros(4)) == 0  # what is hidden may be anything
    with pytest.raises(ValueError, match=r"the teacher's weights must be zero or positive, got -1\.5: those of logits"):
        HintLoss()(maps, (maps, scores), mask=-torch.ones(4))
    pair = student, (teacher, torch.ones(4, 2, 2))
    assert HintLoss()(*pair, mask=-torch.ones(4)) == HintLoss()(*pair)  # as with other masks
    with pytest.raises(ValueError, match=r"the teacher's weights must be shaped like .*, \(4, 2, 2\), got \(4,\)"):
        HintLoss()(student, (teacher, torch.ones(4)))
    with pytest.raises(ValueError, match=r"mask must be shaped like .*, \(4, 2, 2\), got \(2,\)"):
        HintLoss()(student, (teacher, torch.ones(4, 2, 2)), mask=torch.ones(2))
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        HintLoss()(student, (teacher, torch.ones(4, 2, 2)), mask=[1.0])
    with pytest.raises(TypeError, match="teacher must be a tensor, got tuple"):
        HintLoss()(student, (teacher, teacher, teacher))
