"""Objects and their surroundings: Yang et al., "Focal and Global Knowledge Distillation for Detectors" (CVPR 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_not_negative, check_pair, check_positive, check_tensor, may_look
from distill._reduction import Reduction, check_mask, hide
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import run_layers
from distill.losses._maps import check_maps, pool_to_smaller
from distill.losses._sizes import MAPS

FAMILY = "learned maps"


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    relations: tuple[Tensor, Tensor] | None = None,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 5e-4,
    delta: float = 5e-6,
    temperature: float = 0.5,
) -> Tensor:
    """Squared distance inside and outside of boxes, of attention, and of global relations, one value per sample.

        P(x) = HW * softmax over the positions of mean_c |x_chw| / T
        Q(x) = C * softmax over the channels of mean_hw |x_chw| / T
        f_hw = the largest 1 / (h_r w_r) of the boxes r that hold the position, 0 where none does
        b_hw = 1 / (number of positions that no box holds) at these, else 0
        D_hw = P(t)_hw * sum_c Q(t)_c (s_chw - t_chw)^2
        loss = alpha * sum_hw f_hw D_hw + beta * sum_hw b_hw D_hw + gamma * [sum |P(s) - P(t)| + sum |Q(s) - Q(t)|]
               + delta * sum_chw (R(s) - R(t))^2

    Positions with a large attention of the teacher count more. Every object counts equally, whatever its size, and so
    does the background. R adds to each position what a learned attention over all positions collects; `FGDLoss` owns
    it, and the 1x1 convolution that brings the student to the teacher's channels.

    Args:
        student: The student's map, `(N, C, H, W)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's map, same shape. Gets no gradient.
        target: The boxes of each sample, `(N, M, 4)`, floating-point, as fractions of the picture's width and height:
            x and y of the first corner, then of the last. A box without an area counts nowhere, so that rows of zeros
            fill up what is less than M. M may be 0. On a CPU numbers that are no such boxes are refused. On a GPU,
            where to look would wait, one whose last corner is before the first counts nowhere.
        relations: R of student and teacher, shaped like the maps; the teacher's is no constant, since its layers learn.
            None: that part is left out.
        alpha: Weight of the boxes, zero or positive.
        beta: Weight of the background, zero or positive.
        gamma: Weight of the attention, zero or positive.
        delta: Weight of the relations (lambda in the paper), zero or positive.
        temperature: What the mean magnitudes are divided by, positive and finite.

    Returns:
        One value per sample, `(N,)`; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `alpha`, `beta`, `gamma`, `delta` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is not of four dimensions, empty or not floating-point, the
            target is missing or no boxes of corners in fractions, or an option is out of its range.

    Examples:
        >>> import torch
        >>> from distill import fgd_loss
        >>> student, teacher = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
        >>> box = torch.tensor([[[0.0, 0.0, 0.25, 0.25]]])  # it reaches over 2 x 2 positions, each counts 1 / 4
        >>> fgd_loss(student, teacher, box, alpha=1.0, beta=0.0, gamma=0.0)  # 4 * 1/4 * 2 channels
        tensor([2.])

    Notes:
        Published with weight 1 at each level of the pyramid, since the options are the weights: these for RetinaNet;
        5e-5, 2.5e-5, 5e-5 and 5e-7 for Faster R-CNN; 1.6e-3, 8e-4, 8e-4 and 8e-6 at temperature 0.8 for FCOS.

        Scale: `mmdet/distillation/losses/fgd.py` of the authors' code (`yzd-v/FGD`), with the options in its
        `configs/distillers/fgd`: sums over channels and positions, averaged over the samples.

        Caveat: A box reaches from the position that holds its first corner to the one after the position of its last,
        and its height and width are counted so; that is the code, and the paper has the box itself. The code's default
        for gamma is 1e-3, which no configuration of RetinaNet has. Its attention has a bias, which a softmax does not
        see.

    Reference:
        Zhendong Yang, Zhe Li, Xiaohu Jiang, Yuan Gong, Zehuan Yuan, Danpei Zhao and Chun Yuan, "Focal and Global
        Knowledge Distillation for Detectors", CVPR 2022 and arXiv 2111.11837, section 3.
    """
    for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("delta", delta)):
        check_not_negative(name, weight)
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=1)
    if student.ndim != 4:
        raise ValueError(f"student and teacher must be maps (N, C, H, W), got shape {tuple(student.shape)}")
    boxes = _check_boxes(target, student, None)
    inside = _inside(boxes, student)
    outside = (inside == 0).to(student.dtype)
    outside = outside / outside.sum((1, 2), keepdim=True).clamp_min(1.0)
    (where, which), (their_where, their_which) = _attention(student, temperature), _attention(teacher, temperature)
    squares = F.mse_loss(student, teacher, reduction="none") * their_which[:, :, None, None]
    distance = squares.sum(1) * their_where
    values = (distance * (alpha * inside + beta * outside)).flatten(1).sum(1)
    attention = (where - their_where).abs().flatten(1).sum(1) + (which - their_which).abs().sum(1)
    values = values + gamma * attention
    if relations is not None:
        ours, theirs = relations
        for side in (ours, theirs):
            if side.shape != student.shape:
                got = tuple(side.shape)
                raise ValueError(f"relations must be shaped like the maps, {tuple(student.shape)}, got {got}")
        # Both have their graph: what makes the teacher's learns too.
        values = values + delta * F.mse_loss(ours, theirs, reduction="none").flatten(1).sum(1)
    return values


def _check_boxes(target: Tensor | None, maps: Tensor, mask: Tensor | None) -> Tensor:
    """The boxes in the dtype of the maps, none where the mask is 0."""
    if target is None:
        raise ValueError("target must be the boxes of every sample, (N, M, 4), got None")
    check_tensor("target", target)
    if target.ndim != 3 or len(target) != len(maps) or target.shape[2] != 4 or not target.is_floating_point():
        raise ValueError(
            f"target must be boxes ({len(maps)}, M, 4), floating-point fractions of width and height, "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    if target.device != maps.device:
        raise ValueError(f"target must be on the device of the maps, {maps.device}, got {target.device}")
    boxes = target.detach().to(maps.dtype)
    if mask is not None:
        boxes = hide(boxes, mask)
    if may_look(boxes) and boxes.numel():
        if not boxes.amax() <= 2:  # NaN too
            raise ValueError(
                "target must be boxes in fractions of the picture's width and height, from 0 to 1, "
                f"got {float(boxes.amax())}: divide pixels by the picture's size"
            )
        reversed_ = (boxes[..., 2:] < boxes[..., :2]).any(2)
        if reversed_.any():
            raise ValueError(
                "target must be boxes of two corners, x1 and y1 before x2 and y2, "
                f"got {boxes[reversed_][0].tolist()}: a center and a size must be made corners first"
            )
    return boxes


def _inside(boxes: Tensor, maps: Tensor) -> Tensor:
    """What a position counts for its smallest box, `(N, H, W)`; 0 where there is none."""
    height, width = maps.shape[2:]
    x1, y1, x2, y2 = boxes.unbind(2)
    left, right, top, bottom = (x1 * width).floor(), (x2 * width).ceil(), (y1 * height).floor(), (y2 * height).ceil()
    share = 1 / ((bottom + 1 - top) * (right + 1 - left))
    rows = torch.arange(height, dtype=boxes.dtype, device=boxes.device)
    columns = torch.arange(width, dtype=boxes.dtype, device=boxes.device)
    in_rows = (rows >= top[..., None]) & (rows <= bottom[..., None])
    in_columns = (columns >= left[..., None]) & (columns <= right[..., None])
    real = ((x2 > x1) & (y2 > y1))[..., None, None]
    held = in_rows[..., :, None] & in_columns[..., None, :] & real
    shares = torch.where(held, share[..., None, None], 0.0)
    return torch.cat([torch.zeros_like(maps[:, :1]), shares], 1).amax(1)


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How much positions `(N, H, W)` and channels `(N, C)` count, 1 on average."""
    size = x.abs()
    where = torch.softmax((size.mean(1) / temperature).flatten(1), 1) * (x.shape[2] * x.shape[3])
    which = torch.softmax(size.mean((2, 3)) / temperature, 1) * x.shape[1]
    return where.reshape(len(x), *x.shape[2:]), which


