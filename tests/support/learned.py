"""For losses with learned layers on feature maps: their gradients, and the layers in NumPy for their references."""

import copy
import pickle

import numpy as np
import torch
from torch import Tensor, nn

from contract import make_pair


def make_maps(student: tuple[int, ...], teacher: tuple[int, ...], dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """A student that wants a gradient and a teacher of another shape, both standard normal."""
    return make_pair(*student, dtype=dtype)[0], make_pair(*teacher, dtype=dtype)[1]


def assert_gradients(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    """`gradcheck` for the student and for every weight."""
    loss = copy.deepcopy(loss).double()
    names = [name for name, _ in loss.named_parameters()]

    def value(student: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, weights, strict=True)), (student, teacher))

    assert torch.autograd.gradcheck(value, (student, *loss.parameters()))


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
