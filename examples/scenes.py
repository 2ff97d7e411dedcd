"""Handwritten digits scattered over dim pictures, with a box for each and a class for each pixel.

Data and small networks of `segmentation.py` and `detector.py`, in place of yours.
"""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn ships no types
from torch import Tensor, nn

try:
    from torchvision.models.detection import FasterRCNN, anchor_utils, backbone_utils
except ImportError:  # then a small detector of the same manners
    FasterRCNN = None

SIZE = 16  # a digit is 16 x 16 pixels
CLASSES, IGNORED = 11, 255  # none and ten digits; pixels at the edge of a stroke have no label


def scenes(count: int, seed: int, side: int = 64, digits: int = 3) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Draw pictures, each with a few digits that do not touch.

    Args:
        count: How many pictures.
        seed: Pictures of another seed have other digits at other places, on other backgrounds.
        side: Their height and width, a multiple of 16.
        digits: How many digits are in each.

    Returns:
        Pictures `(N, 3, side, side)`; the class of each pixel `(N, side, side)`: 0 for none, 1 to 10 for the digits,
        255 for pixels of which that cannot be said; and for each picture its `boxes` (x1, y1, x2, y2) and `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    strokes = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    strokes = nn.functional.interpolate(strokes, size=(SIZE, SIZE), mode="bilinear").squeeze(1)
    classes = torch.from_numpy(load_digits().target)
    pictures = 0.3 * torch.rand(count, 3, side, side, generator=generator)
    pixels, targets = torch.zeros(count, side, side, dtype=torch.long), []
    for n in range(count):
        # Each digit has a cell of 20 x 20 pixels to itself.
        cells = torch.randperm((side // 20) ** 2, generator=generator)[:digits]
        corners = torch.stack([cells % (side // 20), cells // (side // 20)], 1) * 20
        corners = corners + torch.randint(0, 20 - SIZE + 1, corners.shape, generator=generator)
        chosen = torch.randint(len(classes), (digits,), generator=generator)
        for (x, y), digit in zip(corners.tolist(), chosen.tolist(), strict=True):
            stroke, place = strokes[digit], (slice(y, y + SIZE), slice(x, x + SIZE))
            color = 0.4 + 0.6 * torch.rand(3, 1, 1, generator=generator)
            pictures[n][:, place[0], place[1]] += color * stroke
            edge = (stroke > 0.2) & (stroke < 0.5)
            pixels[n][place] = ((stroke >= 0.5) * (classes[digit] + 1)).masked_fill(edge, IGNORED)
        targets.append({"boxes": torch.cat([corners, corners + SIZE], 1).float(), "labels": classes[chosen] + 1})
    return pictures, pixels, targets


class Segmenter(nn.Module):
    """A network of torchvision's manners: logits for each pixel, and those of an auxiliary head in the middle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.early = nn.Sequential(*_layer(3, width, 2), *_layer(width, 2 * width, 1))
        self.late = nn.Sequential(*_layer(2 * width, 4 * width, 2), *_layer(4 * width, 4 * width, 1))
        self.head, self.aux = nn.Conv2d(4 * width, CLASSES, 1), nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map pictures (N, 3, H, W) to logits (N, 11, H, W)."""
        early = self.early(x)
        logits = {"out": self.head(self.late(early)), "aux": self.aux(early)}
        return {name: nn.functional.interpolate(maps, x.shape[2:], mode="bilinear") for name, maps in logits.items()}


def detector(*, large: bool) -> Any:
    """Build a detector: torchvision's Faster R-CNN where it is installed, else a small one of the same manners."""
    if FasterRCNN is None:
        return SmallDetector(32 if large else 16)
    backbone = backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet34" if large else "resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    anchors = anchor_utils.AnchorGenerator(((16,),) * 5, ((1.0,),) * 5)  # digits are squares of one size
    return FasterRCNN(backbone, CLASSES, min_size=64, max_size=64, rpn_anchor_generator=anchors)


class SmallDetector(nn.Module):
    """A detector of the manners of torchvision's Faster R-CNN: a dict of losses in training, boxes in eval mode.

    Each position of four levels says whether it lies in an object, of what class, and how far the object's sides are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = _Pyramid(width)
        self.rpn: Any = nn.Module()
        self.rpn.head = _Head(width)
        self.classes = nn.Conv2d(width, CLASSES - 1, 1)

    def transform(self, images: list[Tensor]) -> tuple[Any, None]:
        """Make a batch of pictures of one size."""
        return SimpleNamespace(tensors=torch.stack(images)), None

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Give losses in training, and else for each picture its 20 surest boxes, with labels and scores."""
        levels = list(self.backbone(self.transform(images)[0].tensors).values())
        scores, sides = (torch.cat([x.flatten(2) for x in maps], 2).mT for maps in self.rpn.head(levels))
        logits = torch.cat([self.classes(level).flatten(2) for level in levels], 2).mT
        centers = torch.cat([_centers(level.shape[2:], images[0].shape[1]) for level in levels])
        boxes = torch.cat([centers - 8 * sides[..., :2].exp(), centers + 8 * sides[..., 2:].exp()], -1)
        if not self.training or targets is None:
            best = scores.squeeze(-1).sigmoid().topk(20)
            labels = logits.argmax(-1) + 1
            return [
                {"boxes": boxes[n, at], "labels": labels[n, at], "scores": score}
                for n, (score, at) in enumerate(zip(best.values, best.indices, strict=True))
            ]
        truth = [torch.cat([target["boxes"], target["labels"].unsqueeze(1)], 1) for target in targets]
        inside = [((centers[:, None] > t[:, :2]) & (centers[:, None] < t[:, 2:4])).all(-1).float() for t in truth]
        hit = torch.stack([each.amax(1) for each in inside])
        own = torch.stack([t[each.argmax(1)] for t, each in zip(truth, inside, strict=True)])
        at = hit.bool()
        return {
            "objectness": nn.functional.binary_cross_entropy_with_logits(scores.squeeze(-1), hit),
            "classes": nn.functional.cross_entropy(logits[at], own[at][:, 4].long() - 1),
            "boxes": nn.functional.l1_loss(boxes[at], own[at][:, :4]) / 8,
        }


class _Pyramid(nn.Module):
    """Four levels, the first of a quarter of the picture's size, each with what the coarser one saw."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width
        stem = nn.Sequential(*_layer(3, width, 2), *_layer(width, width, 2))
        self.steps = nn.ModuleList([stem, *(nn.Sequential(*_layer(width, width, 2)) for _ in range(3))])
        self.merge = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(4)])

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Map (N, 3, H, W) to maps of the sizes H / 4, H / 8, H / 16 and H / 32."""
        levels = []
        for step in self.steps:
            levels.append(x := step(x))
        for k in (2, 1, 0):
            levels[k] = levels[k] + nn.functional.interpolate(levels[k + 1], levels[k].shape[2:])
        return OrderedDict(
            (str(k), merge(level)) for k, (merge, level) in enumerate(zip(self.merge, levels, strict=True))
        )


class _Head(nn.Module):
    """Whether there is an object, and how far its sides are, at each position of each level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score, self.sides = nn.Conv2d(width, 1, 1), nn.Conv2d(width, 4, 1)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map (N, C, H, W) to logits (N, 1, H, W) and logarithms of distances (N, 4, H, W), for each level."""
        levels = [level.relu() for level in levels]
        return [self.score(level) for level in levels], [self.sides(level) for level in levels]


def _centers(size: torch.Size, side: int) -> Tensor:
    y, x = ((torch.arange(n) + 0.5) * side / n for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def f1(found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> float:
    """Give the harmonic mean of precision and recall, in percent.

    Boxes of a score above 0.5 are right where they cover an object of their label with an IoU above 0.5.
    """
    right, said, hit, there = 0, 0, 0, 0
    for ours, truth in zip(found, targets, strict=True):
        sure = ours["scores"] > 0.5
        a, b = ours["boxes"][sure, None], truth["boxes"]
        overlap = (torch.minimum(a[..., 2:], b[:, 2:]) - torch.maximum(a[..., :2], b[:, :2])).clamp(min=0).prod(-1)
        union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - overlap
        good = (overlap > 0.5 * union) & (ours["labels"][sure, None] == truth["labels"])
        right, said = right + int(good.any(1).sum()), said + int(sure.sum())
        hit, there = hit + int(good.any(0).sum()), there + len(b)
    precision, recall = right / max(said, 1), hit / max(there, 1)
    return 100 * 2 * precision * recall / max(precision + recall, 1e-9)


def _layer(channels: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
