"""The example of a vision transformer and a ResNet: no labels, two resolutions, the teacher's own normalisation."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("transformers")

import transformers
from PIL import Image

import vit_to_cnn
from vits import load_vit, see, small_vit

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def folder(tmp_path):
    """A small ViT with register tokens, as transformers saves one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Dinov2WithRegistersConfig(image_size=24, patch_size=8, num_register_tokens=2, **TINY)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    about = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    return tmp_path


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(vit_to_cnn, "WIDTHS", [2, 2, 4, 4])
    options = {"embedding_size": 2, "hidden_sizes": [2, 2, 4, 4], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetModel(transformers.ResNetConfig(**options))


def test_a_teacher_is_shown_its_own_resolution_and_normalisation(folder):
    teacher = load_vit(str(folder))
    assert (teacher.prefix, teacher.grid, teacher.width) == (3, 3, 8)
    shown = see(torch.full((1, 3, 10, 10), 0.5), teacher.shown)
    assert shown.shape == (1, 3, 24, 24)
    torch.testing.assert_close(shown[0, :, 0, 0], torch.tensor([0.0, 1 / 3, 0.4]))


def test_both_terms_reach_the_student_at_the_teachers_patches(folder, narrow):
    teacher = load_vit(str(folder))
    distiller = vit_to_cnn.distil(narrow, teacher)
    seen = {}
    for name, loss in distiller.losses.items():
        loss.register_forward_pre_hook(lambda module, given, name=name: seen.update({name: given[:2]}))
    x = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    out = distiller(see(x, vit_to_cnn.SHOWN), teacher_inputs=see(x, teacher.shown))
    assert [tuple(side.shape) for side in seen["direction"]] == [(2, 8, 3, 3), (2, 8, 3, 3)]
    assert [tuple(side.shape) for side in seen["alike"]] == [(2, 9, 4), (2, 9, 8)]
    with torch.no_grad():
        tokens = teacher.model(see(x, teacher.shown)).last_hidden_state[:, 3:]
    assert torch.equal(seen["alike"][1], tokens)
    assert torch.equal(seen["direction"][1].flatten(2).mT, tokens)
    for loss in out.losses.values():
        slopes = torch.autograd.grad(loss, [*narrow.parameters()], retain_graph=True, allow_unused=True)
        assert any(slope is not None and slope.abs().max() > 0 for slope in slopes)


def test_the_command_brings_the_student_nearer(folder, narrow, tmp_path_factory, monkeypatch, capsys):
    pictures = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.new("RGB", (30, 20), (60 * number, 90, 120)).save(pictures / f"{number}.png")
    train = vit_to_cnn.train
    monkeypatch.setattr(vit_to_cnn, "train", lambda *args: train(*args, steps=1))
    monkeypatch.setattr(vit_to_cnn, "ResNetModel", lambda config: narrow)
    monkeypatch.setattr(vit_to_cnn, "HELD", 2)
    vit_to_cnn.main(["--teacher", str(folder), "--pictures", str(pictures)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["before", "after"]
    assert "direction" in lines[0]
    assert "alike" in lines[1]


@pytest.mark.parametrize(
    "options", [["--teacher", "vit"], ["--pictures", "."], ["--teacher", "vit", "--pictures", "."]]
)
def test_a_teacher_goes_with_pictures_to_train_and_to_measure_with(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.png").touch()
    with pytest.raises(SystemExit):
        vit_to_cnn.main(options)
    assert "with more than 200 pictures, go together" in capsys.readouterr().err


def test_the_small_vit_gives_tokens_of_its_patches():
    teacher = small_vit(torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]), steps=1)
    tokens = teacher.tokens(teacher.model(torch.rand(2, 3, 32, 32)))
    assert tokens.shape == (2, teacher.prefix + teacher.grid**2, teacher.width)
