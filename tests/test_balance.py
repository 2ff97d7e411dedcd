"""`calibrate` and `gradient_report`: known answers, shares that come true, and nothing else that changes."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from distill import (
    CTKDLoss,
    Distiller,
    DistillerOutput,
    HintLoss,
    KLLoss,
    LinearLoss,
    LogitLoss,
    MGDLoss,
    QueueKLLoss,
    SPLoss,
    Teachers,
    Term,
    calibrate,
    gradient_report,
)
from models import Checkpointed, Net, batch


class Pull(nn.Module):
    """A quadratic loss of the student alone."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, student, teacher, target=None):
        return self.factor * student.square().sum()


def nets(**terms):
    """A student with batch norm and a wider teacher, and the terms between them."""
    return Distiller(Net(seed=1), Net(width=16, seed=2), terms or {"kl": KLLoss(), "hint": hint()})


def hint(weight=1.0):
    torch.manual_seed(3)
    return Term(HintLoss(8, 16), at="body", weight=weight)


SHARES = {"task": 0.5, "kl": 0.3, "hint": 0.2}


@pytest.fixture(autouse=True)
def _own_random_numbers():
    with torch.random.fork_rng():
        yield


# --- a case with a known answer ---


def quadratic():
    """Least squares, with gradients in closed form: `w` is the student, `v` the teacher."""
    generator = np.random.default_rng(0)
    w, v = generator.normal(size=(1, 3)), generator.normal(size=(1, 3))
    batches = [(generator.normal(size=(4, 3)), generator.normal(size=(4, 1))) for _ in range(3)]
    student, teacher = nn.Linear(3, 1, bias=False).double(), nn.Linear(3, 1, bias=False).double()
    for layer, weight in ((student, w), (teacher, v)):
        layer.weight.data = torch.from_numpy(weight)
    terms = {"logit": Term(LogitLoss(), weight=7.0), "pull": Term(Pull(1e-5), at=(lambda out: out, None), weight=0.1)}
    distiller = Distiller(student, teacher, terms, task_loss=nn.MSELoss(), task_weight=2.0)

    def gradients(x, y):
        s = x @ w.T
        return {"task": 2 * x.T @ (s - y) / 4, "logit": 2 * x.T @ (s - x @ v.T) / 4, "pull": 2e-5 * x.T @ s}

    return distiller, [tuple(map(torch.from_numpy, pair)) for pair in batches], [gradients(*pair) for pair in batches]


def test_weights_of_least_squares_are_those_of_the_closed_form():
    distiller, batches, gradients = quadratic()
    shares = {"task": 0.5, "logit": 0.2, "pull": 0.3}
    weights = calibrate(distiller, batches, shares)
    size = {name: np.mean([np.linalg.norm(g[name]) for g in gradients]) for name in shares}
    expected = {name: 2.0 * (share / size[name]) / (0.5 / size["task"]) for name, share in shares.items()}
    assert weights == pytest.approx(expected, rel=1e-12)
    assert dict(distiller.weights) == weights
    assert weights["task"] == 2.0
    total = sum(weights[name] * size[name] for name in shares)
    for name, share in shares.items():
        assert weights[name] * size[name] / total == pytest.approx(share, rel=1e-12)


def test_report_of_least_squares_is_that_of_the_closed_form():
    distiller, batches, gradients = quadratic()
    report = gradient_report(distiller(*batches[0]), distiller.student.weight)
    weights = {"task": 2.0, "logit": 7.0, "pull": 0.1}
    norms = {name: np.linalg.norm(g) for name, g in gradients[0].items()}
    whole = sum(weights[name] * norms[name] for name in weights)
    assert set(report) == set(weights)
    for name, entry in report.items():
        assert entry.weight == pytest.approx(weights[name], rel=1e-12)
        assert entry.norm == pytest.approx(norms[name], rel=1e-12)
        assert entry.share == pytest.approx(weights[name] * norms[name] / whole, rel=1e-12)
        for other in weights:
            cosine = float((gradients[0][name] * gradients[0][other]).sum()) / (norms[name] * norms[other])
            assert entry.cosines[other] == pytest.approx(cosine, rel=1e-12)
    total = sum(weights[name] * g for name, g in gradients[0].items())
    assert report.norm == pytest.approx(np.linalg.norm(total), rel=1e-12)
    assert (report.reached, report.given, len(report)) == (1, 1, 3)
    table = repr(report).splitlines()
    assert table[0].split() == ["term", "weight", "norm", "share", *["cos", "task", "cos", "logit", "cos", "pull"]]
    assert table[2].split()[:2] == ["logit", "7"]
    assert table[-1].startswith(f"norm of the total {report.norm:.4g}, at 1 of 1 tensors")


