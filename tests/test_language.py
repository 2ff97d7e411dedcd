"""Labels shifted by one, one mask for all; the pieces of text that two tokenizers share."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from distill import ALMLoss, CrossEntropyLoss, align_tokens, chunk_log_probs, next_tokens


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


def spans(*lengths, start=0):
    """Offsets of tokens that lie next to each other."""
    ends = [start]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(list(itertools.pairwise(ends)))


@pytest.mark.parametrize(
    ("student", "teacher", "ours", "theirs"),
    [
        (spans(2, 3, 4), spans(2, 3, 4), [0, 1, 2], [0, 1, 2]),
        (spans(2, 3, 4), spans(5, 2, 2), [0, 0, 1], [0, 1, 1]),
        (spans(2, 3, 4), spans(9), [0, 0, 0], [0]),
        (spans(3, 3, 3), spans(4, 4, 1), [0, 0, 0], [0, 0, 0]),  # they agree at the ends alone
        (spans(2, 3, 4), spans(2, 3), [0, 1, -1], [0, 1]),  # the teacher's text is cut off
        (spans(2, 3, 4), spans(3, 4, start=2), [-1, 0, 1], [0, 1]),  # at the other end
        (spans(2, 3), spans(4, start=10), [-1, -1], [-1]),
        # one side leaves out the spaces, the other has them in front of a word or as tokens of their own
        (torch.tensor([[0, 5], [6, 11]]), torch.tensor([[0, 5], [5, 11]]), [0, 1], [0, 1]),
        (torch.tensor([[0, 5], [6, 11]]), torch.tensor([[0, 5], [5, 6], [6, 11]]), [0, 1], [0, 1, 1]),
        # two tokens that are one character stay together
        (torch.tensor([[0, 1], [1, 2], [1, 2], [2, 3]]), spans(1, 1, 1), [0, 1, 1, 2], [0, 1, 2]),
        # what has no width: the beginning of a sequence, padding, a mark in the middle
        (torch.tensor([[0, 0], [0, 2], [2, 2], [2, 4], [0, 0]]), spans(2, 2), [-1, 0, -1, 1, -1], [0, 1]),
        (torch.zeros(3, 2).long(), spans(2, 2), [-1, -1, -1], [-1, -1]),
    ],
)
def test_chunks_end_where_tokens_of_both_end(student, teacher, ours, theirs):
    found = align_tokens(student, teacher)
    assert [x.tolist() for x in found] == [ours, theirs]
    assert [x.tolist() for x in align_tokens(teacher, student)] == [theirs, ours]
    assert all(x.dtype == torch.int64 for x in found)


def test_chunks_of_a_batch_are_those_of_its_sequences():
    student = torch.stack([spans(2, 3, 4), spans(1, 1, 1)])
    teacher = torch.stack([spans(5, 4), spans(1, 2)])
    found = align_tokens(student, teacher)
    assert [x.tolist() for x in found] == [[[0, 0, 1], [0, 1, 1]], [[0, 1], [0, 1]]]


def test_chunks_of_random_cuts_are_the_same_text_and_the_shortest():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        cuts = [sorted({0, 30, *torch.randint(1, 30, (8,), generator=generator).tolist()}) for _ in range(2)]
        sides = [torch.tensor(list(itertools.pairwise(cut))) for cut in cuts]
        found = align_tokens(*sides)
        common = sorted(set(cuts[0]) & set(cuts[1]))
        for side, chunks in zip(sides, found, strict=True):
            texts = [(side[chunks == n][0, 0].item(), side[chunks == n][-1, 1].item()) for n in range(len(common) - 1)]
            assert texts == list(itertools.pairwise(common))


def test_chunks_of_real_tokenizers_are_the_same_text_but_for_spaces():
    texts = ["the happy cats sit on the mat — naïve façade, 漢字 😀😀 unhappily", "a café in Zürich: 12,345 € and 😀x"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    by_bytes, by_words = Tokenizer(models.BPE()), Tokenizer(models.WordPiece(unk_token="?"))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"vocab_size": 280, "show_progress": False}
    by_bytes.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    by_words.train_from_iterator(texts, trainers.WordPieceTrainer(special_tokens=["?"], **options))
    for text in texts:
        offsets = [torch.tensor(tokenizer.encode(text).offsets) for tokenizer in (by_bytes, by_words)]
        found = align_tokens(*offsets)
        assert (offsets[0][1:] == offsets[0][:-1]).all(1).any()  # tokens that are parts of one character
        for number in range(int(found[0].max()) + 1):
            pieces = [of[chunks == number] for of, chunks in zip(offsets, found, strict=True)]
            ours, theirs = (text[piece[0, 0] : piece[-1, 1]].strip() for piece in pieces)
            assert ours == theirs
        assert all((chunks >= 0).all() for chunks in found)
        assert found[0].max() >= 10


def test_chunk_log_probs_adds_up_what_was_predicted():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, -4.0, 7.0], [-1.0, -2.0, -3.0, -4.0, 7.0]])
    chunks = torch.tensor([[-1, 0, 0, 1, -1], [0, 0, 1, 2, 2]])  # the second begins without a token before
    sums, whole = chunk_log_probs(log_probs, chunks, num_chunks=4)
    assert sums.tolist() == [[-3.0, -3.0, 0.0, 0.0], [-1.0, -2.0, -7.0, 0.0]]
    assert whole.tolist() == [[True, True, False, False], [False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_of_half_precision_are_added_up_in_float32(dtype):
    log_probs = torch.full((1, 1001), -0.1).to(dtype)
    chunks = torch.tensor([[-1] + [0] * 1000])
    sums, _ = chunk_log_probs(log_probs, chunks, num_chunks=1)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, 1000 * log_probs[:, :1].float(), rtol=1e-5, atol=0)


def test_a_chunk_with_a_token_that_has_no_target_is_not_whole():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, torch.nan]])
    chunks = torch.tensor([[-1, 0, 0, 1]])
    _, mask = next_tokens(torch.tensor([[9, 5, -100, 7]]))  # the second token is a prompt
    log_probs[0, 1] = torch.inf  # of it: it counts nowhere
    sums, whole = chunk_log_probs(log_probs, chunks, mask, num_chunks=2)
    assert sums.tolist() == [[-1.0, -3.0]]
    assert whole.tolist() == [[False, True]]


def test_chunk_log_probs_of_two_tokenizers_are_the_likelihoods_of_the_same_text():
    # Where the probability of a text does not depend on how it is cut, both sides agree and the gradient is 0.
    of_letter = torch.linspace(-2, -1, 9, dtype=torch.float64)
    sides = [torch.cat([torch.zeros(1, 2).long(), spans(*lengths)])[None] for lengths in ((2, 3, 4), (1, 1, 3, 2, 2))]
    sums, wholes = [], []
    for offsets, chunks in zip(sides, align_tokens(*sides), strict=True):
        log_probs = torch.tensor([[of_letter[start:end].sum() for start, end in offsets[0, 1:].tolist()] + [0.0]])
        of_chunk, whole = chunk_log_probs(log_probs.requires_grad_(), chunks, num_chunks=5)
        sums.append(of_chunk)
        wholes.append(whole)
    torch.testing.assert_close(sums[0], sums[1])
    assert torch.equal(*wholes)
    assert wholes[0].tolist() == [[True, True, True, False, False]]
    loss = ALMLoss()(*sums, mask=wholes[0])
    (slope,) = torch.autograd.grad(loss, sums[0])
    assert slope.abs().max() < 1e-12


def test_chunks_are_counted_on_any_device_without_looking():
    sums, whole = chunk_log_probs(torch.zeros(2, 5, device="meta"), torch.zeros(2, 5).long().to("meta"), num_chunks=3)
    assert sums.shape == whole.shape == (2, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "match"),
    [
        ([[0, 2]], spans(2), TypeError, "student_offsets must be a tensor, got list"),
        (spans(2), spans(2).float(), ValueError, r"teacher_offsets must be integers .*, got torch.float32 of shape"),
        (spans(2), torch.zeros(3).long(), ValueError, r"teacher_offsets must be integers .* of shape \(3,\)"),
        (spans(2), torch.zeros(4, 3).long(), ValueError, r"teacher_offsets must be integers .* of shape \(4, 3\)"),
        (spans(2), spans(2)[None], ValueError, r"of the same sequences, got \(1, 2\) and \(1, 1, 2\)"),
        (spans(2), torch.tensor([[3, 2]]), ValueError, "a token must not end before it starts, got 3 to 2"),
        (spans(2), spans(2, 2).flip(0), ValueError, r"in the order of the text, got \[2, 4\] before \[0, 2\]"),
        (spans(2), torch.tensor([[0, 4], [1, 3]]), ValueError, r"in the order of the text, got \[0, 4\] before"),
    ],
)
def test_align_tokens_rejects(student, teacher, error, match):
    with pytest.raises(error, match=match):
        align_tokens(student, teacher)


TOKENS = torch.tensor([[0, 1, 1]])


@pytest.mark.parametrize(
    ("log_probs", "chunks", "options", "error", "match"),
    [
        ([[0.0]], TOKENS, {}, TypeError, "log_probs must be a tensor, got list"),
        (torch.zeros(1, 3), [[0]], {}, TypeError, "chunks must be a tensor, got list"),
        (torch.zeros(3), torch.zeros(3).long(), {}, ValueError, r"must be \(B, T\), .*, got \(3,\)"),
        (TOKENS, TOKENS, {}, ValueError, "log_probs must be floating-point, got torch.int64"),
        (torch.ones(1, 3).to(torch.float8_e5m2), TOKENS, {}, ValueError, "log_probs must have 16 bits or more"),
        (torch.zeros(1, 3), TOKENS[:, :2], {}, ValueError, r"must be \(B, T\), .*of shape \(1, 2\)"),
        (torch.zeros(1, 3), torch.zeros(1, 3), {}, ValueError, "chunks integers, got .*torch.float32"),
        (torch.zeros(1, 3), TOKENS, {"num_chunks": 1}, ValueError, "above the largest chunk, 1, got 1"),
        (torch.zeros(1, 3), TOKENS, {"num_chunks": 0}, ValueError, "num_chunks must be a positive"),
        (torch.zeros(1, 3), TOKENS, {"mask": torch.ones(1, 2)}, ValueError, "mask must be shaped like"),
        (torch.zeros(1, 3), TOKENS, {"mask": [True]}, TypeError, "mask must be a tensor, got list"),
    ],
)
def test_chunk_log_probs_rejects(log_probs, chunks, options, error, match):
    with pytest.raises(error, match=match):
        chunk_log_probs(log_probs, chunks, **{"num_chunks": 2, **options})
