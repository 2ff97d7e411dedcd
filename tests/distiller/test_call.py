"""A call: masks and targets by name, weights of 0, outputs of detectors and segmenters, denominators."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill import CrossEntropyLoss, Distiller, HintLoss, KLLoss, LogitLoss, RKDLoss, Term
from models import Net, batch

MASK = torch.tensor([True, False, True, True])


def test_targets_and_masks_by_name():
    seen = {}

    class Notes(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, student, teacher, target=None, *, mask=None):
            seen[self.name] = target, mask
            return (student - teacher).square().mean()

    labels, other = batch()[1], torch.zeros(4)
    distiller = Distiller(Net(), Net(seed=1), {"a": Notes("a"), "b": Notes("b")})
    distiller(batch()[0], {"task": labels, "b": other}, mask={"a": MASK})
    assert seen == {"a": (None, MASK), "b": (other, None)}
    for what in ("target", "mask"):
        match = rf"a mapping as {what} must have names of terms, \['a', 'b', 'task'\], got 'c'"
        with pytest.raises(KeyError, match=match):
            distiller(batch()[0], **{"target": {"task": labels}, what: {"c": labels}})
    with pytest.raises(ValueError, match="the task loss needs a target, got None"):
        distiller(batch()[0], {"a": labels})


def test_batch_losses_are_masked_too():
    distiller = Distiller(Net(), Net(seed=1), {"kl": KLLoss(), "rkd": RKDLoss()}).eval()
    inputs, labels = batch()
    spoilt = inputs.clone()
    spoilt[1] = 1e6
    for name, value in distiller(spoilt, labels, mask=MASK).terms.items():
        torch.testing.assert_close(value, distiller(inputs[MASK], labels[MASK]).terms[name])


def test_a_mask_is_refused_where_the_task_loss_cannot_use_it():
    distiller = Distiller(Net(), Net(seed=1), {"kl": KLLoss()}, task_loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"\['task'\] take none; mask=\{'kl': mask\} gives it to 'kl' alone"):
        distiller(*batch(), mask=MASK)
    distiller(*batch(), mask={"kl": MASK})


class Detector(nn.Module):
    """In training a dict of losses, else detections; a pyramid of three levels and a head that they share."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.levels = nn.ModuleList(nn.Conv2d(3, width, 3, stride=2**k, padding=1) for k in range(3))
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, images, boxes=None):
        scores = [self.head(level(images)) for level in self.levels]
        if self.training:
            return {"box": sum(s.square().mean() for s in scores), "score": scores[0].mean() - boxes.mean()}
        return [s.sigmoid() for s in scores]


