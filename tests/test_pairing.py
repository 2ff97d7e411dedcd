"""Candidate pairs of layers, as a person would see them, on a ResNet, a ViT and a Swin."""

import html

import pytest
import torch
from torch import nn

from distill import Distiller, GramLoss, HintLoss, pair_layers, tap_shapes
from distill.pairing import LayerPairs
from models import ResNet, images

hf = pytest.importorskip("transformers")


def seeded(build, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


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


def paths(pairs):
    return [(pair.stage, pair.student, pair.teacher) for pair in pairs]


def check_trains(student, teacher, pairs, x):
    """The terms go into a Distiller, and each of them reaches the student."""
    distiller = Distiller(student, teacher, pairs.terms(), task_loss=None)
    out = distiller(x)
    assert list(out.terms) == [f"stage{k}" for k in range(1, len(pairs) + 1)]
    for loss in out.losses.values():
        slopes = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
        assert any(slope is not None and slope.abs().max() > 0 for slope in slopes)


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


class Normed(nn.Module):
    """As a block of timm's ViT: queries are normed as (N, heads, tokens, C); called `block_k` as torchvision's are."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width // 2)

    def forward(self, x):
        heads = self.norm(self.linear(x).unflatten(2, (2, -1)).movedim(2, 1))
        return x + heads.movedim(1, 2).flatten(2)


class PlainViT(nn.Module):
    def __init__(self, depth=4, width=8):
        super().__init__()
        self.patches, self.start = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.zeros(1, 1, width))
        self.body = nn.ModuleDict({f"block_{k}": Normed(width) for k in range(depth)})
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.start.expand(len(x), 1, -1), tokens], 1)
        for block in self.body.values():
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


def test_heads_of_an_attention_are_no_maps_and_blocks_are_found_by_their_numbers():
    x, _ = images(side=32)
    pairs = pair_layers(ResNet(), PlainViT(), x)
    assert paths(pairs) == [(f"depth {k}/4", f"layer{k}", f"body.block_{k - 1}") for k in range(1, 5)]
    check_trains(ResNet(), PlainViT(), pairs, x)


class Permute(nn.Module):
    def forward(self, x):
        return x.movedim(-1, 1)


class Stages(nn.Module):
    """As timm's Swin: maps (N, H, W, C), and a norm at the end. torchvision's moves the channels by a module too."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width)) for width in (3, 3))
        self.norm, self.permute = nn.LayerNorm(3), Permute()

    def forward(self, x):
        x = self.one(x.movedim(1, -1)[:, ::2, ::2])
        return self.permute(self.norm(self.two(x[:, ::2, ::2]))).mean((2, 3))


def test_a_norm_after_the_last_stage_with_channels_last_does_not_hide_it():
    pairs = pair_layers(ResNet(), Stages(), torch.zeros(2, 3, 16, 16))
    assert paths(pairs) == [("8 x 8", "layer2", "one"), ("4 x 4", "layer3", "norm")]


class Queries(nn.Module):
    """As a detector of the DETR kind: an encoder of the last map's positions, and queries that look at it."""

    def __init__(self, queries, width=4):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 3, 2, 1), nn.ReLU()) for c in (3, width, width))
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.key, self.queries = nn.Linear(width, width), nn.Parameter(torch.randn(1, queries, width))
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        tokens = self.encoder(x.flatten(2).mT)
        look = torch.softmax(self.queries @ self.key(tokens).mT, -1)
        return self.boxes(look @ tokens)


@pytest.mark.parametrize("queries", [4, 5])  # as many as a grid of 2 x 2 has, and one more
def test_queries_of_a_detector_are_no_patches(queries):
    student, teacher = seeded(lambda: Queries(queries), 0), seeded(lambda: Queries(queries, 6), 1)
    x = torch.zeros(2, 3, 32, 32)
    pairs = pair_layers(student, teacher, x)
    assert paths(pairs) == [
        ("16 x 16", "stages.0", "stages.0"),
        ("8 x 8", "stages.1", "stages.1"),
        ("4 x 4", "encoder", "encoder"),  # not the keys, which come later
    ]
    check_trains(student, teacher, pairs, x)


class Detr(nn.Module):
    """As DETR: an encoder, and beside it a decoder whose queries may be as many as the last map has positions."""

    def __init__(self, queries, width=4):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 3, 2, 1), nn.ReLU()) for c in (3, width, width))
        self.encoder, self.decoder = (nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        tokens = self.encoder(x.flatten(2).mT)
        queries = self.decoder(self.queries.expand(len(x), -1, -1))
        return self.boxes(torch.softmax(queries @ tokens.mT, -1) @ tokens)


@pytest.mark.parametrize("queries", [16, 64])  # of 4 x 4 and of 8 x 8 positions
def test_what_a_decoder_gives_is_no_map_however_many_queries_it_has(queries):
    pairs = pair_layers(Detr(queries), Detr(queries, 6), torch.zeros(2, 3, 32, 32))
    assert [pair.student for pair in pairs] == ["stages.0", "stages.1", "encoder"]


def stage(channels, width, stride=2):
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU())


