"""A segmentation network teaches a smaller one: pixels and channels are compared; pixels without a label count nowhere.

python examples/segmentation.py   # digits scattered over pictures: minutes of a CPU core

Networks return {"out": logits, "aux": logits}, as torchvision's do. `scenes.py` has data and networks: put yours there.
"""

import argparse
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from distill import CrossEntropyLoss, CWDLoss, Distiller, KLLoss, Term, adapt
from scenes import CLASSES, IGNORED, Segmenter, scenes


def on_labels(out: dict[str, Tensor], labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The task's loss of both heads, the auxiliary one with the usual weight."""
    loss = CrossEntropyLoss()
    return loss(out["out"], labels, mask=mask) + 0.4 * loss(out["aux"], labels, mask=mask)


def distil(student: nn.Module, teacher: nn.Module | None) -> Distiller:
    """Build the Distiller; without a teacher it has the task's loss alone."""
    out, aux = adapt.Select("out"), adapt.Select("aux")
    terms = {
        "pixels": Term(KLLoss(temperature=1.0, dim=1), at=out),
        "channels": Term(CWDLoss(temperature=4.0), at=out, weight=3.0),
        "aux": Term(KLLoss(temperature=1.0, dim=1), at=aux, weight=0.4),
    }
    return Distiller(student, teacher, terms if teacher else {}, task_loss=on_labels, task_output=lambda out: out)


def train(width: int, seed: int, pictures: int, steps: int = 300, teacher: nn.Module | None = None) -> nn.Module:
    """Train a network, alone or with a teacher."""
    torch.manual_seed(seed)
    x, labels, _ = scenes(pictures, seed=0)
    student = Segmenter(width)
    distiller = distil(student, teacher)
    optimizer = torch.optim.AdamW(distiller.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        part = torch.randint(len(x), (8,))
        optimizer.zero_grad()
        distiller(x[part], labels[part], mask=labels[part] != IGNORED).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return student.eval()


@torch.no_grad()
def mean_iou(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Mean over the classes of intersection over union, in percent, of the pixels that have a label."""
    known = labels != IGNORED
    pairs = CLASSES * labels[known] + model(x)["out"].argmax(1)[known]
    counts = pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES).double()
    return 100 * float((counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag()).clamp(min=1)).mean())


def main() -> None:
    """Train a teacher, and of each seed a student alone and one with the teacher; say how good each is."""
    x, labels, _ = scenes(100, seed=1)  # not trained with
    teacher = train(16, seed=99, pictures=1000)
    alone = [train(4, seed, pictures=100) for seed in range(3)]
    taught = [train(4, seed, pictures=100, teacher=teacher) for seed in range(3)]
    for name, models in {"teacher": [teacher], "students alone": alone, "students taught": taught}.items():
        iou = [mean_iou(model, x, labels) for model in models]
        print(f"{name}: mean IoU {mean(iou):.1f}", f"(+- {stdev(iou):.1f}, {len(iou)} seeds)" if iou[1:] else "")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
