"""Training arguments of runs that are quick and easily reckoned."""

from typing import Any

# Two steps of plain gradient descent over the examples in their order.
PLAIN_DESCENT: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "seed": 0,
    "max_length": 16,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
