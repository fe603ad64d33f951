"""A base's two ends, whatever the architecture: its tables, and what it does to logits after its LM head."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def embedding_table(base: PreTrainedModel) -> Tensor:
    """The rows [V, d] that token ids look up."""
    return cast(Tensor, base.get_input_embeddings().weight)


def head_weight(base: PreTrainedModel) -> Tensor:
    """The LM head's weight [V, d]."""
    return cast(Tensor, base.get_output_embeddings().weight)


def finish_logits(base: PreTrainedModel, raw: Tensor) -> Tensor:
    """Logits [..., V] from the LM head's raw ones: the base's own forward, run with decoder and head given.

    The forward runs on a shallow stand-in for the base whose decoder and head return what they are told, so that the
    mix can be made in float32 between the head and the softcap, and no architecture's rule is written down here.
    """
    flat = raw.reshape(1, -1, raw.shape[-1])
    head = base.get_output_embeddings()
    shell = object.__new__(type(base))
    shell.__dict__.update(base.__dict__)
    shell.__dict__["_modules"] = {
        name: _Given(_Hidden(last_hidden_state=flat[..., :1]))
        if name == base.base_model_prefix
        else (_Given(flat) if module is head else module)
        for name, module in base._modules.items()
    }
    # The class's forward: an instance's own (accelerate's hooks) would run the real base.
    logits: Tensor = type(base).forward(shell, inputs_embeds=flat, use_cache=False).logits
    return logits.view(raw.shape)


def log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """Log-probabilities [...] of tokens [...] under logits [..., V]."""
    return logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