def test_a_detector_is_distilled_at_its_pyramid_beside_its_own_losses():
    student, teacher = Detector(4, 0), Detector(8, 1)
    terms = {f"p{k}": Term(HintLoss(4, 8), at=f"levels.{k}", weight=2.0) for k in range(3)}
    total = lambda losses: sum(losses.values())  # noqa: E731
    distiller = Distiller(student, teacher, terms, task_loss=total, task_output=lambda out: out)
    images, boxes = torch.randn(2, 3, 16, 16), torch.rand(2, 4)
    out = distiller((images, boxes), teacher_inputs=images)
    torch.testing.assert_close(out.terms["task"], total(out.student).detach())
    torch.testing.assert_close(out.loss.detach(), out.terms["task"] + 2 * sum(out.terms[f"p{k}"] for k in range(3)))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_a_segmenter_with_an_auxiliary_head_and_ignored_pixels():
    class Segmenter(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.body, self.aux, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            x = self.body(x).relu()
            return {"out": self.head(x), "aux": self.aux(x)}

    main, aux = (lambda out: out["out"]), (lambda out: out["aux"])
    terms = {"kl": KLLoss(dim=1), "aux": Term(KLLoss(dim=1), at=aux, weight=0.4)}
    task = CrossEntropyLoss(ignore_index=255)
    distiller = Distiller(Segmenter(0), Segmenter(1), terms, task_loss=task, output=main)
    labels = torch.randint(5, (2, 6, 6))
    labels[:, :2] = 255
    out = distiller(torch.randn(2, 3, 6, 6), labels, mask=labels != 255)
    out.student["out"].retain_grad()
    out.loss.backward()
    assert (out.student["out"].grad[:, :, :2] == 0).all()
    assert (out.student["out"].grad[:, :, 2:] != 0).any()
    expected = F.cross_entropy(out.student["out"], labels, ignore_index=255)
    torch.testing.assert_close(out.terms["task"], expected.detach())


def test_two_heads_with_labels_of_their_own():
    class Two(Net):
        def __init__(self, seed=0):
            super().__init__(seed=seed)
            self.other = nn.Linear(8, 3)

        def forward(self, x):
            x = self.body(x)
            return self.fc(x), self.other(x)

    class Labelled(nn.Module):
        def forward(self, student, teacher, target):
            return F.cross_entropy(student, target)

    first, second = (lambda out: out[0]), (lambda out: out[1])
    terms = {"kl": KLLoss(), "other": Term(Labelled(), at=(second, None))}
    distiller = Distiller(Two(), Two(1), terms, output=first)
    labels, others = batch()[1], torch.tensor([0, 2, 1, 1])
    out = distiller(batch()[0], {"task": labels, "other": others})
    torch.testing.assert_close(out.terms["task"], F.cross_entropy(out.student[0], labels).detach())
    torch.testing.assert_close(out.terms["other"], F.cross_entropy(out.student[1], others).detach())


def test_the_models_own_loss_is_the_task():
    class Own(Net):
        def forward(self, x, labels):
            logits = super().forward(x)
            return {"logits": logits, "loss": F.cross_entropy(logits, labels)}

    def own(out):
        return out["loss"]

    distiller = Distiller(Own(), Own(seed=1), KLLoss(), task_loss=lambda loss: loss, task_output=own)
    out = distiller(batch())
    torch.testing.assert_close(out.terms["task"], out.student["loss"].detach())


# A weight of 0.


class Poison(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, student, teacher, target=None):
        self.calls += 1
        return (student - teacher).sum() * math.nan * self.scale.sum()


def test_a_weight_of_0_is_off_and_keeps_a_gradient_of_0_for_what_learns():
    student, teacher = Net(), Net(seed=1)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    poison, adapter = Poison(), nn.Linear(8, 8)
    terms = {"bad": Term(poison, at="body", weight=0.0, student=adapter), "kl": KLLoss()}
    distiller = Distiller(student, teacher, terms)
    out = distiller(*batch())
    assert poison.calls == 0
    assert sorted(out.terms) == sorted(out.losses) == ["kl", "task"]
    assert out.loss.isfinite()
    out.loss.backward()
    assert torch.equal(poison.scale.grad, torch.zeros(3))
    assert torch.equal(adapter.weight.grad, torch.zeros(8, 8))
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    assert len(calls) == 1
    distiller.weights["kl"] = 0.0
    distiller(*batch())
    assert len(calls) == 1  # nothing needs the teacher
    distiller.weights["task"] = 0.0
    with pytest.raises(ValueError, match="a term must be on, but all weights are 0"):
        distiller(*batch())
    distiller.weights["kl"] = 1.0
    distiller(batch()[0])  # the task is off and asks for no labels


def test_what_learns_in_a_task_that_is_off_stays_in_the_graph_and_the_total_stays_what_it_is():
    class Margin(nn.Linear):
        def forward(self, student, target):
            return super().forward(student).square().mean()

    class Wide(HintLoss):
        pass

    find, complex_one = nn.Linear(5, 5), Wide(8, 9)
    complex_one.extra = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    distiller = Distiller(
        Net(),
        Net(seed=1),
        {
            "kl": KLLoss(),
            "wide": Term(HintLoss(8, 9).double(), at="body", weight=0.0),
            "meta": Term(HintLoss(8, 9).to("meta"), at="body", weight=0.0),
            "complex": Term(complex_one, at="body", weight=0.0),
        },
        task_loss=Margin(5, 5),
        task_output=find,
        task_weight=0.0,
    )
    out = distiller(*batch())
    assert (out.loss.dtype, out.loss.device.type) == (torch.float32, "cpu")
    out.loss.backward()
    for learned in (distiller.task_loss, find, distiller.losses["wide"], complex_one):
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in learned.parameters())


