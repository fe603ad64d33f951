"""Teach the pretrained model, without thoughts, what a thinking one predicts: four objectives and plain NLL.

    python recipes/pointer_chase/no_thought.py WORK_FOLDER

WORK_FOLDER is that of run.py, whose full variant of seed 0 is the teacher; both are trained if they are not there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import torch
from chase import Texts
from run import Work, timed
from stages import Settings, evaluate, thinking, train_on_direct_texts
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

from pyquiet import QuietStarForCausalLM
from pyquiet.quiet_star.distillation import NtpObjective, next_token_loss

CONTROL = "nll"


def distil(
    student: LlamaForCausalLM, teacher: QuietStarForCausalLM, objective: str, settings: Settings, *, quiet: bool = False
) -> None:
    """Trains `student` in place on direct texts, by an objective of `next_token_loss` or, for "nll", plainly."""

    def loss(texts: Texts, first: int) -> Tensor:
        if objective == CONTROL:
            return student(texts.ids, labels=texts.ids, use_cache=False).loss
        ids = first + torch.arange(len(texts.ids))
        return next_token_loss(
            student, texts.ids, ntp_objective=objective, teacher=teacher, seed=0, sequence_ids=ids
        ).loss

    groups = [{"params": list(student.parameters()), "lr": settings.base_rate}]
    train_on_direct_texts(student, groups, loss, 0, settings, quiet=quiet)
    student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("work", type=Path, help="work folder of run.py")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    work = Work(args.work, Settings(), quiet=args.quiet)
    teacher = work.thinker("full", 0)
    results = {}
    for objective in (CONTROL, *get_args(NtpObjective)):
        student = work.pretrained()
        _, seconds = timed(distil, student, teacher, objective, work.settings, quiet=args.quiet)
        results[objective] = {
            "nll": evaluate(thinking(student, 0), work.settings.evaluation_rows).base,
            "seconds": seconds,
        }
        print(f"{objective:10s} NLL {results[objective]['nll']:.3f}  {seconds:.0f} s", flush=True)
    (work.folder / "no_thought.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
