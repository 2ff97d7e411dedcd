"""next_tokens: labels shifted by one, one mask for all."""

import pytest
import torch
import torch.nn.functional as F

from distill import CrossEntropyLoss, next_tokens


def test_shifts_pads_and_masks():
    labels = torch.tensor([[1, 2, 3, 4], [-100, -100, 5, 6], [7, 8, -100, -100]])
    target, mask = next_tokens(labels)
    assert target.tolist() == [[2, 3, 4, -100], [-100, 5, 6, -100], [8, -100, -100, -100]]
    assert torch.equal(mask, target != -100)
    assert next_tokens(labels.int(), ignore_index=6)[0].tolist()[1] == [-100, 5, 6, 6]


def test_cross_entropy_of_the_whole_equals_that_of_cut_logits():
    logits, labels = torch.randn(3, 6, 9), torch.randint(9, (3, 6))
    labels[1, :4] = -100
    labels[2, 4:] = -100
    target, mask = next_tokens(labels)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(CrossEntropyLoss()(logits, target, mask=mask), expected)
    torch.testing.assert_close(CrossEntropyLoss()(logits, target), expected)


def test_packed_sequences_do_not_predict_each_other():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    target, mask = next_tokens(labels, segments=torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert target.tolist() == [[2, -100, 4, 5, -100, -100]]
    assert mask.sum() == 3


@pytest.mark.parametrize(
    ("labels", "segments", "error", "match"),
    [
        ([[1, 2]], None, TypeError, "labels must be a tensor, got list"),
        (torch.zeros(2, 3), None, ValueError, r"labels must be integers \(B, T\), got torch.float32 of shape \(2, 3\)"),
        (torch.zeros(3).long(), None, ValueError, r"labels must be integers \(B, T\), got torch.int64 of shape \(3,\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 2).long(), ValueError, "segments must be shaped like the labels"),
    ],
)
def test_rejects(labels, segments, error, match):
    with pytest.raises(error, match=match):
        next_tokens(labels, segments=segments)
