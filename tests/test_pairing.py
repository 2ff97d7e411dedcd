"""Candidate pairs of layers, as a person would see them, on a ResNet, a ViT and a Swin."""

import html

import pytest
import torch
from torch import nn

from distill import GramLoss, HintLoss, pair_layers, tap_shapes
from distill.pairing import LayerPairs
from models import ResNet, images
from pairs import check_trains, paths, seeded

hf = pytest.importorskip("transformers")


def vit(*, layers=4, width=16, patch=8, side=32):
    config = hf.ViTConfig(
        image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, num_labels=5,
    )  # fmt: skip
    return seeded(lambda: hf.ViTForImageClassification(config), seed=1)


def layers_of(model):
    """What the layers of a ViT are called: before transformers 5 otherwise, and they gave tuples."""
    return "vit.layers" if hasattr(model.vit, "layers") else "vit.encoder.layer"


def swin(**options):
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]}
    config = hf.SwinConfig(**{**sizes, "window_size": 4, "num_labels": 5, **options})
    return seeded(lambda: hf.SwinForImageClassification(config), seed=2)


def bottlenecks():
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 64], depths=[1, 2, 1], layer_type="bottleneck", num_labels=5
    )
    return seeded(lambda: hf.ResNetForImageClassification(config), seed=3)


def test_two_resnets_pair_the_last_maps_of_each_resolution():
    student, teacher = ResNet(), ResNet(width=6, blocks=2, seed=1)
    x, _ = images()
    pairs = pair_layers(student, teacher, x)
    assert paths(pairs) == [
        ("16 x 16", "layer1", "layer1"),
        ("8 x 8", "layer2", "layer2"),
        ("4 x 4", "layer3", "layer3"),
        ("2 x 2", "layer4", "layer4"),
    ]
    assert pairs[1].student_shape == (4, 8, 8, 8)
    assert pairs[1].teacher_shape == (4, 12, 8, 8)
    assert {pair.student_adapter for pair in pairs} == {None}
    check_trains(student, teacher, pairs, x)


def test_prints_as_a_table():
    x, _ = images()
    lines = str(pair_layers(ResNet(), ResNet(width=6), x)).splitlines()
    assert " ".join(lines[0].split()) == "stage student gives adapter teacher gives adapter overwritten later"
    assert lines[2].startswith("8 x 8    layer2   (4, 8, 8, 8)             layer2   (4, 12, 8, 8)")
    assert len(lines) == 5


def test_a_notebook_shows_tables_without_breaking_their_lines():
    shown = pair_layers(ResNet(), ResNet(), torch.zeros(2, 3, 16, 16)), tap_shapes(ResNet(), torch.zeros(2, 3, 16, 16))
    for each in shown:
        page = each._repr_html_()
        assert page.startswith('<pre style="white-space: pre; overflow-x: auto">stage' if each is shown[0] else "<pre")
        assert html.unescape(page[page.index(">") + 1 : -len("</pre>")]) == repr(each)


def test_a_bottleneck_does_not_hide_the_stage_before_it():
    pairs = pair_layers(bottlenecks(), ResNet(width=6), torch.zeros(2, 3, 32, 32))
    assert paths(pairs) == [
        ("16 x 16", "resnet.embedder.embedder", "layer2"),
        ("8 x 8", "resnet.encoder.stages.0", "layer3"),
        ("4 x 4", "resnet.encoder.stages.1", "layer4"),
    ]


def test_a_swin_pairs_with_a_resnet_by_resolution_through_adapters():
    student, teacher = ResNet(), swin()
    x, _ = images(side=32)
    pairs = pair_layers(student, teacher, x)
    assert paths(pairs) == [
        ("16 x 16", "layer2", "swin.encoder.layers.0.blocks.0"),
        ("8 x 8", "layer3", "swin.encoder.layers.1.blocks.0"),
        ("4 x 4", "layer4", "swin.layernorm"),
    ]
    assert "TokensToMap(prefix=0, grid=None)" in str(pairs).splitlines()[1]
    assert pairs[0].compared == ((4, 8, 16, 16), (4, 8, 16, 16))
    check_trains(student, teacher, pairs, x)


def test_a_swin_has_as_many_stages_as_resolutions():
    pairs = pair_layers(swin(), vit(layers=3), images(side=32)[0])
    assert [pair.student for pair in pairs] == [
        "swin.encoder.layers.0.blocks.0",
        "swin.encoder.layers.1.blocks.0",
        "swin.layernorm",
    ]
    assert pairs[2].compared == ((4, 16, 32), (4, 16, 16))  # tokens of one grid


def test_a_vit_is_cut_into_as_many_shares_as_a_resnet_has_stages():
    student, teacher = ResNet(), vit(layers=8)
    x, _ = images(side=32)
    pairs = pair_layers(student, teacher, x)
    assert paths(pairs) == [(f"depth {k}/4", f"layer{k}", f"{layers_of(teacher)}.{2 * k - 1}") for k in range(1, 5)]
    assert "TokensToMap(prefix=1, grid=None)" in repr(pairs[0].teacher_adapter)
    assert pairs[0].compared[1] == (4, 16, 4, 4)
    check_trains(student, teacher, pairs, x)