def _check_halves(name: str, value: int) -> int:
    return check_count(name, value, least=2)


@register_loss("fgd")
class FGDLoss(SampleLoss):
    """Distance inside and outside of boxes, of attention and of learned relations; see `fgd_loss` for the formula.

    One loss for each level of a detector's pyramid. The maps are `(N, student_channels, H, W)` and
    `(N, teacher_channels, H', W')`; of unequal size they are average-pooled to the smaller height and width. The boxes
    come as `target`: in a Distiller by name, `distiller(images, {"p3": boxes, "task": ...})`.

    The parameters must be in the optimizer: a 1x1 convolution where the channels differ, and for each side the
    attention over the positions and two 1x1 convolutions with a layer norm and a ReLU (slope 0 at 0) between them. The
    last ones start as 0, so that the relations are the maps at first.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map, at least 2.
        alpha: Weight of the boxes, zero or positive.
        beta: Weight of the background, zero or positive.
        gamma: Weight of the attention, zero or positive.
        delta: Weight of the relations, zero or positive.
        temperature: What the mean magnitudes are divided by, positive and finite.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        TypeError: If `alpha`, `beta`, `gamma`, `delta` or `temperature` is no number.
        ValueError: If channels, weights, the temperature or the reduction are not as said.

    Examples:
        >>> import torch
        >>> from distill import FGDLoss
        >>> loss = FGDLoss(16, 32)
        >>> boxes = torch.tensor([[[0.1, 0.1, 0.4, 0.5]], [[0.0, 0.0, 0.0, 0.0]]])  # the second picture has none
        >>> loss(torch.randn(2, 16, 8, 8), torch.randn(2, 32, 8, 8), boxes).shape
        torch.Size([])
    """

    options = {  # noqa: RUF012 - declared in the base
        "student_channels": check_count,
        "teacher_channels": _check_halves,
        "alpha": check_not_negative,
        "beta": check_not_negative,
        "gamma": check_not_negative,
        "delta": check_not_negative,
        "temperature": check_positive,
    }
    built = ("student_channels", "teacher_channels")
    size = MAPS

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        delta: float = 5e-6,
        temperature: float = 0.5,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.alpha, self.beta, self.gamma, self.delta = alpha, beta, gamma, delta
        self.temperature = temperature
        same = student_channels == teacher_channels
        self.align = nn.Sequential(*() if same else (nn.Conv2d(student_channels, teacher_channels, 1),))
        self.attention = nn.ModuleList(_attend(teacher_channels) for _ in range(2))
        self.context = nn.ModuleList(_context(teacher_channels) for _ in range(2))

    @override
    def values(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        student, teacher = check_maps(student, teacher, channels=(self.student_channels, self.teacher_channels))
        if mask is not None:
            check_mask(mask, student.shape[:1], student.device)
        boxes = _check_boxes(target, student, mask)
        student, teacher = pool_to_smaller(student, teacher)
        student = run_layers(self.align, student)
        relations = self._relate(0, student), self._relate(1, teacher)
        weights = {name: value for name, value in self.given().items() if name not in self.built}
        return fgd_loss(student, teacher, boxes, relations=relations, **weights)

    def _relate(self, side: int, x: Tensor) -> Tensor:
        """A map, and at each position what the attention over all of them collects."""
        attention = torch.softmax(run_layers(self.attention[side], x).flatten(2), 2)
        collected = (x.flatten(2) * attention).sum(2)[..., None, None]
        return x + run_layers(self.context[side], collected)


def _attend(channels: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, 1, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(layer)


def _context(channels: int) -> nn.Sequential:
    hidden = channels // 2
    last = nn.Conv2d(hidden, channels, 1)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), last)
