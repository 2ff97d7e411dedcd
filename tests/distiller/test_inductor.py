"""The Distiller through torch.compile's own backend, which turns it into C++: needs a compiler."""

import copy
import shutil

import pytest
import torch

from distill import Distiller, KLLoss, LogitLoss, Term
from models import Net, batch

pytestmark = [
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler on the CPU"
    ),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # inductor's own imports
]


def test_fullgraph_step_with_a_tap_equals_eager():
    torch.compiler.reset()
    losses = {"pool": Term(LogitLoss(), at="fc:input"), "kl": KLLoss()}
    eager = Distiller(Net(), Net(seed=1), losses)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    ours, theirs = compiled(*batch()), eager(*batch())
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward(), theirs.loss.backward()
    for a, b in zip(twin.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