def test_values_give_shares_of_the_total_value():
    distiller, batches, _ = quadratic()
    shares = {"task": 0.25, "logit": 0.25, "pull": 0.5}
    weights = calibrate(distiller, iter(batches), shares, by="value")
    with torch.no_grad():
        outs = [distiller(*batch) for batch in batches]
    total = sum(out.loss for out in outs)
    for name, share in shares.items():
        part = weights[name] * sum(out.terms[name] for out in outs)
        torch.testing.assert_close(part / total, torch.tensor(share).double(), rtol=1e-12, atol=1e-12)


# --- properties ---


@pytest.mark.parametrize("shares", [SHARES, {"task": 0.01, "kl": 0.01, "hint": 0.98}])
@pytest.mark.parametrize("weight", [1e-8, 3.0, 1e6])
def test_the_report_shows_the_shares_that_were_asked_for(shares, weight):
    distiller = nets(kl=KLLoss(), hint=hint(weight))
    calibrate(distiller, [batch(16)], shares)
    report = gradient_report(distiller(*batch(16)), distiller.student)
    assert {name: entry.share for name, entry in report.items()} == pytest.approx(shares, rel=1e-5)
    assert (report.reached, report.given) == (4, 6)  # the hint does not see the classifier
    assert distiller.weights["task"] == 1.0


@pytest.mark.parametrize("ask", ["calibrate", "report"])
def test_what_counts_are_the_parameters_that_every_term_reaches(ask):
    distiller = nets()
    out = distiller(*batch(16))
    body = [*distiller.student.body.parameters()]
    norms = {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(loss, body, retain_graph=True)]).norm().item()
        for name, loss in out.losses.items()
    }
    if ask == "report":
        found = {name: entry.norm for name, entry in gradient_report(out, distiller.student.parameters()).items()}
        assert found == pytest.approx(norms)
        assert gradient_report(out, body[:1])["kl"].norm < norms["kl"]
    else:
        weights = calibrate(distiller, [batch(16)], SHARES)
        assert weights["hint"] == pytest.approx(norms["task"] / norms["hint"] * 0.2 / 0.5)
        of_one = calibrate(distiller, [batch(16)], SHARES, parameters=body[:1])
        assert of_one != pytest.approx(weights)
        report = gradient_report(distiller(*batch(16)), body[0])
        assert {name: entry.share for name, entry in report.items()} == pytest.approx(SHARES)


def test_nothing_changes_but_the_weights():
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Unflatten(1, (8, 1, 1)))
    student.append(nn.Sequential(nn.Flatten(), nn.Linear(8, 5)))
    queue = Term(QueueKLLoss(8, 16, queue_size=32), at=("2", "body"))
    drawn = Term(MGDLoss(8, 16), at=("3", "body"), teacher=nn.Unflatten(1, (16, 1, 1)))
    masks = drawn.loss.generator = torch.Generator().manual_seed(5)
    distiller = Distiller(student, Net(width=16), {"queue": queue, "drawn": drawn, "learned": CTKDLoss()})
    distiller.student[4].eval()  # a part of it alone
    (inputs, target), more = batch(8), batch(4)
    distiller(inputs, target).loss.backward()
    before = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    slopes = {name: None if p.grad is None else p.grad.clone() for name, p in distiller.named_parameters()}
    modes = [module.training for module in distiller.modules()]
    state, own = torch.random.get_rng_state(), masks.get_state()
    shares = {"task": 0.4, "queue": 0.2, "drawn": 0.2, "learned": 0.2}
    for options in ({}, {"by": "value"}):
        calibrate(distiller, [(inputs, target), more], shares, **options)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(masks.get_state(), own)
        assert [module.training for module in distiller.modules()] == modes
        assert not any(module.training for module in distiller.teacher.modules())
        for name, tensor in distiller.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for name, parameter in distiller.named_parameters():
            assert (parameter.grad is None) == (slopes[name] is None)
            assert parameter.grad is None or torch.equal(parameter.grad, slopes[name]), name
    assert torch.is_grad_enabled()


