"""The configuration of a thinking model: its base's own configuration and how it thinks."""

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from pyquiet.checks import check_count, check_number


class QuietStarConfig(PreTrainedConfig):
    """Configuration of `QuietStarForCausalLM`.

    Args:
        base_config: the wrapped causal LM's configuration, or the dict of it.
        thought_tokens: m, sampled tokens between START and END.
        thoughts_per_token: N, thoughts after each token, averaged in probability.
        embedding_scale: START and END are stored divided by this, so that a small learning rate moves them.
        official: parity with the released code: the vocabulary has two more rows, START and END, which take part in
            every softmax but are never sampled.
        base_adapters: where PEFT adapters lie in the base, as `save_pretrained` records it; None if it has none.

    Raises:
        ValueError: thought_tokens < 0, thoughts_per_token < 1 or embedding_scale not positive and finite.
    """

    model_type = "quiet_star"
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        thought_tokens: int = 5,
        thoughts_per_token: int = 1,
        embedding_scale: float = 100.0,
        official: bool = False,
        base_adapters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        base = AutoConfig.for_model(**base_config) if isinstance(base_config, dict) else base_config
        self.base_config: PreTrainedConfig | None = base
        self.thought_tokens = check_count("thought_tokens", thought_tokens, least=0)
        self.thoughts_per_token = check_count("thoughts_per_token", thoughts_per_token, least=1)
        if not 0 < check_number("embedding_scale", embedding_scale) < math.inf:
            raise ValueError(f"embedding_scale must be positive and finite, got {embedding_scale}")
        self.embedding_scale = embedding_scale
        self.official = official
        self.base_adapters = base_adapters
        if base is not None:
            text = base.get_text_config()
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(text, name, None))
            kwargs.setdefault("tie_word_embeddings", base.tie_word_embeddings)
        super().__init__(**kwargs)

    @classmethod
    def from_official(cls, n_ahead: int, n_ahead_talk: int = 1, **kwargs: Any) -> "QuietStarConfig":
        """What the released code calls `n_ahead`: the base pass, START, n_ahead - 3 tokens, END.

        `n_ahead_talk`, the true tokens predicted after a thought, matters to training alone and is only checked.
        """
        check_count("n_ahead", n_ahead, least=3)
        check_count("n_ahead_talk", n_ahead_talk, least=1)
        return cls(thought_tokens=n_ahead - 3, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The decoder's configuration, which transformers asks for vocabulary and layer sizes."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)

    @property
    def reserved_ids(self) -> list[int]:
        """Ids of the official START and END rows, which no sampler may return; empty unless `official`."""
        size = self.get_text_config().vocab_size
        return [size - 2, size - 1] if self.official else []
