"""What is said about models before and after distilling them."""

import numpy as np
import pytest
import torch
from torch import nn

from distill import agreement, tap_shapes
from distill.diagnostics import TapShape
from models import Net, WithLogits, batch


class Everything(nn.Module):
    """A shared head, a module that is never called, what is no tensor, two paths of one module."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)
        self.tied = self.head
        self.lstm = nn.LSTM(3, 2)
        self.unused = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x, *, scale=1.0):
        self.seen += len(x)
        self.last = torch.ones(2)
        h = self.relu(self.norm(x * scale))
        levels = [self.head(h), self.head(input=h[:2])]
        return {"levels": levels, "state": self.lstm(self.drop(levels[0]))[1]}


def test_says_shapes_calls_and_what_is_overwritten_later():
    model, (x, _) = Everything(), batch()
    shapes = tap_shapes(model, {"x": x, "scale": 2.0})
    assert list(shapes) == ["", "norm", "relu", "head", "tied", "lstm", "unused", "drop"]
    assert shapes["norm"] == TapShape(1, ((4, 6),), ((4, 6),), input_overwritten=False, overwritten=True)
    assert shapes["relu"] == TapShape(1, ((4, 6),), ((4, 6),), input_overwritten=True, overwritten=False)
    assert shapes["head"] == TapShape(2, ((4, 6), (2, 6)), ((4, 3), (2, 3)), input_overwritten=False, overwritten=False)
    assert shapes["tied"] == shapes["head"]
    assert shapes["unused"] == TapShape(0, (), (), input_overwritten=False, overwritten=False)
    assert shapes["unused"].shape is None
    assert shapes["lstm"].shape == "[(4, 2), [(1, 2), (1, 2)]]"
    assert shapes[""].shape == "{'levels': [(4, 3), (2, 3)], 'state': [(1, 2), (1, 2)]}"
    assert shapes[""].inputs == ((4, 6),)
    assert len(shapes) == 8


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_torch_jit_runs_has_no_taps_and_keeps_its_buffers():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.seen + 1
            self.seen += 1
            return self.fc(x)

    model = nn.Sequential(torch.jit.script(Counts()), nn.Linear(4, 3))
    assert list(tap_shapes(model, batch()[0])) == ["", "1"]
    assert model[0].seen == 0


def test_parts_that_an_encoder_would_fuse_are_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    shapes = tap_shapes(nn.TransformerEncoder(layer, 1), torch.zeros(2, 4, 8))
    assert shapes["layers.0.linear1"].shape == (2, 4, 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_shows_paths_of_so_many_names_and_models_without_weights():
    with torch.device("meta"):
        inputs = torch.zeros(2, 6)
        model = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3))
    shapes = tap_shapes(model, inputs, depth=1)
    assert {path: entry.shape for path, entry in shapes.items()} == {"": (2, 3), "0": (2, 4), "1": (2, 3)}
    assert list(shapes.order) == ["", "0", "1"]
    assert list(tap_shapes(model, inputs, depth=2)) == list(tap_shapes(model, inputs)) == ["", "0", "0.0", "0.1", "1"]
    with pytest.raises(ValueError, match="depth must be a positive integer, got 0"):
        tap_shapes(model, inputs, depth=0)


def test_prints_as_a_table():
    lines = str(tap_shapes(Everything(), batch()[0])).splitlines()
    assert lines[0].split() == ["path", "calls", "input", "output", "overwritten", "later"]
    assert lines[1].startswith("(the model)  1      (4, 6)           {'levels': [(4, 3), (2, 3)],")
    assert lines[2].split("  ")[0] == "norm"
    assert lines[2].endswith("output")
    assert lines[3].endswith("input")
    assert "(4, 6) | (2, 6)  (4, 3) | (2, 3)" in lines[4]
    assert lines[7].split() == ["unused", "0"]
    long = str(
        tap_shapes(nn.Sequential(type("Many", (nn.Module,), {"forward": lambda self, x: [x] * 40})()), batch()[0])
    )
    assert max(map(len, long.splitlines())) < 120
    assert "..." in long


def test_leaves_the_model_as_it_was():
    model, (x, _) = Everything(), batch()
    model.drop.eval()
    model.requires_grad_(True)
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    dicts = [set(module.__dict__) for module in model.modules()]
    tap_shapes(model, x)
    with pytest.raises(RuntimeError, match="running_mean should contain 7 elements"):
        tap_shapes(model, torch.ones(4, 7))
    assert [module.training for module in model.modules()] == modes
    assert [set(module.__dict__) for module in model.modules()] == dicts
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, values[name]), name


def test_a_model_that_draws_in_eval_mode_leaves_the_random_numbers_as_they_were():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = torch.Generator().manual_seed(3)

        def forward(self, x):
            return x * torch.rand(len(x), 1) * torch.rand(len(x), 1, generator=self.own)

    model = Masked()
    before = torch.get_rng_state(), model.own.get_state()
    with torch.random.fork_rng():
        tap_shapes(model, torch.ones(2, 3))
        assert all(map(torch.equal, (torch.get_rng_state(), model.own.get_state()), before))


def test_a_dropout_in_place_counts_as_in_training():
    from distill import Distiller, LogitLoss, Term

    def network(inplace=True, p=0.5):
        return nn.Sequential(nn.Linear(6, 8), nn.Flatten(), nn.Dropout(p, inplace=inplace), nn.Linear(8, 5))

    x, target = batch()
    shapes = tap_shapes(network(), x)
    assert [path for path, entry in shapes.items() if entry.overwritten] == ["0", "1"]
    assert [path for path, entry in shapes.items() if entry.input_overwritten] == ["1", "2"]
    for harmless in (network(inplace=False), network(p=0.0)):
        assert not any(entry.overwritten or entry.input_overwritten for entry in tap_shapes(harmless, x).values())
    distiller = Distiller(network(), network(), Term(LogitLoss(), at="0"))
    with pytest.raises(ValueError, match="copy=True"):  # as the table says
        distiller(x, target)


def test_builds_no_graph():
    model, seen = nn.Linear(8, 3), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    tap_shapes(model, torch.ones(2, 8))
    assert seen == [False]


def test_takes_inputs_as_the_distiller_does_and_names_what_is_no_tensor():
    x = batch()[0]
    assert tap_shapes(nn.Bilinear(6, 6, 3), (x, x))[""].shape == (4, 3)
    assert tap_shapes(WithLogits(), x)[""].shape == "SimpleNamespace"
    with torch.inference_mode():
        assert tap_shapes(Net(), torch.ones(2, 6))["fc"].shape == (2, 5)
    with pytest.raises(TypeError, match="the model must be an nn.Module, got function"):
        tap_shapes(lambda x: x, x)


def test_a_path_that_it_shows_as_overwritten_is_refused_without_a_copy():
    from distill import Distiller, LogitLoss, Term

    shapes = tap_shapes(Net(inplace=True), batch()[0])
    overwritten = [path for path, entry in shapes.items() if entry.overwritten]
    assert overwritten == ["body.1"]
    for copy in (True, False):
        distiller = Distiller(Net(inplace=True), Net(seed=1), Term(LogitLoss(), at="body.1", copy=copy))
        if copy:
            distiller(*batch())
        else:
            with pytest.raises(ValueError, match="copy=True"):
                distiller(*batch())


def reference(student, teacher, mask):
    """By loops: the weighted share of the samples whose largest logits are at one place."""
    total = count = 0.0
    for index in np.ndindex(mask.shape):
        count += mask[index]
        total += mask[index] * (int(np.argmax(student[index])) == int(np.argmax(teacher[index])))
    return total / count if count else 0.0


def test_agreement_is_the_share_of_equal_first_classes():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 5, 3, generator=generator, dtype=torch.float64)
    teacher = torch.randn(7, 5, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    ones = torch.ones(7, 5)
    for mask in (None, weights, weights > 0.5, ones * 0):
        expected = reference(student.numpy(), teacher.numpy(), (ones if mask is None else mask).double().numpy())
        assert 0.2 < expected < 0.5 or mask is not None
        got = agreement(student, teacher, mask)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    maps = student.permute(0, 2, 1)[..., None]
    torch.testing.assert_close(
        agreement(maps, teacher.permute(0, 2, 1)[..., None], weights[..., None], dim=1),
        agreement(student, teacher, weights),
    )
    assert agreement(student, student + 3.0) == 1
    assert not agreement(student.requires_grad_(), teacher).requires_grad
    assert agreement(student.half(), teacher.half()).dtype == torch.float32


def test_agreement_shows_nan_and_hides_what_the_mask_hides():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
    assert agreement(logits, logits).isnan()
    assert agreement(logits, logits, torch.tensor([True, False])) == 1
    infinite = torch.tensor([[0.0, -torch.inf], [torch.inf, 1.0]])
    assert agreement(infinite, infinite) == 1


def test_rejects_logits_that_cannot_agree():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="must have the same shape"):
        agreement(x, torch.zeros(2, 4))
    with pytest.raises(TypeError, match="teacher must be a tensor, got list"):
        agreement(x, [1.0])
    with pytest.raises(ValueError, match="dim must be given for logits of four dimensions"):
        agreement(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="at least 2 classes"):
        agreement(x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match="mask must be shaped like the per-sample values"):
        agreement(x, x, torch.ones(3))
