"""Logit matching: Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (NIPS 2014)."""

from torch import Tensor

from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._mean_squares import ROWS

FAMILY = "logits"


def logit_loss(student: Tensor, teacher: Tensor, *, dim: int = -1) -> Tensor:
    """Mean squared difference of student and teacher, one value per sample.

        loss = 1/C * sum_c (s_c - t_c)^2

    The paper writes half the *sum* over the classes, averaged over samples: that is `C / 2` times this value. The
    mean is what `nn.MSELoss` gives and what benchmarks publish their weights for.

    Args:
        student: What the student gives, `(..., C)`: logits, or features of equal width, all finite: the
            difference to -inf is infinite, and that of two -inf no number. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: What the teacher gives, same shape. Gets no gradient.
        dim: The dimension of the `C` values.

    Returns:
        One value per sample, shape `(...)`, in squared units of the inputs; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import logit_loss
        >>> logit_loss(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [3.0, 4.0]]))
        tensor([2., 0.])

    Notes:
        Published with weight 1 on pooled features and 0.1 on the logits of CIFAR (the latter in
        `example_train_script.sh` of `AberHu/Knowledge-Distillation-Zoo`).

        Scale: `kd_losses/logits.py` of that benchmark: `F.mse_loss`, averaged over samples and classes.

        Caveat: The weight on features is that of the runs which the recipe `pooled` of `examples/cifar_resnet.py`
        repeats; no public code was seen that has it.

    Reference:
        Jimmy Ba and Rich Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014 and arXiv
        1312.6184, section 2.2 (regressing logits with L2 loss).
    """
    return ROWS.values(student, teacher, dim=dim)


@register_loss("logit")
class LogitLoss(RowLoss):
    """Mean squared difference of student and teacher; see `logit_loss` for the formula.

    It needs no argument, and `LogitLoss()` equals `torch.nn.MSELoss()` with the teacher detached.

    Args:
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` values.

    Raises:
        ValueError: If the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import LogitLoss
        >>> loss = LogitLoss()
        >>> student = torch.zeros(2, 10, requires_grad=True)
        >>> loss(student, torch.ones(2, 10)).backward()
        >>> student.grad[0, 0]
        tensor(-0.1000)

    Notes:
        With large inputs the gradient is computed in the forward pass and kept, which costs one tensor of the student's
        size. So evaluate under `torch.no_grad()`.

        Do not change student, teacher or mask in place before backward. With large inputs this is an error, with small
        ones it may be one; it never gives a wrong gradient.
    """

    rows = ROWS

    def __init__(self, *, reduction: Reduction = "mean", dim: int = -1) -> None:
        super().__init__(reduction=reduction, dim=dim)
