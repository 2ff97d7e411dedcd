"""Weights published for other networks against weights from shares of the gradient, on handwritten digits.

python examples/balance.py   # a minute or two; docs/balancing.md says what comes of it

A small student learns from labels and a wider teacher, with one loss at a time beside the cross-entropy: at its
published weight, and at the weight that gives it half of the gradient.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn

from distill import ATLoss, Distiller, PKTLoss, SPLoss, Term, VIDLoss, calibrate, gradient_report

TERMS: dict[str, Callable[[], Term]] = {  # with the weights of the CIFAR-100 benchmark, for ResNets
    "at": lambda: Term(ATLoss(), at="0", weight=1000.0),
    "sp": lambda: Term(SPLoss(), at="0", weight=3000.0),
    "vid": lambda: Term(VIDLoss(8, 64), at="0"),
    "pkt": lambda: Term(PKTLoss(), at="3:input", weight=30000.0),
}


def build(width: int) -> nn.Sequential:
    """Two convolutions, the mean over the positions and a linear layer: (N, 1, 8, 8) -> (N, 10)."""
    first = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
    body = nn.Sequential(*first, *second)
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def batches(digits: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Cut the digits into random batches."""
    order = torch.randperm(len(digits[0]))[: len(digits[0]) // 64 * 64].view(-1, 64)
    return [(digits[0][index], digits[1][index]) for index in order]


def train(distiller: Distiller, digits: tuple[Tensor, Tensor], epochs: int) -> None:
    """Train with a learning rate that rises and falls."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(batches(digits)))
    for images, labels in (batch for _ in range(epochs) for batch in batches(digits)):
        optimizer.zero_grad()
        distiller(images, labels).loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
    distiller.eval()


def main(argv: list[str] | None = None) -> None:
    """Print for each seed the accuracy of the student alone, and with each loss at both weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args(argv)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        digits, test = (x[order[600:]], y[order[600:]]), (x[order[:600]], y[order[:600]])
        train(Distiller(teacher := build(32), None, {}), digits, args.epochs)
        for name, kind in [("alone", ""), *itertools.product(TERMS, ("published", "calibrated"))]:
            torch.manual_seed(seed)  # the same student; its batches come in another order
            distiller = Distiller(build(4), teacher, {name: TERMS[name]()} if kind else {})
            if kind == "calibrated":
                calibrate(distiller, batches(digits)[:4], {"task": 0.5, name: 0.5})
            report = gradient_report(distiller(*batches(digits)[0]), distiller.student)
            train(distiller, digits, args.epochs)
            accuracy = 100 * (distiller.student(test[0]).argmax(1) == test[1]).float().mean()
            share = f"weight {distiller.weights[name]:8.3g}, {report[name].share:.2f} of the gradient" if kind else ""
            print(f"{seed}  {name:6}{kind:12}{accuracy:.1f} %  {share}", flush=True)


if __name__ == "__main__":
    main()
