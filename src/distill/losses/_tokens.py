"""What losses on the similarities of an image's tokens share."""

from torch import Tensor

from distill._checks import check_tensors, make_ready, without_autocast
from distill.losses._vectors import normalize


def token_cosines(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check tokens `(N, L, D)` and give the cosines of each pair of a sample's tokens, `(N, L, L)` on both sides.

    A token that is 0 everywhere has a cosine of 0 with every token.

    Args:
        student: `(N, L, D)`, L at least 2.
        teacher: `(N, L, D')` of the same N and L.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If the inputs are no tokens, N or L differ, there is only one token, an input is empty or not
            floating-point, or the devices differ.
    """
    check_tensors(student, teacher)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "student and teacher must be tokens (N, L, D) of the same shape but for D (nothing is broadcast), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; maps (N, C, H, W) are tokens after "
            ".flatten(2).mT"
        )
    student, teacher = make_ready(student, teacher)
    if student.shape[1] < 2:
        raise ValueError(f"there must be at least 2 tokens, got shape {tuple(student.shape)}")
    student, teacher = normalize(student, dim=-1), normalize(teacher, dim=-1)
    with without_autocast(student):
        return student @ student.mT, teacher @ teacher.mT