def test_two_vits_of_one_grid_compare_tokens_and_of_others_maps():
    student, teacher = vit(layers=3, width=8), vit(layers=6)
    x, _ = images(side=32)
    pairs = pair_layers(student, teacher, x, shares=3)
    layer = layers_of(teacher)
    assert paths(pairs) == [(f"depth {k}/3", f"{layer}.{k - 1}", f"{layer}.{2 * k - 1}") for k in (1, 2, 3)]
    assert "Tokens(1)" in repr(pairs[0].student_adapter)
    assert pairs[0].compared == ((4, 16, 8), (4, 16, 16))
    check_trains(student, teacher, pairs, x)
    other = pair_layers(vit(patch=4), teacher, x)
    assert "TokensToMap(prefix=1, grid=None)" in repr(other[0].student_adapter)
    assert other[0].compared == ((4, 16, 8, 8), (4, 16, 4, 4))


def test_pictures_that_are_no_squares_give_their_grid():
    config = hf.ViTConfig(
        image_size=(16, 32), patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    teacher = seeded(lambda: hf.ViTModel(config), seed=1)
    pairs = pair_layers(ResNet(), teacher, torch.zeros(2, 3, 16, 32))
    assert "TokensToMap(prefix=1, grid=(2, 4))" in repr(pairs[0].teacher_adapter)
    assert pairs[-1].compared[1] == (2, 16, 2, 4)


class ChannelsLast(nn.Module):
    """Stages that give (N, H, W, C), the first changed in place later, the second in a tuple."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(3, 6), nn.Identity())
        self.two = Halves()

    def forward(self, x):
        x = self.one(x.movedim(1, -1))
        x += 1
        return self.two(x)[0].mean((1, 2))


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 10)

    def forward(self, x):
        return nn.functional.relu(self.linear(x[:, ::2, ::2])), None


def test_channels_last_tuples_and_what_is_overwritten():
    student, teacher = ChannelsLast(), ResNet()
    x, _ = images()
    pairs = pair_layers(student, teacher, x)
    assert paths(pairs) == [("16 x 16", "one", "layer1"), ("8 x 8", "two", "layer2")]
    assert repr(pairs[0].student_adapter) == "NHWC()"
    assert [type(step).__name__ for step in pairs[1].student_adapter] == ["Select", "NHWC"]
    assert [pair.overwritten for pair in pairs] == ["student", ""]
    assert str(pairs).splitlines()[1].endswith("student: copy=True")
    assert "Select(0), NHWC()" in str(pairs).splitlines()[2]
    terms = pairs.terms()
    assert [term.copy for term in terms.values()] == [True, False]
    check_trains(student, teacher, pairs, x)


def test_a_text_model_is_cut_into_shares_of_its_tokens():
    config = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    models = [seeded(lambda n=n: hf.BertModel(hf.BertConfig(num_hidden_layers=n, **config)), seed=n) for n in (2, 4)]
    pairs = pair_layers(*models, {"input_ids": torch.arange(12).view(2, 6)}, shares=2)
    assert [pair.student for pair in pairs] == ["encoder.layer.0", "encoder.layer.1"]
    assert [pair.teacher for pair in pairs] == ["encoder.layer.1", "encoder.layer.3"]
    assert pairs[0].compared == ((2, 6, 8), (2, 6, 8))


def test_terms_take_a_loss_a_weight_and_a_slice():
    pairs = pair_layers(vit(layers=2), vit(layers=4), torch.zeros(2, 3, 32, 32), shares=2)
    assert isinstance(pairs[1:], LayerPairs)
    terms = pairs[1:].terms(lambda student, teacher: GramLoss(), weight=2.0)
    assert list(terms) == ["stage1"]
    assert isinstance(terms["stage1"].loss, GramLoss)
    assert terms["stage1"].weight == 2.0
    assert isinstance(pairs.terms()["stage2"].loss, HintLoss)
    assert pairs.terms()["stage1"].loss is not pairs.terms()["stage1"].loss


def test_the_teacher_may_take_other_inputs():
    pairs = pair_layers(ResNet(), ResNet(width=6), torch.zeros(2, 3, 16, 16), teacher_inputs=torch.zeros(2, 3, 32, 32))
    assert [(pair.student, pair.teacher) for pair in pairs] == [(f"layer{k}", f"layer{k + 1}") for k in (1, 2, 3)]


def test_without_a_common_resolution_stages_are_paired_from_the_end():
    pairs = pair_layers(ResNet(), ResNet(width=6), torch.zeros(2, 3, 16, 16), teacher_inputs=torch.zeros(2, 3, 20, 20))
    assert paths(pairs) == [(f"stage {k}", f"layer{k}", f"layer{k}") for k in range(1, len(pairs) + 1)]
    assert len(pairs) > 1


def test_rejects_models_without_layers_to_pair():
    with pytest.raises(ValueError, match="the student must have maps of several resolutions or blocks that repeat"):
        pair_layers(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), ResNet(), torch.zeros(2, 3, 16, 16))
    with pytest.raises(TypeError, match="the teacher must be an nn.Module, got function"):
        pair_layers(ResNet(), lambda x: x, torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="shares must be a positive integer, got 0"):
        pair_layers(ResNet(), ResNet(), torch.zeros(2, 3, 16, 16), shares=0)
