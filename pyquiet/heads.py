"""A decoder's ends, whatever the architecture: its tables, its cache's name, what it does to logits after the head."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

_LOGITS_AT_ONCE = 1 << 22  # elements: 16 MB in float32


def rows_at_once(elements_a_row: int) -> int:
    """How many rows of logits to compute together, so that they stay small however long the text."""
    return max(1, _LOGITS_AT_ONCE // max(1, elements_a_row))


def embedding_table(base: PreTrainedModel) -> Tensor:
    """The rows [V, d] that token ids look up."""
    return cast(Tensor, base.get_input_embeddings().weight)


def head_weight(base: PreTrainedModel) -> Tensor:
    """The LM head's weight [V, d]."""
    return cast(Tensor, base.get_output_embeddings().weight)


_FEW_ROWS = 5
_LARGE_HEAD = 6 << 20  # elements: a head that no cache holds


def apply_head(head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [..., V] of an LM head's module for hidden states [..., d] in the head's dtype.

    Few rows take as long as reading the weight does. A product with the weight on the left comes near to that on a CPU;
    `linear`, and a product with one column, are two to four times slower on some.
    """
    rows = hidden.numel() // hidden.shape[-1]
    matrix = _large_matrix(head) if 0 < rows <= _FEW_ROWS else None
    if matrix is None:
        return cast(Tensor, head(hidden))
    flat = hidden.reshape(rows, -1)
    pair = flat if rows > 1 else flat.repeat(2, 1)
    logits = (matrix.weight @ pair.t()).t()[:rows]
    if matrix.bias is not None:
        logits = logits + matrix.bias
    return logits.reshape(*hidden.shape[:-1], -1).contiguous()


def _large_matrix(head: nn.Module) -> nn.Linear | None:
    """The head, if it is a large float32 matrix on a CPU and nothing besides: no adapter, no hook."""
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return None
    weight = head.weight
    large = weight.is_cpu and weight.dtype is torch.float32 and weight.numel() >= _LARGE_HEAD
    return head if large else None


@cache
def cache_argument(network: type[nn.Module]) -> str:
    """What a network's forward calls its cache: another name since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def finish_logits(base: PreTrainedModel, raw: Tensor) -> Tensor:
    """Logits [..., V] from the LM head's raw ones: the base's own forward, run with decoder and head given.

    The forward runs on a shallow stand-in for the base whose decoder and head return what they are told, so that the
    mix can be made in float32 between the head and the softcap, and no architecture's rule is written down here.
    """
    flat = raw.reshape(1, -1, raw.shape[-1])
    parts = {name: _Given(flat) for name, module in base._modules.items() if module is base.get_output_embeddings()}
    parts[base.base_model_prefix] = _Given(_Hidden(last_hidden_state=flat[..., :1]))
    logits: Tensor = run_standing_in(stand_in(base, parts), inputs_embeds=flat, use_cache=False).logits
    return logits.view(raw.shape)


def stand_in(model: PreTrainedModel, parts: Mapping[str, nn.Module]) -> PreTrainedModel:
    """A shallow copy of the model that shares all of its modules but these, for `run_standing_in`."""
    shell = cast(PreTrainedModel, object.__new__(type(model)))
    shell.__dict__.update(model.__dict__)
    shell.__dict__["_modules"] = {**model._modules, **parts}
    return shell


def run_standing_in(shell: PreTrainedModel, **inputs: Any) -> Any:
    """What the forward of the model's class makes of it: an instance's own (accelerate's hooks) would run the model."""
    return type(shell).forward(shell, **inputs)


def log_prob(logits: Tensor, token: Tensor, *, temperature: float = 1.0, sums: list[Tensor] | None = None) -> Tensor:
    """Log-probabilities [...] of tokens [...] under logits [..., V] / temperature, not differentiable twice.

    `sums`, a list that starts empty, spares a later call with the same logits (activation checkpointing's) the sums.
    """
    out: Tensor = _LogProb.apply(logits, token, 1 / temperature, [] if sums is None else sums)  # type: ignore[no-untyped-call]
    return out


class _LogProb(torch.autograd.Function):
    """Keeps nothing of the logits' size but the logits; its backward makes one such tensor, the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token: Tensor, scale: float, sums: list[Tensor]) -> Tensor:
        token = token[..., None]
        if not sums:
            top = scale * logits.amax(-1, keepdim=True)
            sums += top, torch.add(-top, logits, alpha=scale).exp_().sum(-1, keepdim=True).log_()
        top, rest = sums  # apart: their sum would round away what a sure token lacks to 1
        ctx.save_for_backward(logits, token, top + rest)
        ctx.scale = scale
        return (scale * logits.gather(-1, token) - top - rest)[..., 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("log_prob is not differentiable twice: take its gradient without create_graph")
        logits, token, total = ctx.saved_tensors
        grad = ctx.scale * grad[..., None]
        out = torch.add(-total, logits, alpha=ctx.scale).exp_().mul_(-grad).scatter_add_(-1, token, grad)
        return out, None, None, None


class _Hidden(BaseModelOutputWithPast):
    """A decoder's output of which only the last hidden state is known."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


class _Given(nn.Module):
    """Stands in for a module and returns what it was given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    @property
    def decoder(self) -> "_Given":
        """Some models (OPT) call their decoder past the base model."""
        return self

    @property
    def weight(self) -> Any:
        """Some (Mamba) ask their head for its dtype."""
        return self.output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