def test_weights_stay_as_they_were_where_it_fails():
    distiller = nets(kl=Term(KLLoss(), weight=0.3), hint=hint(5.0))
    before = dict(distiller.weights)
    state = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    inputs, target = batch(8)
    bad = inputs.clone()
    bad[3, 0] = math.nan
    with pytest.raises(ValueError, match="the gradient of term 'task' must be finite, got nan in batch 2"):
        calibrate(distiller, [(inputs, target), (bad, target)], SHARES)
    assert dict(distiller.weights) == before
    for name, tensor in distiller.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_share_of_0_switches_off_and_a_term_that_is_off_may_be_named():
    distiller = nets(kl=Term(KLLoss(), weight=0.0), hint=hint(), pull=Term(Pull(), at=("fc", None), weight=0.0))
    distiller.weights["kl"] = -0.0  # no weight below 0
    weights = calibrate(distiller, [batch(8)], {"task": 0.5, "kl": 0.5, "hint": 0.0})
    assert (weights["hint"], weights["pull"], weights["task"]) == (0.0, 0.0, 1.0)
    assert weights["kl"] > 0
    report = gradient_report(distiller(*batch(8)), distiller.student)
    assert {name: entry.share for name, entry in report.items()} == pytest.approx({"task": 0.5, "kl": 0.5}, rel=1e-5)


def test_which_term_keeps_its_weight():
    def weights(shares, **options):
        distiller = nets(kl=Term(KLLoss(), weight=4.0), hint=hint(-3.0))
        return calibrate(distiller, [batch(8)], shares, **options)

    of_task, of_kl = weights(SHARES), weights(SHARES, keep="kl")
    assert (of_task["task"], of_kl["kl"]) == (1.0, 4.0)
    assert of_kl["task"] / of_kl["kl"] == pytest.approx(of_task["task"] / of_task["kl"])
    assert of_task["hint"] < 0  # a weight keeps its sign
    assert weights({"hint": 0.5, "kl": 0.5, "task": 0.0})["hint"] == -3.0  # the first that is named


def test_without_a_task_and_with_several_teachers():
    teachers = Teachers(first=Net(seed=1), second=Net(seed=2), combine="logits")
    terms = {"kl": KLLoss(), "sp": Term(SPLoss(), at=("body", "first.body"))}
    distiller = Distiller(Net(seed=4), teachers, terms, task_loss=None)
    shares = {"kl": 0.9, "sp": 0.1}
    weights = calibrate(distiller, [batch(8)[0]], shares)
    assert weights["kl"] == 1.0
    report = gradient_report(distiller(batch(8)[0]), distiller.student)
    assert {name: entry.share for name, entry in report.items()} == pytest.approx(shares, rel=1e-5)


def test_a_call_of_ones_own_and_what_wraps_a_distiller():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    distiller = nets()
    inputs, target = batch(8)
    mask = torch.arange(8) < 5
    seen = []

    def call(inner, given):
        seen.append(inner)
        return inner(given["x"], target, mask={"task": mask, "kl": mask}, denominator=5)

    masked = calibrate(Wrapper(distiller), [{"x": inputs}], SHARES, call=call)
    assert seen == [distiller]
    out = distiller(inputs, target, mask={"task": mask, "kl": mask}, denominator=5)
    report = gradient_report(out, distiller.student)
    assert {name: entry.share for name, entry in report.items()} == pytest.approx(SHARES, rel=1e-5)
    assert masked != pytest.approx(calibrate(distiller, [(inputs, target)], SHARES))


