"""The function and the class of a loss have the same defaults."""

import inspect

import pytest

import distill

PAIRS = [
    (getattr(distill, f"{name}_loss"), distill.get_loss(name))
    for name in distill.list_losses()
    if hasattr(distill, f"{name}_loss")
]


@pytest.mark.parametrize(("function", "cls"), PAIRS, ids=lambda thing: thing.__name__)
def test_function_and_class_have_the_same_defaults(function, cls):
    ours, theirs = (inspect.signature(thing).parameters for thing in (function, cls))
    for name in ours.keys() & theirs.keys():
        assert ours[name].default == theirs[name].default, name
