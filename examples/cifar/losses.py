"""Which loss compares what in the CIFAR networks, and its published weight.

Places are module paths of `cifar.models.ResNet`: several after a comma are several terms, several joined by a plus go
into one term together. `relu1` to `relu3` end the stages, and `fc:input` is the pooled feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import distill
from cifar.data import Dataset
from cifar.models import WIDTHS, ResNet
from distill import Distiller, Term, create_loss

STAGES = "relu1,relu2,relu3"
BEFORE_RELU = "relu1:input,relu2:input,relu3:input"


@dataclass(frozen=True)
class Networks:
    """What a loss may have to know before it is built.

    Attributes:
        student: The student.
        teacher: The teacher, with its batch norms.
        data: The data set.
    """

    student: ResNet
    teacher: ResNet
    data: Dataset


@dataclass(frozen=True)
class Setup:
    """How a loss is used here.

    Attributes:
        weight: Of each term.
        at: Places, as this file's first lines say; None for the class logits.
        build: Builds the loss of a place, which is given by its number; by default the registered class as it is.
        shares: What the weight is multiplied by at each place; by default 1.
        indices: Whether the loss wants to know where in the training set the images stand.
        warmup: Share of the run over which the weight rises from 0, where it was published so.
        task_weight: Of the cross-entropy, where it was not published with 1.
    """

    weight: float
    at: str | None = None
    build: Callable[[Networks, int], nn.Module] | None = None
    shares: tuple[float, ...] | None = None
    indices: bool = False
    warmup: float | None = None
    task_weight: float | None = None


_WARMUP = 20 / 240  # of the epochs, in the benchmark of dkd and review


def _ofd(networks: Networks, stage: int) -> nn.Module:
    last = getattr(networks.teacher, f"layer{stage + 1}")[-1].bn2
    margin = distill.ofd_margin(last.weight, last.bias)
    return distill.OFDLoss(WIDTHS[stage], WIDTHS[stage], margin)


def _crd(networks: Networks, _place: int) -> nn.Module:
    labels = networks.data.train_labels
    # The published 16384 negatives are of 50,000 images; a smaller set gets the same share.
    negatives = max(1, min(16384, len(labels) * 16384 // 50000))
    return distill.CRDLoss(WIDTHS[-1], WIDTHS[-1], len(labels), num_negatives=negatives, labels=labels)


def _sdd(networks: Networks, _place: int) -> nn.Module:
    return distill.SDDLoss(distill.DKDLoss(beta=2.0), networks.student.fc, networks.teacher.fc)


class _OnTokens(nn.Module):
    """A loss of tokens `(N, L, D)` for maps `(N, D, H, W)`."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        value: Tensor = self.loss(student.flatten(2).mT, teacher.flatten(2).mT, target)
        return value


