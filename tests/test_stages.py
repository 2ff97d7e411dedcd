"""What stands for a stage of a model: attention heads, queries, heads of segmentation and pyramids are told apart."""

import pytest
import torch
from torch import nn

from distill import Distiller, pair_layers
from models import ResNet, images
from pairs import check_trains, paths, seeded


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
