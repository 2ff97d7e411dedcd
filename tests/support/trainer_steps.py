"""Steps of a Trainer beside those taken by hand."""

import torch

from distill import next_tokens


def change(distiller, before):
    return {name: before[name] - value for name, value in distiller.state_dict().items()}


def step_by_hand(distiller, pieces):
    """The gradient of the mean over all tokens of the pieces; each is (inputs, target, mask)."""
    count = sum(int(mask.sum()) for *_, mask in pieces)
    for inputs, target, mask in pieces:
        distiller(inputs, target, mask=mask, denominator=count).loss.backward()
    return {name: parameter.grad for name, parameter in distiller.named_parameters() if parameter.grad is not None}


def assert_step(distiller, before, gradients, **tolerance):
    moved = {name: value for name, value in change(distiller, before).items() if value.any()}
    assert set(moved) == {name for name, gradient in gradients.items() if gradient.any()}
    for name, value in moved.items():
        torch.testing.assert_close(value, 0.1 * gradients[name], **{"rtol": 1e-4, "atol": 2e-7, **tolerance})


def shifted(batch, **options):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return (inputs, *next_tokens(batch["labels"], **options))
