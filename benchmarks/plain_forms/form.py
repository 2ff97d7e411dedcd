"""What a plain form is."""

from collections.abc import Callable

from torch import Tensor

Form = Callable[..., Tensor]
