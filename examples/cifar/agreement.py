"""How often a trained network and its teacher predict the same class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from cifar.checkpoints import RunFiles
from cifar.data import Dataset
from cifar.settings import RunConfig
from cifar.steps import predict
from cifar.training import build_student, build_teacher


def measure_agreement(runs: Iterable[RunConfig], out: Path, datasets: Mapping[str, Dataset]) -> None:
    """Add the agreement to the numbers of every finished run that lacks it and whose teacher is finished.

    A baseline is compared with the teacher of its own depth.

    Args:
        runs: The runs.
        out: The output folder.
        datasets: The data sets by name, on the device to compute on.

    Raises:
        CheckpointError: If a file of a run is unreadable, or was made with other settings.
    """
    predictions: dict[RunConfig, Tensor] = {}
    for run in runs:
        teacher = None if run.method == "teacher" else run.teacher_config()
        if teacher is None or not RunFiles.of(out, teacher).result.exists():
            continue
        files, data = RunFiles.of(out, run), datasets[run.dataset]
        result = files.load_result(run)
        if result is None or result.agreement is not None:
            continue
        # The study option changes what the teacher says.
        asked = dataclasses.replace(teacher, teacher_batch_statistics=run.teacher_batch_statistics)
        if asked not in predictions:
            weights = RunFiles.of(out, teacher).load_weights(teacher)
            predictions[asked] = predict(build_teacher(asked, data, weights), data, run.precision)
        student = build_student(run, data)
        student.load_state_dict(files.load_weights(run))
        same = int((predict(student, data, run.precision) == predictions[asked]).sum())
        files.save_result(dataclasses.replace(result, agreement=100 * same / len(data.test_labels)))