def test_losses_that_form_their_gradient_themselves_and_gradients_that_are_sparse():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4, sparse=True)
            self.head = nn.Linear(4, 5)

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    torch.manual_seed(0)
    student, teacher = Tagger(), Tagger()
    tokens, target = torch.arange(6).view(2, 3), torch.arange(6).view(2, 3) % 5
    formed = Distiller(student, teacher, {"kl": KLLoss()})
    linear = Term(LinearLoss(KLLoss(), student.head, teacher.head), at="embed")
    unformed = Distiller(student, teacher, {"kl": linear})
    reports = [gradient_report(each(tokens, target), student) for each in (formed, unformed)]
    for name in ("task", "kl"):
        assert reports[1][name].norm == pytest.approx(reports[0][name].norm, rel=1e-5)
    assert reports[1]["kl"].cosines["task"] == pytest.approx(reports[0]["kl"].cosines["task"], rel=1e-4)


def test_a_gradient_of_0_and_extremes_are_told_as_they_are():
    distiller = nets(kl=Term(KLLoss(), weight=-2.0), none=Term(Pull(0.0), at=("fc", None)))
    report = gradient_report(distiller(*batch(8)), distiller.student)
    assert (report["none"].norm, report["none"].share) == (0.0, 0.0)
    assert math.isnan(report["none"].cosines["task"])
    assert report["kl"].weight == -2.0
    assert report["kl"].share == pytest.approx(1 - report["task"].share)
    huge = nets(kl=KLLoss(), huge=Term(Pull(1e25), at=("fc", None)))
    assert math.isfinite(gradient_report(huge(*batch(8)), huge.student)["huge"].cosines["kl"])  # squares overflow
    nothing = Distiller(Net(), None, {"none": Term(Pull(0.0), at=("fc", None))}, task_loss=None)
    assert math.isnan(gradient_report(nothing(batch(8)[0]), nothing.student)["none"].share)


def test_report_in_low_precision_is_computed_in_float32():
    distiller = nets().bfloat16()
    inputs, target = batch(8)
    report = gradient_report(distiller(inputs.bfloat16(), target), distiller.student)
    assert all(entry.norm > 0 and abs(entry.cosines[name] - 1) < 1e-3 for name, entry in report.items())


# --- refusals ---


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        (
            {"task": 0.5, "kl": 0.5},
            ValueError,
            r"every term that is on, got none for \['hint'\]; 0 switches",
        ),
        ({**SHARES, "hnt": 0.0}, KeyError, r"terms of the Distiller, \['kl', 'hint', 'task'\], got 'hnt'"),
        ({"task": 0.5, "kl": 0.3, "hint": 0.3}, ValueError, r"must add up to 1, got 1\.1"),
        ({"task": 1.5, "kl": -0.5, "hint": 0.0}, ValueError, "'kl' must be finite and not negative, got -0.5"),
        ({"task": math.nan, "kl": 0.5, "hint": 0.0}, ValueError, "'task' must be finite and not negative, got nan"),
        ({"task": True, "kl": 0.0, "hint": 0.0}, TypeError, "the share of 'task' must be a number, got bool"),
        ([0.5, 0.5], TypeError, "shares must be a mapping from names of terms to numbers, got list"),
    ],
)
def test_rejects_shares(shares, error, message):
    with pytest.raises(error, match=message):
        calibrate(nets(), [batch(8)], shares)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "norm"}, ValueError, "by must be 'gradient' or 'value', got 'norm'"),
        ({"by": "value", "parameters": [torch.ones(1, requires_grad=True)]}, ValueError, "must be left out with by="),
        ({"keep": "at"}, KeyError, r"keep must be one of shares, \['task', 'kl', 'hint'\], got 'at'"),
        ({"parameters": [torch.ones(1)]}, ValueError, "must have one that requires a gradient, got 1 without"),
        ({"parameters": [1.0]}, TypeError, "parameters must be tensors, got float"),
        ({"parameters": [torch.ones(1, requires_grad=True)]}, ValueError, "but 'task' reaches none of them"),
        ({"call": lambda inner, given: 1.0}, TypeError, "call must give what a Distiller's call gives, got float"),
    ],
)
def test_rejects_options(options, error, message):
    with pytest.raises(error, match=message):
        calibrate(nets(), [batch(8)], SHARES, **options)


