"""The Distiller through torch.compile's own backend, which turns it into C++: needs a compiler."""

import copy

import pytest
import torch

from compilers import needs_compiler, one_library
from distill import Distiller, KLLoss, LogitLoss, Term
from models import Net, batch

pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # inductor's own imports
]


@pytest.fixture(autouse=True)
def _one_library():
    with one_library():
        yield


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


def test_a_tap_before_an_operation_in_place_sees_what_the_module_gave():
    # Compiled without a copy, the tap saw the batch norm's map after the ReLU: 0.4498 for 1.0895.
    torch.compiler.reset()
    torch.manual_seed(0)
    at = Term(LogitLoss(), at="body.1", copy=True)
    eager = Distiller(Net(inplace=True), Net(seed=1, inplace=True), at, task_loss=None)
    plain = Distiller(Net(), Net(seed=1), Term(LogitLoss(), at="body.1"), task_loss=None)
    twin = copy.deepcopy(eager)
    uncopied = Distiller(Net(inplace=True), Net(seed=1, inplace=True), Term(LogitLoss(), at="body.1"), task_loss=None)
    x, _ = batch()
    expected = plain(x)
    expected.loss.backward()
    for distiller in (eager, torch.compile(twin, fullgraph=True), torch.compile(uncopied, fullgraph=True)):
        out = distiller(x)
        torch.testing.assert_close(out.loss, expected.loss)
        out.loss.backward()
    for distiller in (eager, twin, uncopied):
        for a, b in zip(distiller.student.body.parameters(), plain.student.body.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
