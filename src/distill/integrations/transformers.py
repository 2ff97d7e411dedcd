"""A `transformers.Trainer` that distils: `pip install distill[transformers]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distill._distiller.distiller import Distiller
from distill._distiller.evaluate import has_mean
from distill.integrations._counts import count_masks, divided, everywhere, factor
from distill.integrations._labels import as_returned, checked, split_batch
from distill.integrations._learned import Learned
from distill.integrations._predictions import PredictingTrainer
from distill.integrations._term_log import TermLog

_Prepare = Callable[[dict[str, Any]], tuple[Any, ...]]


class DistillTrainer(PredictingTrainer):
    """A `Trainer` whose model is a Distiller's student, and whose loss is the Distiller's.

    What it saves is the student, as `from_pretrained` wants it. What learns in the losses is in the optimizer, in the
    checkpoints and resumed; the terms are logged. With a mask every mean is over all that it counts in the accumulated
    batch on all processes, however that is cut; with masks by name too, if all means have one. Otherwise the means of
    the micro-batches are averaged. `evaluate` gives the Distiller's loss, also without labels where no term needs them
    (`task_loss=None`, or `weights["task"] = 0`); `predict` gives a loss only with labels.

    Args:
        distiller: The Distiller.
        prepare: Makes of a batch what the Distiller is called with: `prepare(batch) -> (inputs, target, mask)`, and
            where the teacher is asked something else than the student `(inputs, target, mask, teacher_inputs)`, as the
            ids of a stored teacher (`remove_unused_columns=False` leaves a column of ids in the batch). In training it
            is called twice. None: labels (`labels`, or the one name in `label_names`) are taken out of the batch,
            shifted by `next_tokens` if the student's own loss shifts them, and masked where they are -100, the task
            loss's `ignore_index` or predicted from padding; without labels the `attention_mask` is the mask.
        **trainer: What `Trainer` takes, but for `model` and `compute_loss_func`.

    Raises:
        TypeError: If `distiller` is no Distiller.
        ValueError: If a model or loss is given, or an optimizer without what learns in the losses.
    """

    def __init__(self, *, distiller: Distiller, prepare: _Prepare | None = None, **trainer: Any) -> None:
        if not isinstance(distiller, Distiller):
            raise TypeError(f"distiller must be a Distiller, got {type(distiller).__name__}")
        if trainer.pop("model", distiller.student) is not distiller.student:
            raise ValueError("the model must be the Distiller's student: leave model= out")
        super().__init__(model=distiller.student, **trainer)
        if self.compute_loss_func or self.label_smoother or self.args.n_gpu > 1:
            raise ValueError("leave compute_loss_func and label_smoothing_factor out, and give each GPU a process")
        self.distiller = distiller.to(self.args.device)
        self.distiller._averaged_outside = True
        # With a cache, models do not see that sequences are packed; a teacher may hold several, as Teachers does.
        for part in distiller.teacher.modules() if isinstance(distiller.teacher, torch.nn.Module) else ():
            config: Any = getattr(part, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False
        self.prepare = checked(prepare) if prepare else self._prepare
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # `compute_loss` divides by itself
        # A student whose forward takes no labels has none of its own: those of the batch are for the Distiller.
        self.label_names = self.label_names or ["labels"]
        self._learned, self._terms, self._micro_batches = Learned(distiller), TermLog(), 1
        self.add_callback(self._terms)

    def _prepare(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        name = self.label_names[0] if len(self.label_names) == 1 else "labels"
        model, task = self.accelerator.unwrap_model(self.model), self.distiller.task_loss
        shifts, ignored = getattr(self, "_loss_shifts_labels", False), getattr(task, "ignore_index", -100)
        return split_batch(batch, model, shifts=shifts, name=name, ignored=ignored)

    def _parts(self) -> dict[str, Any]:
        task = self.distiller.task_loss
        return {**self.distiller.losses, **({} if task is None else {"task": task})}

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches = len(batches)  # fewer at the end of an epoch
        self._learned.zero_grad()  # a scaler may have skipped the step before
        means: dict[bool, list[str]] = {True: [], False: []}
        for name, part in self._parts().items():
            if has_mean(part):
                means[bool(self.distiller.weights[name])].append(name)
        counts = count_masks([self.prepare(dict(batch))[2] for batch in batches], means[True], idle=means[False])
        # Some versions ask once more at the end of an epoch.
        return batches, counts and everywhere(counts, self.accelerator.reduce, device)

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.distiller.train(model.training)
        count = num_items_in_batch if model.training else None
        whole, parts = divided(count), self._parts()
        given, target, mask, *asked = self.prepare(dict(inputs))
        questions = asked[0] if asked else None
        out = self.distiller(given, target, mask=mask, denominator=whole, student=model, teacher_inputs=questions)
        # What is no mean over the count is averaged over the micro-batches and processes.
        share = 1 / (self._micro_batches * self.args.world_size) if model.training else 1
        loss = out.loss if whole is not None else out.loss * share
        for name, value in out.losses.items():
            part = factor(count, name) if whole is not None and has_mean(parts[name]) else share
            if isinstance(part, Tensor) or (whole is not None and part != 1):
                loss = loss - (1 - part) * self.distiller.weights[name] * value
            if model.training:
                self._terms.add(name, value.detach() * part)
        loss = loss * self.args.world_size if model.training else loss  # DDP takes the mean of the gradients
        return (loss, as_returned(loss, out.student)) if return_outputs else loss

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {f"term/{name}": self.accelerator.reduce(value).item() for name, value in self._terms.take()}
        super().log(logs, *args, **kwargs)

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        self._learned.join(
            optimizer, fresh=fresh, weight_decay=self.args.weight_decay, decays=self.get_decay_parameter_names
        )
        return optimizer

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        # Before a scaler of half precision looks for what overflowed: all processes must find the same.
        if self.accelerator.sync_gradients:
            self._learned.average(self.accelerator)
        return loss

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:  # a checkpoint
            self._learned.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._learned.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._learned.load(str(self.state.best_model_checkpoint))