def test_what_one_loss_changes_in_place_is_not_compared_by_the_next():
    def margin(logits, target):
        logits[torch.arange(len(target)), target] -= 1.0
        return F.cross_entropy(logits, target)

    inputs, labels = batch()
    distiller = Distiller(Net(), Net(seed=1), KLLoss(), task_loss=margin)
    with pytest.raises(ValueError, match=r"what term 'distillation' compares must stay .* before it, \['task'\]"):
        distiller(inputs, labels)
    relu = nn.ReLU(inplace=True)
    for side in ("student", "teacher"):
        terms = {"a": Term(HintLoss(), at="body.0", **{side: relu}), "b": Term(HintLoss(), at="body.0")}
        models = [nn.Sequential() for _ in range(2)]
        for seed, model in enumerate(models):
            model.body = nn.Sequential(Net(seed=seed).body[0])
        with pytest.raises(ValueError, match=r"what term 'b' compares must stay .* before it, \['a'\]"):
            Distiller(*models, terms, task_loss=None)(inputs)
        Distiller(*models, terms["a"], task_loss=None)(inputs).loss.backward()  # nobody else sees it


def test_inputs_that_a_model_changes_in_place_are_not_what_the_other_side_is_compared_with():
    class Scales(Net):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    inputs, labels = batch()
    with pytest.raises(ValueError, match="the teacher must leave its inputs as they are"):
        Distiller(Net(), Scales(seed=1), KLLoss())(inputs.clone(), labels)
    Distiller(Net(), Scales(seed=1), KLLoss())(inputs, labels, teacher_inputs=inputs.clone())
    for data in ([inputs], SimpleNamespace(x=inputs)):

        class Replaces(Net):
            def forward(self, data):
                if isinstance(data, list):
                    data[0] = 2.0 * data[0]
                    return super().forward(data[0])
                data.x = 2.0 * data.x
                return super().forward(data.x)

        with pytest.raises(ValueError, match="the teacher must leave its inputs as they are"):
            Distiller(Replaces(), Replaces(seed=1), KLLoss())(data, labels)
    with pytest.raises(ValueError, match=r"what term 'distillation' compares must stay .* or the student's forward"):
        Distiller(Scales(), lambda x: x[:, :5], KLLoss())(inputs.clone(), labels)


def test_a_cache_that_the_teacher_fills_is_not_what_the_student_reads():
    class Cache:  # of keys and values, as language models fill it
        def __init__(self):
            self.layers = []

        def get_seq_length(self):
            return len(self.layers)

    class Remembers(Net):
        def forward(self, x, cache):
            cache.layers.append(SimpleNamespace(keys=x + 1))
            return super().forward(sum(layer.keys for layer in cache.layers))

    inputs, labels = batch()
    distiller = Distiller(Remembers(), Remembers(seed=1), KLLoss())
    with pytest.raises(
        ValueError, match=r"leave its inputs as they are.* a cache that it filled\); teacher_inputs= take"
    ):
        distiller({"x": inputs, "cache": Cache()}, labels)
    out = distiller({"x": inputs, "cache": Cache()}, labels, teacher_inputs=(inputs, Cache()))
    torch.testing.assert_close(out.loss, Distiller(Net(), Net(seed=1), KLLoss())(inputs + 1, labels).loss)


def test_an_adapter_of_the_student_alone_gets_no_gradient_of_nan_through_a_weight_of_0():
    distiller = Distiller(Net(), Net(seed=1), {"bad": Term(Poison(), weight=0.0)})
    with torch.no_grad():
        distiller.losses["bad"].scale.fill_(math.inf)
    out = distiller(*batch())
    out.loss.backward()
    assert out.loss.isfinite()
    assert torch.equal(distiller.losses["bad"].scale.grad, torch.zeros(3))


