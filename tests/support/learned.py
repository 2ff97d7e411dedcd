"""For losses with learned layers on feature maps: what they promise, and the layers in NumPy for their references."""

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import contract
from contract import gradient, make_pair


def make_maps(student: tuple[int, ...], teacher: tuple[int, ...], dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """A student that wants a gradient and a teacher of another shape, both standard normal."""
    return make_pair(*student, dtype=dtype)[0], make_pair(*teacher, dtype=dtype)[1]


def with_weights(loss: nn.Module, seed: int = 0) -> nn.Module:
    """The loss with seeded weights, none of them 0 or 1, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return loss


def assert_learned_loss_contract(
    build: Callable[..., nn.Module], *, student: tuple[int, ...], teacher: tuple[int, ...], meet: bool = False
) -> None:
    """The contract of every loss, for one that owns layers and takes maps of unequal shapes.

    Args:
        build: The class, or a function that passes keyword arguments on to it.
        student: Shape of the student's map.
        teacher: Shape of the teacher's map.
        meet: Whether samples meet in a batch norm.
    """

    def weighted(**options) -> nn.Module:
        return with_weights(build(**options))

    loss, maps = weighted(), lambda **options: make_maps(student, teacher, **options)
    contract._check_scalar_and_gradients(loss, *maps(), None)
    contract._check_leaves_global_state_alone(loss, *maps(), None)
    contract._check_copies(loss, *maps(), None)
    contract._check_autocast(loss, *maps(dtype=torch.float32), None)
    contract._check_reads_no_value(loss, *maps(dtype=torch.float32), None)
    contract._check_compile(loss, *maps(dtype=torch.float32), None)
    contract._check_func(loss, *maps(), None)
    contract._check_reductions(weighted, *maps(), None)
    contract._check_mask(weighted, *maps(), None, meet=meet)
    _check_hidden_samples(weighted(), *maps())
    for bad in ("avg", "Mean", None):
        with pytest.raises(ValueError, match=f"reduction must be 'mean', 'sum' or 'none', got {bad!r}"):
            build(reduction=bad)
    _check_vmap(loss, *maps())
    _check_precisions(loss, maps)
    _check_parameters(loss, build, *maps())
    _check_eval_mode(loss, *maps())
    _check_zeros_and_extremes(loss, *maps())
    _check_refuses_bad_maps(loss, *maps())


def assert_gradients(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    """`gradcheck` for the student and for every weight."""
    loss = copy.deepcopy(loss).double()
    names = [name for name, _ in loss.named_parameters()]

    def value(student: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, weights, strict=True)), (student, teacher))

    assert torch.autograd.gradcheck(value, (student, *loss.parameters()))


def _check_hidden_samples(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    """Under a mask: the value and all gradients of the kept samples alone, whatever the hidden ones hold."""
    loss = loss.double()
    kept = torch.tensor([True, False] * len(student))[: len(student)]
    kept[0] = False

    def results(student: Tensor, teacher: Tensor, mask: Tensor | None) -> list[Tensor]:
        student = student.detach().clone().requires_grad_()
        value = loss(student, teacher, mask=mask)
        return [value, *torch.autograd.grad(value, [student, *loss.parameters()])]

    value, slope, *slopes = results(student[kept], teacher[kept], None)
    whole = torch.zeros_like(student).index_put((kept,), slope)
    for spoil in (1.0, math.nan, math.inf, -math.inf):
        spoilt = [torch.where(kept.reshape(-1, 1, 1, 1), x.detach(), spoil) for x in (student, teacher)]
        for mask in (kept, 2 * kept.double()):
            found = results(*spoilt, mask)
            for a, b in zip(found, [value, whole, *slopes], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for nothing in results(*spoilt, torch.zeros_like(kept)):
        assert (nothing == 0).all()


def _check_vmap(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    student = student.detach()
    mapped = torch.vmap(loss)(torch.stack([student, -student]), torch.stack([teacher, -teacher]))
    torch.testing.assert_close(mapped[0], loss(student, teacher))
    torch.testing.assert_close(mapped[1], loss(-student, -teacher))


def _check_precisions(loss: nn.Module, maps: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for dtype in (torch.bfloat16, torch.half):
        student, teacher = maps(dtype=dtype)
        value = loss(student, teacher)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(student.float(), teacher.float()))
        value.backward()
        assert student.grad.dtype == dtype
        assert loss(student, teacher.double()).dtype == torch.float64
        cast = copy.deepcopy(loss).to(dtype)  # as Distiller.half() leaves it
        rounded = copy.deepcopy(cast).float()
        assert torch.equal(cast(student, teacher), rounded(student, teacher))


def _check_parameters(loss: nn.Module, build: Callable[..., nn.Module], student: Tensor, teacher: Tensor) -> None:
    loss.zero_grad()
    loss(student, teacher).backward()
    for name, parameter in loss.named_parameters():  # DDP waits for each
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    other = with_weights(build(), seed=1)
    assert not torch.equal(other(student, teacher), loss(student, teacher))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(student, teacher), loss(student, teacher))
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    before = other(student, teacher)
    before.backward()
    optimizer.step()
    assert other(student, teacher) < before


def _check_eval_mode(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    state = copy.deepcopy(loss.state_dict())
    value = loss(student, teacher)
    assert torch.equal(copy.deepcopy(loss).eval()(student, teacher), value)
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def _check_zeros_and_extremes(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    for factor in (0.0, 1e4):
        assert gradient(loss, factor * student, factor * teacher).isfinite().all()


def _check_refuses_bad_maps(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    for other in (teacher[:1], teacher[0]):
        with pytest.raises(ValueError, match=r"must (be|have) .*maps.*got .*\("):
            loss(student, other)
    with pytest.raises(ValueError, match=rf"teacher must have {teacher.shape[1]} channels, got shape \("):
        loss(student, teacher[:, :1])
    with pytest.raises(ValueError, match=rf"student must have {student.shape[1]} channels, got shape \("):
        loss(student[:, :1], teacher)
    with pytest.raises(ValueError, match="must be floating-point, got torch.int64 and torch.float64"):
        loss(student.detach().long(), teacher)
    with pytest.raises(ValueError, match="must be floating-point, got torch.float64 and torch.complex128"):
        loss(student, teacher + 0j)
    with pytest.raises(ValueError, match="on the same device, got cpu and meta"):
        loss(student, teacher.to("meta"))
    with pytest.raises(ValueError, match=r"must not be empty, got shape \("):
        loss(student[:0], teacher[:0])
    with pytest.raises(ValueError, match=r"must not be empty, got shape \("):
        loss(student, teacher[..., :0])


def assert_survives_copies(loss: nn.Module, student: Tensor, teacher: Tensor, calls: int = 3) -> None:
    """A copy of a loss that draws random numbers goes on exactly as the original does, on its own."""
    loss(student, teacher)
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    expected = [loss(student, teacher) for _ in range(calls)]
    assert len(set(expected)) == calls
    for twin in twins:
        assert [twin(student, teacher) for _ in range(calls)] == expected


def weights(layer: nn.Module) -> list[np.ndarray]:
    """Weight and bias as float64 arrays; a bias that is None is left out."""
    return [parameter.detach().double().numpy() for parameter in layer.parameters()]


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Convolution with zeros around, so that height and width stay; every output position in a loop."""
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((len(x), len(weight), *x.shape[2:]))
    for i, j in np.ndindex(*x.shape[2:]):
        out[:, :, i, j] = np.einsum("ncab,ocab->no", padded[:, :, i : i + k, j : j + k], weight)
    return out if bias is None else out + bias[:, None, None]


def batch_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """With the statistics of the batch, variance biased and 1e-5 added to it."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight[:, None, None] + bias[:, None, None]


def average_pool(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mean over bins; bin i of n goes from floor(i size / n) to ceil((i + 1) size / n)."""
    out = np.zeros((*x.shape[:2], height, width))
    for i, j in np.ndindex(height, width):
        rows = slice(i * x.shape[2] // height, -(-(i + 1) * x.shape[2] // height))
        columns = slice(j * x.shape[3] // width, -(-(j + 1) * x.shape[3] // width))
        out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def nearest(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized; position i of n takes floor(i size / n)."""
    rows = np.arange(height) * x.shape[2] // height
    columns = np.arange(width) * x.shape[3] // width
    return x[:, :, rows][:, :, :, columns]


class Levels(nn.Module):
    """Gives a loss of tuples three levels of one map, the last of them pooled features, so that it takes the contract.

    Args:
        loss: A loss that takes tuples of three.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student, teacher, target=None, *, mask=None):
        return self.loss(self.levels(student), self.levels(teacher), target, mask=mask)

    @staticmethod
    def levels(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x[..., ::2, ::2], x[..., :1, :1].flatten(1)