# Weights as the docstrings of the losses name them. Where a loss was published for something else than the features of
# CIFAR networks, or with something else around it, a comment says so: there the weight is a first guess.
SETUPS: dict[str, Setup] = {
    # On the class logits.
    "kl": Setup(0.9, task_weight=0.1),
    # The next five were published for language models.
    "reverse_kl": Setup(1.0),
    "js": Setup(1.0),
    "tvd": Setup(1.0),
    "skew_kl": Setup(1.0),
    "skew_reverse_kl": Setup(1.0),
    "alpha_beta": Setup(32.0, build=lambda *_: distill.AlphaBetaLoss(0.8, 0.3, temperature=4.0)),
    # With the beta that was published for ResNet-56 to ResNet-20 on CIFAR-100.
    "dkd": Setup(1.0, build=lambda *_: distill.DKDLoss(beta=2.0), warmup=_WARMUP),
    "nkd": Setup(1.0, build=lambda *_: distill.NKDLoss(gamma=3.5, temperature=3.0)),
    "logit_std": Setup(9.0),
    "dist": Setup(1.0),  # of segmentation; on ImageNet 2
    "wsld": Setup(2.5),  # of ImageNet; on CIFAR-100 2.25 at temperature 4
    "ofa": Setup(1.0),
    "ttm": Setup(45.0),  # of VGG-13 to VGG-8, and so is the next
    "wttm": Setup(4.0),
    "skd": Setup(0.9, task_weight=0.1),
    "ctkd": Setup(0.9, task_weight=0.1),  # published with a strength that rises over ten epochs; here it is in full
    # The next three were published for language models, `mft` as the only term.
    "akl": Setup(1.0),
    "todi": Setup(0.5, task_weight=0.5),
    "mft": Setup(1.0),
    "sigmoid_kl": Setup(10.0),  # of images with several labels
    # On the heads, without the logits.
    "linear_logit": Setup(
        0.1, "fc:input", build=lambda networks, _: distill.LinearLogitLoss(networks.student.fc, networks.teacher.fc)
    ),
    # On feature maps.
    # Published through a convolution, a batch norm and a ReLU.
    "hint": Setup(100.0, "relu2", build=lambda *_: distill.HintLoss(WIDTHS[1], WIDTHS[1])),
    "at": Setup(1000.0, STAGES),
    "nst": Setup(50.0, STAGES),
    # Published for the student's initialisation, where the weight is without effect, and with the first layer too.
    "fsp": Setup(50.0, "relu1+relu2,relu2+relu3"),
    "vid": Setup(1.0, STAGES, build=lambda _, stage: distill.VIDLoss(WIDTHS[stage], WIDTHS[stage])),
    "ofd": Setup(1e-3, BEFORE_RELU, build=_ofd, shares=(0.25, 0.5, 1.0)),
    # Published with the teacher's maps before the ReLU.
    "review": Setup(
        0.6,
        "relu1+relu2+relu3+fc:input",
        build=lambda *_: distill.ReviewLoss((*WIDTHS, 64), (*WIDTHS, 64)),
        warmup=_WARMUP,
    ),
    "cwd": Setup(3.0, "relu3"),  # of the logit maps of a segmentation network
    # The alpha of ImageNet; on CIFAR-100 it is 1.2e-3.
    "mgd": Setup(1.0, "relu3", build=lambda *_: distill.MGDLoss(WIDTHS[2], WIDTHS[2])),
    "pearson": Setup(6.0, "relu3"),  # of a detector's feature pyramid
    "ickd": Setup(500.0, "relu3"),  # of ImageNet, through a convolution and a batch norm
    "sdd": Setup(1.0, "relu3", build=_sdd, warmup=_WARMUP),
    # The next two were published for vision transformers, beside losses of pretraining.
    "gram": Setup(2.0, "relu3", build=lambda *_: _OnTokens(distill.GramLoss())),
    "token_similarity": Setup(1.0, "relu3", build=lambda *_: _OnTokens(distill.TokenSimilarityLoss())),
    # On relations between the images of a batch.
    "rkd": Setup(1.0, "fc:input"),
    "pkt": Setup(30000.0, "fc:input"),
    "sp": Setup(3000.0, "relu3"),
    "cc": Setup(100.0, "fc:input"),
    "crd": Setup(0.8, "fc:input", build=_crd, indices=True),
    "srd": Setup(2.0, "fc:input", build=lambda *_: distill.SRDLoss(WIDTHS[-1], WIDTHS[-1])),  # beside `kl` at 1
    # On the pooled features of each image. Published for hidden states of a language model, and for pretraining.
    "cosine": Setup(1.0, "fc:input"),
    "queue_kl": Setup(1.0, "fc:input", build=lambda *_: distill.QueueKLLoss(WIDTHS[-1], WIDTHS[-1])),
}


def find_setup(name: str) -> Setup:
    """Return how a loss is used here.

    Args:
        name: The loss's registry name.

    Returns:
        Its setup; weight 1 on the class logits for a loss that this file does not know.
    """
    return SETUPS.get(name, Setup(1.0))


