"""A detector teaches a smaller one through its pyramid: four levels, where each position counts as the teacher is sure.

python examples/detector.py   # digits scattered over pictures; torchvision's Faster R-CNN where it is installed

In training the student returns a dict of losses. The teacher is its backbone and the head that looks for objects.
`scenes.py` has data and detectors: put yours there.
"""

import argparse
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from distill import Distiller, HintLoss, Term, adapt
from scenes import detector, f1, scenes


class Pyramid(nn.Module):
    """What teaches: the levels of a detector's pyramid, and how likely an object is at each position."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.transform, self.backbone, self.head = detector.transform, detector.backbone, detector.rpn.head

    def forward(self, images: list[Tensor], _: Any) -> list[tuple[Tensor, Tensor]]:
        """Give for each level a map (N, C, H, W) and weights (N, H, W); boxes are not needed."""
        levels = list(self.backbone(self.transform(images)[0].tensors).values())
        return [(level, score.sigmoid().amax(1)) for level, score in zip(levels, self.head(levels)[0], strict=True)]


def distil(student: Any, teacher: Any) -> Distiller:
    """Build the Distiller; without a teacher it has the detector's own losses alone."""
    task: dict[str, Any] = {"task_loss": lambda losses: sum(losses.values()), "task_output": lambda losses: losses}
    if teacher is None:
        return Distiller(student, None, {}, **task)
    widths = student.backbone.out_channels, teacher.backbone.out_channels
    sides = [(("backbone", adapt.Select(k)), adapt.Select(str(k))) for k in range(4)]  # where, and how to take it apart
    terms = {f"level{k}": Term(HintLoss(*widths), at, student=part) for k, (at, part) in enumerate(sides)}
    return Distiller(student, Pyramid(teacher), terms, **task)


def train(large: bool, seed: int, pictures: int, steps: int = 500, teacher: Any = None) -> Any:
    """Train a detector, alone or with a teacher."""
    torch.manual_seed(seed)
    (images, _, targets), student = scenes(pictures, seed=0), detector(large=large)
    distiller = distil(student, teacher)
    optimizer = torch.optim.AdamW(distiller.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        part = torch.randint(pictures, (8,)).tolist()
        optimizer.zero_grad()
        out = distiller(([images[n] for n in part], [targets[n] for n in part]))
        out.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return student.eval()


@torch.no_grad()
def main() -> None:
    """Train a teacher, and of each seed a student alone and one with the teacher; say how good each is."""
    images, _, targets = scenes(100, seed=1)  # not trained with
    with torch.enable_grad():
        teacher = train(True, seed=99, pictures=1000)
        alone = [train(False, seed, pictures=300) for seed in range(3)]
        taught = [train(False, seed, pictures=300, teacher=teacher) for seed in range(3)]
    for name, models in {"teacher": [teacher], "students alone": alone, "students taught": taught}.items():
        scores = [f1(model([*images]), targets) for model in models]
        print(f"{name}: F1 {mean(scores):.1f}", f"(+- {stdev(scores):.1f}, {len(scores)} seeds)" if scores[1:] else "")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