class Segments(nn.Module):
    """As SegFormer: the head runs a layer on each stage in turn. With `pooled` as UPerNet, which pools the last one."""

    def __init__(self, pooled=()):
        super().__init__()
        self.backbone = nn.ModuleDict({name: stage(c, 4) for name, c in (("one", 3), ("two", 4), ("three", 4))})
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(k), stage(4, 6, 1)) for k in pooled)
        self.head = nn.ModuleList(stage(4, 6, 1) for _ in range(3))
        self.classes = nn.Sequential(nn.Conv2d(6, 5, 1))

    def forward(self, x):
        maps = []
        for part in self.backbone.values():
            maps.append(x := part(x))
        merged = [pool(x) for pool in self.pools] + [layer(x) for layer, x in zip(self.head, maps, strict=True)]
        return self.classes(sum(nn.functional.interpolate(x, maps[0].shape[2:]) for x in merged))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Segments()

    def forward(self, x):
        return self.model(x)


def test_a_head_that_takes_all_stages_does_not_hide_the_backbone():
    for build, before in ((Segments, ""), (lambda: Segments((2, 3)), ""), (Wrapped, "model.")):
        pairs = pair_layers(build(), build(), torch.zeros(2, 3, 32, 32))
        assert [(pair.stage, pair.student) for pair in pairs] == [
            ("16 x 16", f"{before}backbone.one"),
            ("8 x 8", f"{before}backbone.two"),
            ("4 x 4", f"{before}backbone.three"),
        ]


class Levels(nn.Module):
    """As RetinaNet: a pyramid from the smallest map up, and then one level below it."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(stage(c, 4) for c in (3, 4, 4))
        self.merge, self.extra = nn.ModuleList(stage(4, 4, 1) for _ in range(3)), stage(4, 4)

    def forward(self, x):
        levels = []
        for part in self.body:
            levels.append(x := part(x))
        for k in (2, 1, 0):
            levels[k] = self.merge[k](levels[k])
        return [*levels, self.extra(levels[2])]


def test_the_levels_of_a_pyramid_are_its_stages():
    pairs = pair_layers(Levels(), Levels(), torch.zeros(2, 3, 32, 32))
    assert [pair.student for pair in pairs] == ["merge.0", "merge.1", "merge.2", "extra"]


def test_tokens_after_the_patches_make_no_grid_of_another_size():
    class Detects(PlainViT):
        def forward(self, x):
            tokens = self.patches(x).flatten(2).mT
            tokens = torch.cat([tokens, self.start.expand(len(x), 36 - tokens.shape[1], -1)], 1)  # 36 as 6 x 6
            for block in self.body.values():
                tokens = block(tokens)
            return tokens

    pairs = pair_layers(Detects(), Detects(), torch.zeros(2, 3, 16, 16))
    assert [pair.student_adapter for pair in pairs] == [None] * 4
    assert pairs[0].compared == ((2, 36, 8), (2, 36, 8))
    assert "one of yours" not in repr(pairs)
    beside_maps = repr(pair_layers(ResNet(), Detects(), torch.zeros(2, 3, 16, 16))).splitlines()[1:]
    assert all("(2, 36, 8)" in line and line.endswith("one of yours") for line in beside_maps)
    x = torch.zeros(2, 3, 16, 16)
    distiller = Distiller(ResNet(), Detects(), pair_layers(ResNet(), Detects(), x).terms(), task_loss=None)
    with pytest.raises(ValueError, match=r"term 'stage1'.* must be maps .*, got .* and \(2, 36, 8\)"):
        distiller(x)  # not six rows of what stands in no row


def test_a_vit_may_cut_the_patches_itself_after_a_module_on_the_picture():
    class Cuts(PlainViT):
        def __init__(self):
            super().__init__()
            self.scaled, self.patches = nn.InstanceNorm2d(3), nn.Linear(48, 8)

        def forward(self, x):
            tokens = self.patches(nn.functional.unfold(self.scaled(x), 4, stride=4).mT)
            tokens = torch.cat([self.start.expand(len(x), 1, -1), tokens], 1)
            for block in self.body.values():
                tokens = block(tokens)
            return tokens

    pairs = pair_layers(ResNet(), Cuts(), torch.zeros(2, 3, 32, 32))
    assert {repr(pair.teacher_adapter) for pair in pairs} == {"TokensToMap(prefix=1, grid=None)"}


class TakesAList(nn.Module):
    """As torchvision's detectors: a list of pictures, which become a batch inside."""

    def __init__(self, width):
        super().__init__()
        steps = (nn.Sequential(nn.Conv2d(c, width, 3, 2, 1), nn.ReLU()) for c in (3, width))
        self.backbone = nn.Sequential(*steps)

    def forward(self, images, targets=None):
        batch = torch.zeros(len(images), 3, *map(max, zip(*(image.shape[1:] for image in images), strict=True)))
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return self.backbone(batch).sum()


@pytest.mark.parametrize("sizes", [[(16, 16), (16, 16)], [(16, 12), (8, 16)]])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: (x, None), lambda x: {"images": x}])
def test_a_detector_takes_a_list_of_pictures(sizes, wrap):
    inputs = wrap([torch.zeros(3, *size) for size in sizes])
    pairs = pair_layers(TakesAList(4), TakesAList(6), inputs)
    assert paths(pairs) == [("8 x 8", "backbone.0", "backbone.0"), ("4 x 4", "backbone", "backbone")]
