"""Hugging Face's ``Trainer`` for a CSM that is accelerated for training."""

from __future__ import annotations

import functools
from typing import Any

from csm_runtime.training.counts import share_counts


@functools.cache
def csm_trainer() -> type:
    """``Trainer`` with the two things changed that do not fit CSM; transformers is imported by this call.

    ``Trainer`` counts the labels of an optimizer step once and divides both losses by that number, though codebook 0 and the
    depth decoder have different numbers of targets. Here the divisors are those of
    :func:`~csm_runtime.training.share_counts`. And the model's loss is taken as it is: it is a mean over the whole step
    already, so nothing is multiplied by the number of processes or divided by that of micro-batches.

    Example::

        trainer = csm_trainer()(model=model, args=args, train_dataset=examples, data_collator=collate)
        trainer.train()

    Give it ``TrainingArguments(remove_unused_columns=False)`` and a :class:`~csm_runtime.training.CsmDataCollator`.
    """
    from transformers import Trainer

    class CsmTrainer(Trainer):
        """See :func:`csm_trainer`."""

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
            """The micro-batches of one optimizer step, with the divisors of the step in them."""
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            if batches:
                share_counts(batches)
            return batches, count

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The model's own loss; ``num_items_in_batch`` is not what it is to be divided by."""
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    return CsmTrainer
