"""A `transformers.Trainer` that evaluates and predicts batches without labels by way of `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import nested_detach
from typing_extensions import override

from distill._distiller.distiller import Distiller
from distill._distiller.evaluate import call
from distill.integrations._labels import as_returned


class PredictingTrainer(Trainer):  # type: ignore[misc,unused-ignore]  # its types depend on the version
    """Gives a loss of batches without labels in `evaluate`; Trainer gives none, and runs the model past `prepare`."""

    distiller: Distiller
    prepare: Callable[[dict[str, Any]], tuple[Any, ...]]
    _predicts = False

    @override
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._predicts = True
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._predicts = False

    @override
    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        if not prediction_loss_only and all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs, loss = self._prepare_inputs(inputs), None
            if prediction_loss_only or not self._predicts:
                loss, output = self.compute_loss(model, inputs, return_outputs=True)
            else:  # what is predicted may have no labels that the loss needs
                output = as_returned(None, call(model, self.prepare(dict(inputs))[0]))
        return loss, None if prediction_loss_only else predictions(output, self.model, ignore_keys), None


def predictions(output: Any, model: Any, ignore: list[str] | None) -> Any:
    """What a Trainer takes for the predictions.

    Args:
        output: The output of a student, as `as_returned` gives it.
        model: The student; its config may name entries to leave out.
        ignore: Names of entries to leave out; None: those.
    """
    if ignore is None:
        ignore = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", [])
    is_dict = isinstance(output, dict)
    found = tuple(v for k, v in output.items() if k not in (*ignore, "loss")) if is_dict else tuple(output[1:])
    found = nested_detach(found)  # type: ignore[no-untyped-call,unused-ignore]
    return found[0] if len(found) == 1 else found
