"""A vision transformer teaches a ResNet to see as it does, without labels: where its tokens point, and which are alike.

python examples/vit_to_cnn.py   # a small ViT that first learns to read digits: minutes of a CPU core
                                # or yours: --teacher NAME (of timm, or a folder of transformers) --pictures FOLDER

Each network has its own resolution and normalisation; they are compared at the teacher's patches.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from distill import CosineLoss, Distiller, Term, TokenSimilarityLoss, adapt
from scenes import scenes
from vits import Shown, Vit, load_vit, see, small_vit

WIDTHS, HELD = [8, 16, 32, 64], 200  # of the student; pictures to measure with
SHOWN: Shown = (64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the student's resolution and normalisation


def distil(student: nn.Module, teacher: Vit) -> Distiller:
    """Build the Distiller: the last stage is compared by direction, the one before it by which patches are alike."""
    resize = nn.Upsample((teacher.grid, teacher.grid), mode="bilinear")
    project = nn.Sequential(nn.Conv2d(WIDTHS[3], teacher.width, 1), resize)  # learns
    to_map, patches = adapt.TokensToMap(teacher.prefix), adapt.Tokens(teacher.prefix)
    at, before = ("encoder.stages.3", teacher.tokens), ("encoder.stages.2", teacher.tokens)
    direction = Term(CosineLoss(dim=1), at, student=project, teacher=to_map)
    alike = Term(TokenSimilarityLoss(), before, student=nn.Sequential(resize, adapt.MapToTokens()), teacher=patches)
    return Distiller(student, teacher.model, {"direction": direction, "alike": alike}, task_loss=None)


def train(distiller: Distiller, shown: Shown, pictures: Tensor, steps: int = 400) -> None:
    """Show both networks the same pictures, each as it is used to."""
    optimizer = torch.optim.AdamW(distiller.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        part = pictures[torch.randint(len(pictures), (32,))]
        optimizer.zero_grad()
        distiller(see(part, SHOWN), teacher_inputs=see(part, shown)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def main(arguments: list[str] | None = None) -> None:
    """Distil, and say on pictures that were not trained with how far the student is from the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a folder saved by transformers, or the name of a ViT of timm")
    parser.add_argument("--pictures", type=Path, help=f"a folder, also of folders, with more than {HELD} pictures")
    args = parser.parse_args(arguments)
    files = sorted(f for f in args.pictures.glob("**/[!.]*.*") if f.is_file()) if args.pictures else []
    if len(files) <= HELD if args.teacher else args.pictures:
        parser.error(f"--teacher NAME and --pictures FOLDER, with more than {HELD} pictures, go together")
    if args.teacher is None:
        pictures, _, targets = scenes(2000 + HELD, seed=0, side=32, digits=1)
        teacher = small_vit(pictures[HELD:], torch.cat([target["labels"] for target in targets])[HELD:])
    else:
        opened = [Image.open(file).convert("RGB").resize((224, 224)) for file in files]
        pictures = torch.stack([torch.tensor(np.array(picture)).movedim(-1, 0) / 255 for picture in opened])
        teacher = load_vit(args.teacher)
    torch.manual_seed(0)
    student = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], layer_type="basic"))
    distiller, held, pictures = distil(student, teacher), pictures[:HELD], pictures[HELD:]
    for when in ("before", "after"):
        if when == "after":
            train(distiller.train(), teacher.shown, pictures)
        with torch.no_grad():
            out = distiller.eval()(see(held, SHOWN), teacher_inputs=see(held, teacher.shown))
        print(when, {name: round(float(value), 3) for name, value in out.terms.items()})


if __name__ == "__main__":
    main()
