"""From token labels to targets and masks, and from the tokens of two tokenizers to pieces of text that both know."""

import torch
from torch import Tensor

from distill._checks import check_count, check_numbers, check_tensor, is_integer, may_look


def next_tokens(labels: Tensor, ignore_index: int = -100, *, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shift token labels by one, for models that predict the next token.

    Position t of the target is the label of position t + 1; the last position has none. Logits, hidden states and masks
    are not cut: one mask serves all of them.

    Args:
        labels: Token ids, `(B, T)`, as the model's own loss takes them: not shifted, `ignore_index` where nothing is to
            be learned (padding, prompts).
        ignore_index: The label that means "none".
        segments: Which sequence each position belongs to, `(B, T)`, where several are packed into one row: the last
            position of a sequence does not predict the first of the next one. Any integers that change at the borders.

    Returns:
        The target, `(B, T)`, int64, `ignore_index` where there is none; and the mask, `(B, T)`, bool, of where it is.

    Raises:
        TypeError: If labels or segments are no tensor.
        ValueError: If labels are no integers `(B, T)`, or the segments have another shape.

    Examples:
        >>> import torch
        >>> from distill import next_tokens
        >>> target, mask = next_tokens(torch.tensor([[5, 6, 7, -100]]))
        >>> target
        tensor([[   6,    7, -100, -100]])
        >>> mask
        tensor([[ True,  True, False, False]])
    """
    for name, tokens in (("labels", labels), ("segments", segments)):
        if tokens is None and name == "segments":
            continue
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tokens).__name__}")
        if tokens.ndim != 2 or not is_integer(tokens):
            raise ValueError(f"{name} must be integers (B, T), got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if segments is not None and segments.shape != labels.shape:
        raise ValueError(f"segments must be shaped like the labels, {tuple(labels.shape)}, got {tuple(segments.shape)}")
    following = labels[:, 1:].long()
    if segments is not None:
        following = following.masked_fill(segments[:, 1:] != segments[:, :-1], ignore_index)
    target = torch.nn.functional.pad(following, (0, 1), value=ignore_index)
    return target, target != ignore_index


def align_tokens(student_offsets: Tensor, teacher_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a text into the shortest chunks that end where tokens of both tokenizers end.

    It runs on the CPU, token by token: do it where the batches are made.

    Args:
        student_offsets: Where each of the student's tokens starts and ends in the text, `(T, 2)` or `(B, T, 2)`,
            integers: bytes of the UTF-8 text, or anything that both sides count alike. `return_offsets_mapping=True` of
            fast tokenizers counts characters, which serves as well: tokens that are parts of one character stay
            together. A token of no width, such as padding or one that begins the sequence, belongs to no chunk.
        teacher_offsets: The same of the teacher's tokens, with its own T, in the same text.

    Returns:
        The number of the chunk of each token, `(T,)` or `(B, T)`, int64, from 0 in each sequence; -1 where a token
        belongs to none: it has no width, or lies before the first or after the last place where both agree. What only
        one side leaves out between two tokens (a space) goes with the chunk that it stands in.

    Raises:
        TypeError: If the offsets are no tensors.
        ValueError: If they are no integers `(T, 2)` or `(B, T, 2)`, the batches differ, a token ends before it starts,
            or tokens are not in the order of the text.

    Examples:
        >>> import torch
        >>> from distill import align_tokens
        >>> student = torch.tensor([[0, 2], [2, 5], [5, 9]])  # un|hap|pily
        >>> teacher = torch.tensor([[0, 5], [5, 7], [7, 9]])  # unhap|pi|ly
        >>> align_tokens(student, teacher)
        (tensor([0, 0, 1]), tensor([0, 1, 1]))
    """
    sides = {"student_offsets": student_offsets, "teacher_offsets": teacher_offsets}
    for name, offsets in sides.items():
        if not isinstance(offsets, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(offsets).__name__}")
        if offsets.ndim not in (2, 3) or offsets.shape[-1] != 2 or not is_integer(offsets):
            raise ValueError(
                f"{name} must be integers (T, 2) or (B, T, 2), got {offsets.dtype} of shape {tuple(offsets.shape)}"
            )
    if student_offsets.shape[:-2] != teacher_offsets.shape[:-2]:
        raise ValueError(
            "student_offsets and teacher_offsets must be of the same sequences, "
            f"got {tuple(student_offsets.shape)} and {tuple(teacher_offsets.shape)}"
        )
    rows = [offsets.reshape(-1, *offsets.shape[-2:]).tolist() for offsets in sides.values()]
    chunks = [_align(ours, theirs) for ours, theirs in zip(*rows, strict=True)]
    found = [
        torch.tensor([pair[side] for pair in chunks], dtype=torch.int64, device=offsets.device).reshape(
            offsets.shape[:-1]
        )
        for side, offsets in enumerate(sides.values())
    ]
    return found[0], found[1]


def _align(student: list[list[int]], teacher: list[list[int]]) -> tuple[list[int], list[int]]:
    ours, theirs = _boundaries(student), _boundaries(teacher)
    found = [-1] * len(student), [-1] * len(teacher)
    i = j = 0
    last: tuple[int, int] | None = None
    number = 0
    while i < len(ours) and j < len(theirs):
        (low, high, k), (other_low, other_high, other_k) = ours[i], theirs[j]
        if max(low, other_low) <= min(high, other_high):
            if last is not None:
                for chunks, start, end in ((found[0], last[0], k), (found[1], last[1], other_k)):
                    chunks[start:end] = [number] * (end - start)
                number += 1
            last = k, other_k
            i, j = i + 1, j + 1
        elif high < other_low:
            i += 1
        else:
            j += 1
    for chunks, tokens in zip(found, (student, teacher), strict=True):
        for n, (start, end) in enumerate(tokens):
            if start == end:
                chunks[n] = -1
    return found


def _boundaries(tokens: list[list[int]]) -> list[tuple[int, int, int]]:
    """Where a text may be cut: from where to where in the text, and how many tokens lie before.

    Between two tokens that may be a gap, such as a space that neither holds. Tokens that overlap cannot be cut apart:
    the end of that range lies before its start, so that it meets no other.
    """
    found: list[tuple[int, int, int]] = []
    before: list[int] = []
    for n, (start, end) in enumerate(tokens):
        if end < start:
            raise ValueError(f"a token must not end before it starts, got {start} to {end}")
        if start == end:
            continue
        if not before:
            found.append((start, start, n))
        elif start < before[0] or end < before[1]:
            raise ValueError(f"tokens must be in the order of the text, got {before} before {[start, end]}")
        else:
            found.append((before[1], start, n))
        before = [start, end]
    return [*found, (before[1], before[1], len(tokens))] if before else []


def chunk_log_probs(
    log_probs: Tensor, chunks: Tensor, mask: Tensor | None = None, *, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """Add up the tokens' log-probabilities in each chunk.

    Args:
        log_probs: What the model gives the next token at each position, `(B, T)`: at position t that of token t + 1, as
            `next_tokens` shifts targets. It is minus the cross-entropy with a reduction of `"none"`.
        chunks: The chunk of each token, `(B, T)`, as `align_tokens` gives it: not shifted.
        mask: Which positions have a target, `(B, T)`, as `next_tokens` gives it. None: all but the last.
        num_chunks: The largest number of chunks of a sequence, the same for student and teacher; at least
            `chunks.max() + 1`.

    Returns:
        The sums, `(B, num_chunks)`, in float32 or wider, 0 where there is no chunk; and a mask of the chunks that are
        whole, `(B, num_chunks)`: those of which every token has a target. The first token of a sequence has none.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If the shapes or kinds of numbers do not fit, or a chunk has a number that is too large.

    Examples:
        >>> import torch
        >>> from distill import chunk_log_probs
        >>> log_probs = torch.tensor([[-1.0, -2.0, -3.0, 0.0]])  # of the tokens 1, 2 and 3
        >>> chunks = torch.tensor([[0, 1, 1, 2]])  # token 0, which no position predicts, is a chunk of its own
        >>> chunk_log_probs(log_probs, chunks, num_chunks=3)
        (tensor([[ 0., -3., -3.]]), tensor([[False,  True,  True]]))
    """
    check_tensor("log_probs", log_probs)
    check_tensor("chunks", chunks)
    check_count("num_chunks", num_chunks)
    if not log_probs.is_floating_point():
        raise ValueError(f"log_probs must be floating-point, got {log_probs.dtype}")
    check_numbers("log_probs", log_probs)
    if log_probs.ndim != 2 or chunks.shape != log_probs.shape or not is_integer(chunks):
        raise ValueError(
            "log_probs and chunks must be (B, T), and chunks integers, got "
            f"{tuple(log_probs.shape)} and {chunks.dtype} of shape {tuple(chunks.shape)}"
        )
    if mask is not None:
        check_tensor("mask", mask)
        if mask.shape != log_probs.shape:
            raise ValueError(f"mask must be shaped like log_probs, {tuple(log_probs.shape)}, got {tuple(mask.shape)}")
    if may_look(chunks) and chunks.numel() and int(chunks.max()) >= num_chunks:
        raise ValueError(f"num_chunks must be above the largest chunk, {int(chunks.max())}, got {num_chunks}")
    counted = torch.ones_like(chunks[:, 1:], dtype=torch.bool) if mask is None else mask[:, :-1].bool()
    of_next = chunks[:, 1:].long()
    place = of_next.clamp(min=0)
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))  # sums of many numbers
    log_probs = log_probs[:, :-1].masked_fill(~counted | (of_next < 0), 0.0)
    sums = log_probs.new_zeros(len(log_probs), num_chunks).scatter_add(1, place, log_probs)

    def count(tokens: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(sums, dtype=torch.int64).scatter_add(1, index, tokens.long())

    predicted = count(counted & (of_next >= 0), place)
    of_all = count(chunks >= 0, chunks.long().clamp(min=0))
    return sums, (predicted == of_all) & (of_all > 0)
