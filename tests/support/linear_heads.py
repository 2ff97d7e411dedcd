"""Heads and what they see, for the tests of LinearLogitLoss."""

import pytest
import torch
from torch import nn

from distill import LogitLoss, logit_loss
from distill._engine.squared import plan

METHODS = ("gram", "blocks", "factor", "logits")

# torch.compile itself instantiates the Functions that it traces.
traces_functions = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def make(shape=(6,), vocabulary=11, sizes=(4, 7), *, biases="", seed=0, dtype=torch.float64, trains=True):
    """Hidden states, weights and the options with the biases; the student's side wants gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    student, teacher = normal(*shape, sizes[0]).requires_grad_(), normal(*shape, sizes[1])
    student_weight, teacher_weight = normal(vocabulary, sizes[0]).requires_grad_(trains), normal(vocabulary, sizes[1])
    options = {}
    if "s" in biases:
        options["student_bias"] = normal(vocabulary).requires_grad_(trains)
    if "t" in biases:
        options["teacher_bias"] = normal(vocabulary)
    return [student, student_weight, teacher, teacher_weight], options


def formed(student, student_weight, teacher, teacher_weight, student_bias=None, teacher_bias=None):
    functional = nn.functional.linear
    return logit_loss(
        functional(student, student_weight, student_bias), functional(teacher, teacher_weight, teacher_bias)
    )


def heads(sizes=(6, 9), vocabulary=40, *, bias=True, seed=0, dtype=torch.float32, trains=True):
    generator = torch.Generator().manual_seed(seed)
    pair = [nn.Linear(size, vocabulary, bias=bias) for size in sizes]
    with torch.no_grad():
        for parameter in (*pair[0].parameters(), *pair[1].parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    pair[0].requires_grad_(trains)
    pair[1].requires_grad_(False)
    return [head.to(dtype) for head in pair]


def hidden(*shape, sizes=(6, 9), seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(*shape, size, generator=generator, dtype=dtype) for size in sizes]
    return pair[0].requires_grad_(), pair[1]


class LoRA(nn.Module):
    """What adapter libraries put in a layer's place: at the start its outputs are those of the layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def by_logits(pair, states):
    return LogitLoss()(pair[0](states[0]), pair[1](states[1]))


def as_if_large(monkeypatch):
    """Let inputs of any size be as large as those whose logits nobody wants to form."""
    monkeypatch.setattr(plan, "_FORMED", 0)
    monkeypatch.setattr(plan, "_LEAST_OF_OTHERS", 0)
    monkeypatch.setattr(plan, "_PER_CALL", dict.fromkeys(plan._PER_CALL, 0))
