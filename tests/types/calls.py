"""What calls have for types in a file of somebody else: mypy reads it in `make lint`, nobody runs it."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from distill import Distiller, DistillerOutput, KLLoss, Reduction, RKDLoss, Term, create_loss, get_loss


def calls(x: Tensor) -> None:
    """Each type is the one that is said here, and each error is one."""
    reduction: Reduction = "sum"
    loss = KLLoss(2.0, reduction=reduction)
    distiller = Distiller(nn.Linear(3, 5), nn.Linear(3, 5), {"kl": loss, "rkd": Term(RKDLoss(), at="")})
    out = distiller(x, torch.zeros(4, dtype=torch.int64), mask=x[:, 0] > 0)
    assert_type(loss(x, x), Tensor)
    assert_type(RKDLoss()(x, x, mask=x[:, 0] > 0), Tensor)
    assert_type(out, DistillerOutput)
    assert_type(out.loss, Tensor)
    assert_type(get_loss("kl"), type[nn.Module])
    assert_type(create_loss("kl", temperature=2.0), nn.Module)
    KLLoss(reduction="avg")  # type: ignore[arg-type]