# An operator, since a compiled backward pass would compute the share again, from a count that has gone on.
@torch.library.custom_op("cifar::count", mutates_args={"forwards"})
def _count(forwards: Tensor, more: int, steps: int) -> Tensor:
    forwards += more
    return (forwards / steps).clamp(max=1)


@_count.register_fake
def _(forwards: Tensor, more: int, steps: int) -> Tensor:  # noqa: ARG001 - the operator's
    return forwards.new_empty((), dtype=torch.get_default_dtype())


class WarmUp(nn.Module):
    """A loss that is multiplied by a share, which rises from 0 to 1 in equal steps, one for each training forward.

    Its count is a buffer: a checkpoint holds it, and a CUDA graph moves it on.
    """

    forwards: Tensor

    def __init__(self, loss: nn.Module, steps: int) -> None:
        """Wrap a loss.

        Args:
            loss: The loss.
            steps: Training forwards until it counts in full, at least 1.
        """
        super().__init__()
        self.loss = loss
        self.steps = steps
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute the loss's share.

        Args:
            student: What the loss takes.
            teacher: What the loss takes.
            target: What the loss takes.

        Returns:
            A scalar.
        """
        share: Tensor = _count(self.forwards, int(self.training), self.steps)
        value: Tensor = self.loss(student, teacher, target)
        return value * share


def build_distiller(
    name: str, at: str | None, weight: float, networks: Networks, *, warmup: int = 0, task_weight: float = 1.0
) -> Distiller:
    """Build the Distiller of a loss.

    Args:
        name: The loss's registry name.
        at: Places, as this file's first lines say; None for the class logits.
        weight: Of each term.
        networks: Student, teacher and data.
        warmup: Training steps over which the loss comes in.
        task_weight: Of the cross-entropy.

    Returns:
        The Distiller; with `indices` in the loss's setup its target is `(N, 2)`, labels and indices, else the labels.

    Raises:
        ValueError: If a place is in neither network or there twice, or the places are not as many as the setup knows.
    """
    setup = find_setup(name)
    places = [None] if at is None else at.split(",")
    shares = setup.shares or (1.0,) * len(places)
    if len(shares) != len(places):
        raise ValueError(f"{name} needs {len(shares)} places, got {at or 'the class logits'}")
    if len(set(places)) < len(places):
        raise ValueError(f"the places of the terms must differ, got {at}")
    if setup.build is not None and len(places) > len(WIDTHS):
        raise ValueError(f"{name} takes at most {len(WIDTHS)} places, got {at}")
    terms = {}
    for number, (place, share) in enumerate(zip(places, shares, strict=True)):
        loss = create_loss(name) if setup.build is None else setup.build(networks, number)
        loss = WarmUp(loss, warmup) if warmup else loss
        side = None if place is None else tuple(place.split("+")) if "+" in place else place
        where = (side, side) if side is not None else None
        # No name of a module has a dot.
        terms[name if place is None or len(places) == 1 else f"{name}@{place.replace('.', '/')}"] = Term(
            loss, at=where, weight=share * weight
        )
    task_loss: nn.Module = nn.CrossEntropyLoss()
    if setup.indices:
        task_loss = _OnLabels(task_loss)
    return Distiller(networks.student, networks.teacher, terms, task_loss=task_loss, task_weight=task_weight)


class _OnLabels(nn.Module):
    """A task loss for targets whose first column holds the labels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        value: Tensor = self.loss(logits, target[:, 0])
        return value


def make_target(labels: Tensor, index: Tensor, *, indices: bool) -> Tensor:
    """Return what a Distiller of `build_distiller` takes as its target.

    Args:
        labels: Classes of the batch, `(N,)`.
        index: Where its images stand in the training set, `(N,)`.
        indices: Whether the loss wants to know that.

    Returns:
        The labels, or `(N, 2)`.
    """
    return torch.stack([labels, index], 1) if indices else labels
