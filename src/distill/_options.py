"""Options of a module that are checked whenever they are set, and shown by `repr`."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from distill._checks import as_constant, check_dim, check_flag
from distill._reduction import check_reduction


class Options(nn.Module):
    """Options by name, each with the check that it must pass whenever it is set; `repr` shows them in this order.

    An option is a constant: of a tensor its number is kept, and one that trains is refused.

    A `reduction`, a `dim` and a `gather` are options too, but not of the formula; `gather` is shown where it is on.
    """

    options: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = {}
    built: ClassVar[Collection[str]] = ()  # options that made the layers: another value later would do nothing

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduction":
            value = check_reduction(value)
        if name == "gather":
            value = check_flag(name, value)
        check = self.options.get(name)
        if name == "dim" and check is None:
            value = check_dim(value)
        value = value if check is None else as_constant(name, check(name, value))
        if name in self.built and self.__dict__.get(name, value) != value:
            raise ValueError(f"{name} made the layers and must stay {self.__dict__[name]!r}, got {value!r}")
        super().__setattr__(name, value)

    def given(self) -> dict[str, Any]:
        """The options of the formula, as they are now."""
        return {name: getattr(self, name) for name in type(self).options}  # as torch.export reads it too

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        shown = {**self.given(), **{name: getattr(self, name) for name in ("reduction", "dim") if hasattr(self, name)}}
        if getattr(self, "gather", False):
            shown["gather"] = True
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
