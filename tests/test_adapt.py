"""The adapters: what they give, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from distill import (
    CrossEntropyLoss,
    Distiller,
    DISTLoss,
    DKDLoss,
    KLLoss,
    LinearLoss,
    LogitLoss,
    NKDLoss,
    Term,
    WSLDLoss,
    adapt,
    agreement,
    create_loss,
    get_loss,
    list_losses,
)
from distill.losses._base import RowLoss


def test_channels_last_to_channels_first():
    maps = torch.randn(2, 5, 4, 3)
    out = adapt.NHWC()(maps)
    assert out.shape == (2, 3, 5, 4)
    assert all(out[n, c, h, w] == maps[n, h, w, c] for n, c, h, w in [(0, 0, 0, 0), (1, 2, 4, 3), (1, 1, 2, 0)])


def test_tokens_drops_what_stands_in_front():
    tokens = torch.randn(2, 7, 3)
    assert torch.equal(adapt.Tokens(2)(tokens), tokens[:, 2:])
    assert torch.equal(adapt.Tokens(0)(tokens), tokens)


@pytest.mark.parametrize(("prefix", "grid", "shape"), [(0, None, (3, 3)), (2, None, (3, 3)), (1, (2, 5), (2, 5))])
def test_tokens_become_a_map_row_by_row(prefix, grid, shape):
    tokens = torch.randn(2, prefix + shape[0] * shape[1], 4)
    out = adapt.TokensToMap(prefix, grid)(tokens)
    assert out.shape == (2, 4, *shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            assert torch.equal(out[:, :, row, column], tokens[:, prefix + row * shape[1] + column])


def test_maps_become_tokens_and_maps_again():
    maps = torch.randn(2, 4, 2, 3)
    tokens = adapt.MapToTokens()(maps)
    assert torch.equal(tokens[:, 4], maps[:, :, 1, 1])
    assert torch.equal(adapt.TokensToMap(grid=(2, 3))(tokens), maps)
    with pytest.raises(ValueError, match=r"maps \(N, C, H, W\) must have 4 dimensions, got shape \(2, 6, 4\)"):
        adapt.MapToTokens()(tokens)


def test_selects_from_tuples_mappings_and_objects():
    a, b = torch.zeros(1), torch.ones(1)
    assert adapt.Select(-1)([a, b]) is b
    assert adapt.Select("b")({"a": a, "b": b}) is b
    assert adapt.Select("b")(SimpleNamespace(a=a, b=b)) is b
    assert adapt.Select(0)(SimpleNamespace(to_tuple=lambda: (a, b))) is a


def test_columns_are_the_first_ones():
    logits = torch.randn(2, 3, 9)
    assert torch.equal(adapt.Columns(4)(logits), logits[..., :4])
    assert torch.equal(adapt.Columns(9)(logits), logits)


class _Tokens(torch.nn.Module):
    """Logits of three tokens, with columns for the padding of the vocabulary that nobody uses."""

    def __init__(self, dead=0, offset=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(8, 20))
        self.dead, self.offset = dead, offset

    def forward(self, tokens):
        logits = self.table[tokens] + self.offset
        return torch.cat([logits, logits.new_full((*tokens.shape, self.dead), -3.0)], -1)


@pytest.mark.parametrize("offset", [-1000.0, -30.0, 0.0, 30.0, 1000.0])
def test_dead_columns_of_the_teacher_do_not_count_at_any_offset_of_the_student(offset):
    both, tokens = adapt.Columns(20), torch.tensor([[1, 5, 2], [7, 0, 3]])
    terms = {"kl": Term(KLLoss(2.0), student=both, teacher=both)}
    distiller = Distiller(_Tokens(offset=offset), _Tokens(dead=16), terms)
    out = distiller(tokens, tokens)
    assert out.terms["kl"] < 1e-6
    expected = torch.nn.functional.cross_entropy(out.student.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(out.terms["task"], expected)
    hidden = torch.eye(20)[:6]
    heads = torch.nn.Linear(20, 20), torch.nn.Linear(20, 36)
    with torch.no_grad():
        heads[1].weight[:20], heads[1].bias[:20] = heads[0].weight, heads[0].bias
        heads[0].bias += offset
        heads[1].bias[20:] = 9.0
    assert LinearLoss(KLLoss(2.0), *heads, vocab_size=20)(hidden, hidden) < 1e-6


def test_the_task_loss_keeps_the_whole_softmax_of_a_student_with_more_columns():
    both, tokens = adapt.Columns(20), torch.tensor([[1, 35, 2]])  # a label that the teacher does not know
    student = _Tokens(dead=16)
    out = Distiller(student, _Tokens(), Term(KLLoss(), student=both, teacher=both))(tokens % 8, tokens)
    torch.testing.assert_close(out.terms["task"], CrossEntropyLoss()(student(tokens % 8), tokens))
    assert out.terms["distillation"] < 1e-6


@pytest.mark.parametrize("loss", [DKDLoss(), NKDLoss(), WSLDLoss()])
def test_labels_beyond_the_kept_columns_are_refused(loss):
    both, tokens = adapt.Columns(20), torch.tensor([[1, 5, 2]])
    distiller = Distiller(_Tokens(), _Tokens(dead=16), Term(loss, student=both, teacher=both), task_loss=None)
    distiller(tokens, tokens)
    for label in (20, 35):
        labels = torch.tensor([[1, label, 2]])
        with pytest.raises(ValueError, match=f"target must be classes from 0 to 19, got {label}"):
            distiller(tokens, labels)
        distiller(tokens, labels, mask=labels < 20)


# But for the one that is there for vocabularies that differ.
ROW_LOSSES = [name for name in list_losses() if issubclass(get_loss(name), RowLoss) and name != "uld"]


@pytest.mark.parametrize("name", [*ROW_LOSSES, "dist"])
def test_sizes_that_differ_are_refused_with_both_and_the_way_out(name):
    loss = create_loss(name, *((0.5, 0.5) if name == "alpha_beta" else ()))
    target = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"20 and 36 columns; where the first 20 mean the same .* adapt.Columns\(20\)"):
        loss(torch.rand(2, 3, 20), torch.rand(2, 3, 36), target)
    with pytest.raises(ValueError, match=r"got \(2, 3, 20\) and \(2, 4, 36\)$"):  # it would be no way out
        loss(torch.rand(2, 3, 20), torch.rand(2, 4, 36), target)


def test_there_are_losses_of_rows_and_what_is_not_along_the_columns_gets_no_hint():
    assert len(ROW_LOSSES) > 10
    with pytest.raises(ValueError, match="36 and 20 columns"):
        agreement(torch.rand(2, 36), torch.rand(2, 20))
    for loss in (LogitLoss(dim=1), DISTLoss(dim=1), KLLoss(dim=1)):
        with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 4, 5\)$"):
            loss(torch.rand(2, 3, 5), torch.rand(2, 4, 5))


def test_adapters_have_nothing_to_learn_and_say_what_they_are():
    modules = (adapt.NHWC(), adapt.Tokens(1), adapt.TokensToMap(1, (2, 3)), adapt.Select("x"), adapt.Columns(9))
    assert [repr(module) for module in modules] == [
        "NHWC()",
        "Tokens(1)",
        "TokensToMap(prefix=1, grid=(2, 3))",
        "Select('x')",
        "Columns(9)",
    ]
    assert not any(module.state_dict() for module in modules)


@pytest.mark.parametrize(
    ("adapter", "value", "error", "match"),
    [
        (
            adapt.NHWC(),
            torch.zeros(2, 3, 4),
            ValueError,
            r"maps \(N, H, W, C\) must have 4 dimensions, got shape \(2, 3, ",
        ),
        (adapt.NHWC(), (torch.zeros(2),), TypeError, r"must be a tensor, got tuple; adapt.Select takes an entry"),
        (adapt.Tokens(3), torch.zeros(2, 3, 4), ValueError, r"more than 3 tokens, got shape \(2, 3, 4\)"),
        (adapt.Tokens(1), torch.zeros(2, 3), ValueError, r"tokens \(N, T, C\) must have 3 dimensions"),
        (
            adapt.TokensToMap(),
            torch.zeros(2, 197, 4),
            ValueError,
            r"after 0 tokens there must be a square of patches, got",
        ),
        (
            adapt.TokensToMap(1, (3, 5)),
            torch.zeros(2, 17, 4),
            ValueError,
            r"must be 3 x 5 patches, got 16 in shape",
        ),
        (adapt.TokensToMap(4), torch.zeros(2, 3, 4), ValueError, r"got -1 in shape"),
        (adapt.Columns(5), torch.zeros(2, 4), ValueError, r"must be at least 5 columns, got shape \(2, 4\)"),
        (adapt.Columns(5), torch.tensor(1.0), ValueError, r"must be at least 5 columns, got shape \(\)"),
        (adapt.Columns(5), (torch.zeros(2, 9),), TypeError, "logits must be a tensor, got tuple; adapt.Select"),
        (adapt.Select(2), (1, 2), ValueError, r"an entry 2 that is not None, got 2 entries"),
        (adapt.Select("c"), {"a": 1, "b": 2}, ValueError, r"an entry 'c' .* got a dict with \['a', 'b'\]"),
        (adapt.Select("c"), SimpleNamespace(a=1, c=None), ValueError, r"asked for it \(output_hidden_states=True\)"),
        (adapt.Select(0), torch.zeros(2), TypeError, "an index needs a tuple or list to select from, got Tensor"),
    ],
)
def test_rejects(adapter, value, error, match):
    with pytest.raises(error, match=match):
        adapter(value)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: adapt.Tokens(-1), ValueError, "prefix must be an integer of at least 0, got -1"),
        (lambda: adapt.TokensToMap(0, (2, 0)), ValueError, "grid's W must be a positive integer, got 0"),
        (lambda: adapt.TokensToMap(0, 4), ValueError, r"grid must be a pair \(H, W\) or None, got 4"),
        (lambda: adapt.Columns(1), ValueError, "stop must be an integer of at least 2, got 1"),
        (lambda: adapt.Select(1.5), TypeError, "key must be an index or a name, got 1.5"),
    ],
)
def test_rejects_options(build, error, match):
    with pytest.raises(error, match=match):
        build()
