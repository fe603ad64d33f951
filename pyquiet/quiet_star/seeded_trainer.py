"""What the trainers of thinking models share: evaluation that compares two NLLs of the next token."""

from typing import Any

import torch
from torch import Tensor

from pyquiet.quiet_star.inputs import IGNORED
from pyquiet.quiet_star.objective import next_token_targets
from pyquiet.trainers import SeededTrainer


class ThinkingTrainer(SeededTrainer):
    """A `SeededTrainer` of which subclasses say in `_evaluated` what evaluation is about."""

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A batch's loss, and two NLLs [B, T - 1] of the next token to compare."""
        raise NotImplementedError

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss, what `_evaluated` compares, and the token it is about, -100 where there is none."""
        inputs = self._prepare_inputs(inputs)
        loss, nlls = self._evaluated(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        return loss, nlls, inputs["input_ids"][:, 1:].masked_fill(~targets_in(inputs), IGNORED)


def targets_in(inputs: dict[str, Any]) -> Tensor:
    """bool [B, T - 1] of a batch: there is a next token, and it is to be predicted."""
    return next_token_targets(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels"))
