"""The short form of benchmarks/faults.py: the study under faults, as docs/reliability.md says."""

import shutil

import pytest

from cifar import checkpoints
from cifar.checkpoints import RunFiles
from cifar.training import train
from cifar_runs import make_config, make_data


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a finished teacher and its student, stopped after the first of two epochs."""
    out, data, config = tmp_path_factory.mktemp("stopped"), make_data(128, 128), make_config()
    train(config.teacher_config(), data, out)
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoints.save_state

        def stop(path, *rest):
            save(path, *rest)
            raise KeyboardInterrupt

        patch.setattr("cifar.training.save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, data, out)
    return out


@pytest.fixture
def resumed(stopped, tmp_path):
    """A copy of it, and what goes on with it."""
    shutil.copytree(stopped, tmp_path / "runs")
    config = make_config()
    return RunFiles.of(tmp_path / "runs", config), lambda: train(config, make_data(128, 128), tmp_path / "runs")