def test_rejects_what_it_cannot_measure():
    distiller = nets()
    with pytest.raises(ValueError, match="at least one batch, got none"):
        calibrate(distiller, [], SHARES)
    with pytest.raises(TypeError, match="got a tensor: one batch goes in as"):
        calibrate(distiller, batch(8)[0], SHARES)
    with pytest.raises(TypeError, match="distiller must be a Distiller, wrapped or not, got Net"):
        calibrate(Net(), [batch(8)], SHARES)
    none = nets(kl=KLLoss(), none=Term(Pull(0.0), at=("fc", None)))
    for by in ("gradient", "value"):
        with pytest.raises(ValueError, match=f"the {by} of term 'none' must be above 0, got 0.0 on average"):
            calibrate(none, [batch(8)], {"task": 0.5, "kl": 0.3, "none": 0.2}, by=by)
    off = nets(kl=Term(KLLoss(), weight=0.0))
    with pytest.raises(ValueError, match="'kl', must have a share and a weight, got a share of 0.5 and a weight of 0"):
        calibrate(off, [batch(8)], {"task": 0.5, "kl": 0.5}, keep="kl")
    apart = nets(kl=KLLoss(), first=Term(Pull(), at=("body.0:input", None)))
    with pytest.raises(ValueError, match="'first' must have a graph"):
        calibrate(apart, [batch(8)], {"task": 0.5, "kl": 0.3, "first": 0.2}, call=in_eval_mode)


def in_eval_mode(distiller, given):
    distiller.eval()  # where a tap without a gradient is no error
    return distiller(*given)


def test_rejects_terms_that_have_no_parameter_in_common():
    student = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    terms = {"first": Term(Pull(), at=("0", None)), "last": Term(Pull(), at=("1", None))}
    out = Distiller(student, None, terms, task_loss=None)(batch(8)[0])
    with pytest.raises(ValueError, match=r"every term reaches, got none in common of .*'first': 0, 'last': 2|'first'"):
        gradient_report(out, student[1])
    halves = DistillerOutput(out.loss, None, None, {}, {"a": student[0].weight.sum(), "b": student[1].weight.sum()})
    with pytest.raises(ValueError, match=r"got none in common of \{'a': 1, 'b': 1\}"):
        gradient_report(halves, student)


def test_rejects_outputs_without_their_graph():
    distiller = nets()
    out = distiller(*batch(8))
    loose = out._replace(loss=out.loss.detach().requires_grad_())
    with pytest.raises(ValueError, match="must be what the Distiller itself gave, not what wraps it"):
        gradient_report(loose, distiller.student)
    out.loss.backward()
    with pytest.raises(ValueError, match="before out.loss.backward"):
        gradient_report(out, distiller.student)
    with torch.no_grad():
        out = distiller(*batch(8))
    with pytest.raises(ValueError, match="term 'task' must have a graph, but it ran under no_grad"):
        gradient_report(out, distiller.student)
    with pytest.raises(TypeError, match="out must give what a Distiller's call gives, got Tensor"):
        gradient_report(out.loss, distiller.student)


def test_rejects_checkpointing_that_autograd_cannot_look_into():
    inputs, target = batch(8)
    for reentrant in (True, False):
        distiller = Distiller(Checkpointed(use_reentrant=reentrant), Net(width=16), {"kl": KLLoss()})
        out = distiller(inputs.clone().requires_grad_(), target)
        if reentrant:
            with pytest.raises(ValueError, match="must be that of use_reentrant=False to look inside"):
                gradient_report(out, distiller.student)
        else:
            assert gradient_report(out, distiller.student).reached == 6


def test_rejects_sharded_parameters():
    distiller = nets()
    sharded = copy.copy(distiller.student.fc.weight)
    sharded = nn.Parameter(distiller.student.fc.weight.detach())
    sharded.device_mesh = None  # as a DTensor has
    with pytest.raises(ValueError, match="parameters must be whole in each process, got sharded ones"):
        calibrate(distiller, [batch(8)], SHARES, parameters=[sharded])
