"""A Distiller in timm's training script: a task that goes where `LogitDistillationTask` stands in its `train.py`.

    task = DistillTask(ForTimm(model, teacher, {"soft": KLLoss(temperature=1.0)}, task_loss=train_loss_fn))

The rest of `train.py` stays. Its optimizer sees which parameters have no weight decay and how deep each lies, clipping
sees what learns in the losses. What is averaged (EMA), evaluated and saved is the student alone.
"""

from typing import Any

import torch
from timm import create_model
from timm.data import Mixup
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill import Distiller, HintLoss, KLLoss, Term


class ForTimm(Distiller):
    """A Distiller that tells timm's optimizers about its student."""

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the student wants without weight decay."""
        return {f"student.{name}" for name in getattr(self.student, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Say how deep a parameter lies, for layer decay; what learns in the losses lies where the head does."""
        layers = group_parameters(self.student, self.student.group_matcher(coarse=coarse), reverse=True)  # type: ignore[operator]
        return lambda name: layers.get(name.removeprefix("student."), max(layers.values()))


class DistillTask(TrainingTask):  # type: ignore[misc]  # timm is no requirement of this library
    """What `train.py` calls."""

    def __init__(self, distiller: Distiller, **options: Any) -> None:
        super().__init__(**options)
        self.trainable_module: nn.Module = distiller
        self.eval_model = distiller.student

    def prepare_distributed(self, device_ids: Any = None, **options: Any) -> "DistillTask":
        """Wrap all of the Distiller: what learns in the losses is synchronised too."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def setup_ema(self, decay: float = 0.9999, **options: Any) -> Any:
        """Average the student alone."""
        self.trainable_module_ema: Any = ModelEmaV3(self.eval_model, decay=decay, **options)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the student."""
        if self.has_ema():
            self.trainable_module_ema.update(self.eval_model, step=step)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Give the loss, the student's logits, and each term for the log."""
        out = self.trainable_module(input, target)
        return {"loss": out.loss, "output": out.student, **{f"{name}_loss": term for name, term in out.terms.items()}}


def main(steps: int = 3) -> DistillTask:
    """Run what `train.py` does in small: random pictures, mixup, layer decay, an average of the weights."""
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_heads": 2, "num_classes": 5}
    student, teacher = (create_model("vit_tiny_patch16_224", embed_dim=w, depth=w // 8, **options) for w in (16, 32))
    task = DistillTask(ForTimm(student, teacher, {"kl": KLLoss(1.0), "hint": Term(HintLoss(16, 32), at="norm")}))
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", 1e-3, weight_decay=0.05, layer_decay=0.75)
    task.setup_ema(decay=0.9)
    mixup = Mixup(mixup_alpha=0.8, num_classes=5)
    for step in range(steps):
        optimizer.zero_grad()
        task(*mixup(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))))["loss"].backward()
        optimizer.step()
        task.update_ema(step)
    return task
