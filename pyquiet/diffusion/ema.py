"""Trainers whose model is, in the end, the moving average of the weights that training passes through."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from pyquiet.trainers import SeededTrainer

_FILE = "average.safetensors"  # in a checkpoint, beside the weights that training goes on from


class WeightAverage(TrainerCallback):
    """The exponential moving average of a model's weights, updated behind every step.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the random weights of the start are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def update(average: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
            torch._foreach_lerp_(average, current, 1 - min(decay, (1 + int(steps)) / (10 + int(steps))))

        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=cast(Any, update))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update_parameters(self.model)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights as long as this lasts."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for mine, other in zip(self.model.parameters(), self.average.parameters(), strict=True):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    def save(self, folder: str | os.PathLike[str]) -> None:
        save_model(self.average, str(Path(folder) / _FILE))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Raises ValueError for a checkpoint without an average."""
        file = Path(folder) / _FILE
        if not file.exists():
            raise ValueError(f"{folder} holds no {_FILE}: it was written without an average; set ema_decay=0")
        load_model(self.average, file)


class AveragingTrainer(SeededTrainer):
    """A `SeededTrainer` that evaluates and saves the moving average of the weights, where args.ema_decay is not 0.

    A checkpoint holds both the average and the weights that training goes on from.
    """

    def __init__(self, model: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        super().__init__(model, args, *rest, **kwargs)
        self.average = WeightAverage(self.model, args.ema_decay) if args.ema_decay else None
        if self.average:
            self.average.average.to(args.device)
            self.add_callback(self.average)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        # Before the first step there is no average yet.
        if self.average is None or not int(self.average.average.n_averaged):
            yield
        else:
            with self.average.applied():
                yield

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, of the averaged weights."""
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged weights; a checkpoint gets both."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            if self.average and self.args.should_save:
                self.average.save(cast(str, output_dir))
        else:
            with self._averaged():
                super().save_model(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average:
            self.average.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average:
            self.average.load(cast(str, self.state.best_model_checkpoint))
