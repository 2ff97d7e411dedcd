"""Which form of two linear heads' squared difference is cheapest: what each costs."""

from typing import NamedTuple

import torch

# Logits that are formed whole: 32 MB in float32, and as much again for the teacher's and for the gradient.
_FORMED = 2**23
# Differences of logits that are kept for backward: 128 MB in float32. More are computed again.
KEPT = 2**25
# A float64 multiply-add in those of float32: GPUs that compute it at full rate, and others.
_GPUS_WITH_FULL_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
_FLOAT64_COST = {True: 2.0, False: 64.0}
# What it costs to write, subtract and square one logit, in multiply-adds; measured on a CPU.
_PER_LOGIT = 100.0
# What it costs to read one number of a kept weight, to see whether it has changed; measured on a CPU.
_PER_READ = 10.0
# What a call costs however small it is, in multiply-adds; measured on a CPU.
_PER_CALL = {"logits": 0.0, "blocks": 1e7, "gram": 4e7, "factor": 1e7}
# And on a GPU, which multiplies some hundred times as fast while its calls take as long; not measured.
_CALLS_ON_GPU = 300
_LEAST_OF_OTHERS = min(cost for name, cost in _PER_CALL.items() if name != "logits")
# Calls over which the factor, computed once, is expected to be used.
_CALLS = 100


class Plan(NamedTuple):
    """Which form is taken, and why.

    Attributes:
        method: `"factor"`, `"gram"`, `"blocks"` or `"logits"`.
        costs: The estimate for every form that can be taken, in 10^9 float32 multiply-adds.
        reason: The same in words.
    """

    method: str
    costs: dict[str, float]
    reason: str


class Size(NamedTuple):
    """All that the costs depend on.

    Attributes:
        samples: N, how many hidden states there are.
        vocabulary: V, the rows of both heads.
        columns: Columns of the student's head, one more with a bias.
        teacher_columns: Columns of the teacher's head.
        device: Where it will run.
        trains: Whether the student's head gets a gradient.
        may_factor: Whether a factor may be taken: nothing in the heads is trained, and it can be kept between calls.
        keeps_teacher: Whether the teacher's own Gram matrix is kept between calls.
        early: Whether gradients are formed together with the values.
    """

    samples: int
    vocabulary: int
    columns: int
    teacher_columns: int
    device: torch.device
    trains: bool
    may_factor: bool
    keeps_teacher: bool
    early: bool

    def costs(self) -> dict[str, float]:
        """Estimate forward and backward of every form that can be taken, in 10^9 float32 multiply-adds."""
        n, v, a, t = self.samples, self.vocabulary, self.columns, self.teacher_columns
        logits = n * v * (a + t + _PER_LOGIT)
        backward = n * v * a * (2 if self.trains else 1)
        again = logits if self.trains and not self.early and n * v > KEPT else 0
        costs = {"blocks": logits + backward + again}
        if n * v <= _FORMED:
            costs["logits"] = logits + backward
        if has_float64(self.device):
            wide = _float64_cost(self.device)
            # Products of hidden states forward, and backward for the hidden states.
            small = n * (a * (a + t) + t * t) + n * a * a
            gram = v * a * (a + t) + (0 if self.keeps_teacher else v * t * t)
            costs["gram"] = wide * (small + gram + ((v + n) * a * (a + t) if self.trains else 0))
            if self.keeps_teacher:
                costs["gram"] += v * t * _PER_READ
            if self.may_factor:
                costs["factor"] = wide * (small + 4 * v * (a + t) ** 2 / _CALLS) + v * (a + t) * _PER_READ
        calls = _CALLS_ON_GPU if self.device.type == "cuda" else 1
        return {name: (cost + calls * _PER_CALL[name]) / 1e9 for name, cost in costs.items()}

    def explain(self) -> Plan:
        """Give the cheapest form and the reason."""
        costs = self.costs()
        method = cheapest(costs)
        heads = (
            "the student's head trains"
            if self.trains
            else "the heads are frozen"
            if self.may_factor
            else "no factor is kept"
        )
        reason = (
            f"{method}: N={self.samples}, V={self.vocabulary}, {self.columns} and {self.teacher_columns} columns on "
            f"{self.device.type}, {heads}; in 10^9 float32 multiply-adds: "
            + ", ".join(f"{name} {cost:.3g}" for name, cost in costs.items())
        )
        return Plan(method, costs, reason)


def is_tiny(samples: int, vocabulary: int, columns: int, teacher_columns: int) -> bool:
    """Whether any other form costs more in itself than forming the logits, so that comparing would only take time.

    Args:
        samples: N.
        vocabulary: V.
        columns: Columns of the student's head, without the bias.
        teacher_columns: Columns of the teacher's head.
    """
    return samples * vocabulary * (3 * columns + 3 + teacher_columns + _PER_LOGIT) < _LEAST_OF_OTHERS


def cheapest(costs: dict[str, float]) -> str:
    """Give the form of the lowest cost."""
    method = "blocks"
    for name, cost in costs.items():
        if cost < costs[method]:
            method = name
    return method


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64 at all."""
    return device.type != "mps"


def _float64_cost(device: torch.device) -> float:
    # A CPU computes in float32 first, and seldom again.
    if device.type != "cuda":
        return 1.0
    return _FLOAT64_COST[torch.cuda.get_device_capability(device) in _GPUS_WITH_FULL_FLOAT64]
