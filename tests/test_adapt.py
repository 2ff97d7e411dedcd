"""The adapters: what they give, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from distill import adapt


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


def test_selects_from_tuples_mappings_and_objects():
    a, b = torch.zeros(1), torch.ones(1)
    assert adapt.Select(-1)([a, b]) is b
    assert adapt.Select("b")({"a": a, "b": b}) is b
    assert adapt.Select("b")(SimpleNamespace(a=a, b=b)) is b
    assert adapt.Select(0)(SimpleNamespace(to_tuple=lambda: (a, b))) is a


def test_adapters_have_nothing_to_learn_and_say_what_they_are():
    modules = (adapt.NHWC(), adapt.Tokens(1), adapt.TokensToMap(1, (2, 3)), adapt.Select("x"))
    assert [repr(module) for module in modules] == [
        "NHWC()",
        "Tokens(1)",
        "TokensToMap(prefix=1, grid=(2, 3))",
        "Select('x')",
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
        (lambda: adapt.Select(1.5), TypeError, "key must be an index or a name, got 1.5"),
    ],
)
def test_rejects_options(build, error, match):
    with pytest.raises(error, match=match):
        build()
