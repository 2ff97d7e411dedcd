"""How often a trained network and its teacher predict the same class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from cifar.checkpoints import RunFiles, unusable
from cifar.data import Dataset
from cifar.settings import RunConfig
from cifar.states import check_tensors
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
            theirs = RunFiles.of(out, teacher)
            weights = theirs.load_weights(teacher)
            with unusable(theirs.weights):
                network = build_teacher(asked, data, weights)
            predictions[asked] = predict(network, data, run.precision)
        student, weights = build_student(run, data), files.load_weights(run)
        with unusable(files.weights):
            check_tensors(weights, student.state_dict(), "network")
            student.load_state_dict(weights)
        same = int((predict(student, data, run.precision) == predictions[asked]).sum())
        files.save_result(dataclasses.replace(result, agreement=100 * same / len(data.test_labels)))
