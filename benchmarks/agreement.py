"""How the error of `linear_logit_loss` in float32 grows as student and teacher agree, beside formed logits.

Two pairs of heads: of equal size, where the student's weight and hidden states approach the teacher's, and of
different sizes, where the same logits come from 64 and from 128 dimensions. Printed is, for logits that differ by r of
their size, the relative error against float64: of the values (the worst of 256 samples), of the gradient for the hidden
states and of that for the weight (in norm). `plain` is the Gram formula written out in float32.
"""

import argparse

import torch
from torch import Tensor

from distill import linear_logit_loss, logit_loss
from distill.losses.linear_logit import Method

SAMPLES, VOCABULARY, SIZE = 256, 8192, 64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def pair(difference: float, *, equal: bool) -> Inputs:
    """Hidden states and weights whose logits differ by about so much of their size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(SAMPLES, SIZE), normal(VOCABULARY, SIZE) / SIZE**0.5
    other, other_weight = normal(SAMPLES, SIZE), normal(VOCABULARY, SIZE) / SIZE**0.5
    if equal:
        half = difference / 2**0.5
        inputs = hidden + half * other, weight + half * other_weight, hidden, weight
    else:
        basis = torch.linalg.qr(normal(2 * SIZE, SIZE)).Q
        wide = weight @ basis.T + other_weight @ torch.linalg.qr(basis, mode="complete").Q[:, SIZE:].T
        inputs = hidden, wide @ basis, (hidden + difference * other) @ basis.T, wide
    student_hidden, student_weight, teacher_hidden, teacher_weight = (tensor.float() for tensor in inputs)
    return student_hidden, student_weight, teacher_hidden, teacher_weight


def formed(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The loss of formed logits."""
    return logit_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)


def plain(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The Gram formula as it stands, in the dtype of its inputs."""
    ours = (student_hidden @ (student_weight.T @ student_weight) * student_hidden).sum(-1)
    cross = (teacher_hidden @ (teacher_weight.T @ student_weight) * student_hidden).sum(-1)
    theirs = (teacher_hidden @ (teacher_weight.T @ teacher_weight) * teacher_hidden).sum(-1)
    return (ours - 2 * cross + theirs) / len(student_weight)


def results(form: str, inputs: Inputs) -> list[Tensor]:
    """Values, gradient for the hidden states and gradient for the weight."""
    hidden, weight, teacher_hidden, teacher_weight = inputs
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(form != "factor")
    given = hidden, weight, teacher_hidden, teacher_weight
    if form in ("formed", "plain"):
        values = {"formed": formed, "plain": plain}[form](*given)
    else:
        method: Method = "factor" if form == "factor" else "gram" if form == "gram" else "blocks"
        values = linear_logit_loss(*given, method=method)
    return [values.detach(), *torch.autograd.grad(values.mean(), [x for x in (hidden, weight) if x.requires_grad])]


def errors(form: str, inputs: Inputs) -> list[float]:
    """Relative errors of values (the worst) and gradients (in norm)."""
    exact = results("formed", tuple(tensor.double() for tensor in inputs))  # type: ignore[arg-type]
    values, *gradients = results(form, inputs)
    worst = ((values - exact[0]).abs() / exact[0]).max().item()
    pairs = zip(gradients, exact[1:], strict=False)
    return [worst, *(((ours - right).norm() / right.norm()).item() for ours, right in pairs)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # there are no options but --help
    for equal in (True, False):
        print(f"\n{'equal' if equal else 'different'} sizes: value / hidden gradient / weight gradient\n")
        forms = ("formed", "plain", "gram", "factor", "blocks")
        print("| r | " + " | ".join(forms) + " |\n|---|" + "---|" * len(forms))
        for power in range(7):
            inputs = pair(10.0**-power, equal=equal)
            cells = (" / ".join(f"{error:.0e}" for error in errors(form, inputs)) for form in forms)
            print(f"| 1e-{power} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
