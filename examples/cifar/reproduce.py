"""The published tables: which networks on which data, and the runs that they take."""

from __future__ import annotations

from dataclasses import dataclass

DATASETS = ("cifar10", "cifar100")
DEPTHS = {"pooled": ((20, 20), (110, 110)), "logits": ((20, 20), (20, 110), (110, 110))}  # student's, teacher's
RUNS = 3  # seeds of the published runs


@dataclass(frozen=True)
class Setting:
    """A row of a published table.

    Attributes:
        student: Depth of the student.
        teacher: Depth of the teacher.
        dataset: Name of the data set.
    """

    student: int
    teacher: int
    dataset: str

    @property
    def key(self) -> str:
        """Name of the setting, as `--only` takes it: the teacher's depth only where it is another."""
        teacher = "" if self.teacher == self.student else f"-{self.teacher}"
        return f"{self.student}{teacher}/{self.dataset}"


def published_settings(recipe: str, only: str | None = None) -> list[Setting]:
    """List the rows of a published table, the cheap ones first.

    Args:
        recipe: Name of the recipe.
        only: Keys of the rows wanted, with commas between them; None for all.

    Returns:
        The settings.

    Raises:
        ValueError: If a key is not that of a row.
    """
    settings = {
        setting.key: setting
        for student, teacher in DEPTHS[recipe]
        for setting in (Setting(student, teacher, dataset) for dataset in DATASETS)
    }
    if only is None:
        return list(settings.values())
    keys = [key.strip() for key in only.split(",")]
    for key in keys:
        if key not in settings:
            raise ValueError(f"a row of recipe {recipe} must be one of {', '.join(settings)}, got {key!r}")
    return [setting for key, setting in settings.items() if key in keys]
