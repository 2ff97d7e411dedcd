"""Vision transformers that teach in `vit_to_cnn.py`: those of timm and transformers, and a small one trained here."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, ViTConfig, ViTForImageClassification

from distill import adapt
from scenes import CLASSES

Shown = tuple[int, tuple[float, ...], tuple[float, ...]]  # resolution, mean and deviation of each color


class Vit(NamedTuple):
    """A vision transformer, and what must be known of it."""

    model: nn.Module
    tokens: Any  # where its last tokens are: a path, or a function of what it returns
    prefix: int  # how many tokens stand before those of the patches: class and register tokens
    grid: int  # how many patches are in a row
    width: int
    shown: Shown


def see(pictures: Tensor, shown: Shown) -> Tensor:
    """What a network is shown of pictures (N, 3, H, W) in [0, 1]."""
    pictures = nn.functional.interpolate(pictures, size=(shown[0], shown[0]), mode="bilinear", antialias=True)
    return (pictures - torch.tensor(shown[1]).view(-1, 1, 1)) / torch.tensor(shown[2]).view(-1, 1, 1)


def load_vit(name: str) -> Vit:
    """Load a folder saved by transformers, with its `preprocessor_config.json`, or a model of timm with its weights."""
    if not Path(name).is_dir():
        try:
            import timm
        except ImportError as error:
            raise SystemExit(f"{name} is no folder; for a model of timm: pip install timm") from error
        model = timm.create_model(name, pretrained=True)
        data = timm.data.resolve_model_data_config(model)
        prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size[0]
        return Vit(model, "norm", prefix, grid, model.embed_dim, (data["input_size"][1], data["mean"], data["std"]))
    model, about = AutoModel.from_pretrained(name), json.loads((Path(name) / "preprocessor_config.json").read_text())
    config, prefix = model.config, 1 + getattr(model.config, "num_register_tokens", 0)
    shown = config.image_size, tuple(about["image_mean"]), tuple(about["image_std"])
    last = adapt.Select("last_hidden_state")
    return Vit(model, last, prefix, config.image_size // config.patch_size, config.hidden_size, shown)


def small_vit(pictures: Tensor, labels: Tensor, steps: int = 400) -> Vit:
    """Train a small ViT to read digits (N, 3, 32, 32), in place of a pretrained one."""
    torch.manual_seed(99)
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": CLASSES}
    model: Any = ViTForImageClassification(ViTConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        part = torch.randint(len(pictures), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model((pictures[part] - 0.3) / 0.3).logits, labels[part]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    shown = 32, (0.3,) * 3, (0.3,) * 3
    return Vit(model.vit.eval(), adapt.Select("last_hidden_state"), 1, 8, 64, shown)
