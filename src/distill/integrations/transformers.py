"""A `transformers.Trainer` that distils: `pip install distill[transformers]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import override

from distill._distiller.distiller import Distiller
from distill.language import next_tokens

_STATE = "distiller.pt"
Prepared = tuple[Mapping[str, Any], Any, "Tensor | None"]


class DistillTrainer(Trainer):  # type: ignore[misc,unused-ignore]  # its types depend on the version
    """A `Trainer` whose model is a Distiller's student, and whose loss is the Distiller's.

    Everything else is the Trainer's: what it saves is the student, as `from_pretrained` wants it. What learns in the
    losses is in the optimizer, in the checkpoints and resumed. The terms are logged under their names. Every mean is
    over all labelled tokens of the accumulated batch on all processes: the gradient does not depend on how it is cut.

    Args:
        distiller: The Distiller. Its terms decide what is compared; its task loss what the labels are for.
        prepare: `prepare(batch) -> (inputs, target, mask)`, what the Distiller is called with. It is called twice for a
            batch and must not change it. None: the labels are taken out, shifted by `next_tokens` for a causal language
            model, and -100 is masked; where there are no labels, the `attention_mask` is the mask.
        **trainer: What `Trainer` takes, but for `model`.

    Raises:
        TypeError: If `distiller` is no Distiller.
        ValueError: If another model is given, or there are several GPUs in one process.
    """

    def __init__(
        self, *, distiller: Distiller, prepare: Callable[[dict[str, Any]], Prepared] | None = None, **trainer: Any
    ) -> None:
        if not isinstance(distiller, Distiller):
            raise TypeError(f"distiller must be a Distiller, got {type(distiller).__name__}")
        if trainer.pop("model", distiller.student) is not distiller.student:
            raise ValueError("the model must be the Distiller's student: leave model= out")
        super().__init__(model=distiller.student, **trainer)
        if self.args.n_gpu > 1:
            raise ValueError(f"there must be one process for each GPU (torchrun), got {self.args.n_gpu} GPUs in one")
        self.distiller = distiller.to(self.args.device)
        self.distiller._averaged_outside = True
        self.prepare = prepare or self._prepare
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the loss is over all tokens already
        self._terms: dict[str, list[Tensor]] = {}

    def _prepare(self, batch: dict[str, Any]) -> Prepared:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
        if labels is None:
            mask = batch.get("attention_mask")
            return inputs, None, None if mask is None else mask.bool()
        if labels.ndim == 2 and self._shifts():
            return inputs, *next_tokens(labels)
        return inputs, labels, labels != -100 if not labels.is_floating_point() else None

    def _shifts(self) -> bool:
        model: Any = self.accelerator.unwrap_model(self.model)
        model = getattr(getattr(model, "base_model", None), "model", model) if hasattr(model, "peft_config") else model
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collect the batches of a step and count what their losses are means over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(self._count(batch) for batch in batches), device=device)
        return batches, self.accelerator.reduce(count) if self._over_processes() else count

    def _count(self, batch: dict[str, Any]) -> int:
        inputs, _, mask = self.prepare(batch)
        return len(next(iter(inputs.values()))) if mask is None else int((mask != 0).sum())

    def _over_processes(self) -> bool:
        return bool(self.args.average_tokens_across_devices and self.args.world_size > 1)

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Run the Distiller on a batch."""
        self.distiller.train(model.training)
        given, target, mask = self.prepare(inputs)
        out = self.distiller(given, target, mask=mask, denominator=num_items_in_batch, student=model)
        loss, shares = out.loss, dict.fromkeys(out.losses, 1.0)
        if num_items_in_batch is not None:
            processes = self.args.world_size if self._over_processes() else 1
            steps = self.current_gradient_accumulation_steps
            for name, value in out.losses.items():
                # A loss of a whole batch has no tokens to be a mean over: it is averaged over the micro-batches.
                if name != "task" and getattr(self.distiller.losses[name], "reduction", None) is None:
                    shares[name] = 1 / (steps * processes)
                    loss = loss - (1 - shares[name]) * self.distiller.weights[name] * value
            loss = loss * processes  # DDP takes the mean of the processes' gradients
        if model.training:
            for name, term in out.terms.items():
                self._terms.setdefault(name, []).append(term * shares[name])
        return (loss, out.student) if return_outputs else loss

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms since the last log: each is the sum over the micro-batches of a step, averaged over steps."""
        if "loss" in logs and self._terms:
            for name, values in self._terms.items():
                logs[f"term/{name}"] = (torch.stack(values).mean() * self.args.gradient_accumulation_steps).item()
            self._terms = {}
        super().log(logs, *args, **kwargs)

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Add what learns in the losses; the Trainer zeroes and DDP averages the gradients of the student alone."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        learned = [parameter for parameter in self._learned().parameters() if parameter.requires_grad]
        if fresh and learned:
            optimizer.add_param_group({"params": learned, "weight_decay": self.args.weight_decay})
            optimizer.register_step_pre_hook(lambda *_: self._average(learned))
            optimizer.register_step_post_hook(lambda *_: self._learned().zero_grad())
        return optimizer

    def _average(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            if parameter.grad is not None and self.args.world_size > 1:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.args.world_size

    def _learned(self) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"losses": self.distiller.losses, "adapters": self.distiller.adapters})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"learned": self._learned().state_dict(), "weights": dict(self.distiller.weights)}
            torch.save(state, Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / _STATE).is_file():
            state = torch.load(Path(checkpoint) / _STATE, map_location="cpu", weights_only=True)
            self._learned().load_state_dict(state["learned"])
            self.distiller.weights.update(state["weights"])