def test_classes_that_come_last_are_told_the_loss_that_fits():
    class Tokens(Net):
        def forward(self, x):
            return super().forward(x).unsqueeze(1).expand(-1, 7, -1)

    distiller = Distiller(Tokens(), Tokens(seed=1), KLLoss(), task_loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"got logits \(4, 7, 5\) and labels \(4, 7\): distill.CrossEnt"):
        distiller(batch()[0], torch.zeros(4, 7, dtype=torch.long))


def test_losses_have_their_graph():
    distiller = Distiller(Net(), Net(seed=1), {"kl": Term(KLLoss(), weight=3.0)})
    out = distiller(*batch())
    (gradient,) = torch.autograd.grad(out.losses["kl"], distiller.student.fc.weight, retain_graph=True)
    assert gradient.abs().max() > 0
    assert not out.terms["kl"].requires_grad
    torch.testing.assert_close(out.loss, out.losses["task"] + 3 * out.losses["kl"])
    assert out[0] is out.loss
    assert out[3] is out.terms


# Denominators.


@pytest.mark.parametrize("task_loss", [CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=-100)])
def test_micro_batches_over_a_denominator_give_the_gradient_of_the_whole(task_loss):
    inputs, labels = batch(12)
    labels[3] = -100
    terms = {"kl": KLLoss(), "hint": Term(HintLoss(8, 8), at="body")}
    distiller = Distiller(Net(), Net(seed=1), terms, task_loss=task_loss).eval().double()
    masks = torch.ones(12, dtype=torch.bool)
    masks[3] = False
    options = {"kl": masks, "hint": masks}

    def gradients(*pieces):
        distiller.zero_grad()
        for piece in pieces:
            mask = {name: value[piece] for name, value in options.items()}
            distiller(inputs[piece].double(), labels[piece], mask=mask, denominator=11).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in distiller.named_parameters()}

    distiller.train(False).requires_grad_(True)
    distiller.teacher.requires_grad_(False)
    distiller.zero_grad()
    distiller(inputs.double(), labels, mask=options).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in distiller.named_parameters()}
    torch.testing.assert_close(gradients(slice(0, 5), slice(5, 12)), whole, rtol=1e-10, atol=1e-12)


def test_a_denominator_is_refused_where_a_mean_cannot_become_a_sum():
    class Mean(nn.Module):
        reduction = "mean"

        def forward(self, student, teacher, target=None):
            return (student - teacher).square().mean()

    with pytest.raises(ValueError, match="term 'distillation': a loss whose mean .* keyword denominator, got Mean"):
        Distiller(Net(), Net(seed=1), Mean())(*batch(), denominator=4)
    task = Distiller(Net(), Net(seed=1), KLLoss(), task_loss=lambda s, t: F.cross_entropy(s, t))
    with pytest.raises(ValueError, match="a task loss whose mean becomes a sum must take a keyword denominator"):
        task(*batch(), denominator=4)

    class Focal(nn.CrossEntropyLoss):  # its forward may be a mean, whatever its reduction says
        def forward(self, logits, target):
            return F.cross_entropy(logits, target, reduction="none").square().mean()

    for other in (nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss(weight=torch.ones(5)), Focal()):
        own = Distiller(Net(), Net(seed=1), KLLoss(), task_loss=other)
        with pytest.raises(ValueError, match="or be nn.CrossEntropyLoss or nn.NLLLoss without class weights"):
            own(batch()[0], torch.rand(4, 5), denominator=4)
    for bad in (-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="denominator must be zero or positive and finite"):
            task(*batch(), denominator=bad)
    with pytest.raises(TypeError, match="denominator must be a number, got str"):
        task(*batch(), denominator="3")
    with pytest.raises(ValueError, match="denominator must come with reduction='mean', got reduction='sum'"):
        LogitLoss(reduction="sum")(torch.zeros(2, 3), torch.ones(2, 3), denominator=2)
