"""From token labels to targets and masks."""

import torch
from torch import Tensor

from distill._checks import is_integer


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
