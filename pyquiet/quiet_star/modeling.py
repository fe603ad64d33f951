"""`QuietStarForCausalLM`: any decoder, a thought after every token mixed into its prediction (arXiv 2403.09629)."""

import copy
import os
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pyquiet.checks import check_count, check_word
from pyquiet.heads import apply_head, embedding_table, finish_logits, head_weight, log_prob
from pyquiet.quiet_star.adapters import AdaptedBase, lay_out_adapters, record_adapters, settle_adapters, unwrapped
from pyquiet.quiet_star.configuration import QuietStarConfig
from pyquiet.quiet_star.generation import ThinkingGeneration
from pyquiet.quiet_star.inputs import check_context, check_inputs, check_no_nan, check_positions, real_tokens
from pyquiet.quiet_star.objective import QuietStarObjective, ThinkingLoss
from pyquiet.quiet_star.support import check_supported
from pyquiet.quiet_star.thinking import Round, Text, Think, Thinker, ThoughtOptions, average, chunks
from pyquiet.quiet_star.training import ThinkingTraining


@dataclass
class Thoughts:
    """Thoughts after every token of a text. At padding, tokens are -1 and everything else is 0."""

    tokens: Tensor  # int64 [B, T, N, m]
    log_probs: Tensor  # [B, T, N, m] natural logarithm, under the law the thought was drawn from
    weight: Tensor  # [B, T, N] w, the weight of the thought in the mix
    mixed_log_probs: Tensor  # [B, T-1, N] of the true next token, with the thought
    base_log_probs: Tensor  # [B, T-1] of the true next token, without


class QuietStarForCausalLM(ThinkingTraining, ThinkingGeneration, AdaptedBase, PreTrainedModel, GenerationMixin):
    """A causal LM that thinks after every token: START, m sampled tokens, END, mixed into the next prediction.

    The prediction is (1 - w) * base + w * thought on the logits, in float32 at least; w is an unbounded scalar that the
    mixing head, an MLP 2d -> d -> d -> 1 whose last layer starts at zero, computes from the final-norm hidden states
    before and after the thought (arXiv 2403.09629, section 4.3; the paper's w is 1 - w here). The wrapped model,
    `base`, is left as it is. Build one with `from_base`; save and load it as any transformers model.
    """

    config: QuietStarConfig
    config_class = QuietStarConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # A step of 1e-6 is lost in bfloat16, and so is a mix with a small weight.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"mixing_head", "start_embedding", "end_embedding"}

    def __init__(self, config: QuietStarConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if base is None:
            base = AutoModelForCausalLM.from_config(config.base_config)
            if config.base_adapters is not None:
                lay_out_adapters(base, config.base_adapters)
        else:
            for module in base.modules():
                module._is_hf_initialized = True  # so that post_init leaves its weights alone
        if config.base_adapters is not None:
            settle_adapters(base, config.base_adapters)
        self.base, config.base_config = base, base.config  # one: it may grow, with its vocabulary
        table = embedding_table(base)
        width = table.shape[1]
        dtype = torch.promote_types(table.dtype, torch.float32)
        self.mixing_head = nn.Sequential(
            nn.Linear(2 * width, width, dtype=dtype),
            nn.ReLU(),
            nn.Linear(width, width, dtype=dtype),
            nn.ReLU(),
            nn.Linear(width, 1, bias=False, dtype=dtype),
        ).to(head_weight(base).device)
        self.start_embedding = nn.Parameter(torch.zeros(width, dtype=dtype, device=table.device))
        self.end_embedding = nn.Parameter(torch.zeros(width, dtype=dtype, device=table.device))
        self.generation_config = copy.deepcopy(base.generation_config)
        self.post_init()

    @classmethod
    def from_base(
        cls,
        model: PreTrainedModel | str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        thought_tokens: int = 5,
        thoughts_per_token: int = 1,
        start_init: int | None = None,
        official: bool = False,
    ) -> "QuietStarForCausalLM":
        """A thinking model around a causal LM, which shares the given model's weights and leaves them as they are.

        START and END start from the embedding of the first token of "---" (through `tokenizer`), of the id
        `start_init`, or, with neither, from the mean embedding. With a path, a tokenizer lying there is used. The
        head's last layer is zero, so a fresh model predicts what its base predicts. `official=True` works with two more
        vocabulary rows, as the released code does, on a copy of the given model. A `PeftModel` is taken out of its
        wrapper, its adapters in place: they train, with START, END and the head, and the rest of the base does not.

        Raises:
            NotImplementedError: the architecture cannot think (no attention interface, ALiBi, sinks, latent or
                state-space attention); the message names it.
            ValueError, TypeError: an argument is out of range, or a `PeftModel` does not adapt layers.
        """
        model = unwrapped(model)
        if not isinstance(model, PreTrainedModel | str | os.PathLike):
            raise TypeError(f"model must be a transformers causal LM or the path of one, got {type(model).__name__}")
        if not isinstance(model, PreTrainedModel):
            tokenizer = tokenizer or _tokenizer_at(model)
            kind = AutoConfig.from_pretrained(model)
            if type(kind) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise ValueError(f"model {model}: a {kind.model_type} is no causal language model")
            model = AutoModelForCausalLM.from_pretrained(model)
        elif official:
            model = copy.deepcopy(model)
        if isinstance(model, QuietStarForCausalLM):
            raise ValueError("model thinks already; give from_base its .base")
        check_supported(model)
        if start_init is None and tokenizer is not None:
            start_init = next(iter(tokenizer("---", add_special_tokens=False)["input_ids"]), None)
        vocabulary = embedding_table(model).shape[0]
        if start_init is not None and check_count("start_init", start_init, least=0) >= vocabulary:
            raise ValueError(f"start_init must be a token id in 0..{vocabulary - 1}, got {start_init}")
        if official:
            model.resize_token_embeddings(vocabulary + 2)
        config = QuietStarConfig(
            copy.deepcopy(model.config),
            thought_tokens=thought_tokens,
            thoughts_per_token=thoughts_per_token,
            official=official,
            base_adapters=record_adapters(model),
            dtype=model.dtype,
        )
        thinker = cls(config, model)
        thinker._init_thoughts(start_init)
        thinker._probe()
        thinker.train(model.training)
        return thinker

    @torch.no_grad()
    def _init_thoughts(self, token_id: int | None) -> None:
        table = self.base.get_input_embeddings()
        if token_id is None:
            row = table.weight.to(self.start_embedding.dtype).mean(0)
            row = row * getattr(table, "embed_scale", 1.0)  # Gemma's tables scale what they look up
        else:
            row = table(torch.tensor([token_id], device=table.weight.device))[0]
        for parameter in (self.start_embedding, self.end_embedding):
            parameter.copy_(row / self.config.embedding_scale)

    @torch.no_grad()
    def _probe(self) -> None:
        """The start of two thoughts, so that an architecture that cannot think is found out before it is relied on."""
        if self.start_embedding.device.type == "meta":
            return
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.start_embedding.device)
        try:
            thinker = Thinker(self, Text.of(ids, None), ThoughtOptions(seed=0, thoughts=1))
            hidden = thinker.read(ids)
            thinker._run_paths(torch.arange(1, 3, device=ids.device)[None], self.start[None], 0)
            self.finish(self.raw_logits(hidden))
        except Exception as error:
            name = type(self.base).__name__
            known = isinstance(error, NotImplementedError)
            if known and str(error).startswith(name):
                raise
            reason = error if known else f"its forward does not take thoughts ({error})"
            raise NotImplementedError(f"{name} cannot think: {reason}") from error

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.mixing_head[-1]:
            nn.init.zeros_(cast(nn.Linear, module).weight)
        elif module is self:
            self._init_thoughts(None)

    # -- pieces of the model

    @property
    def start(self) -> Tensor:
        """START's embedding [d], differentiable in `start_embedding`."""
        return self._meta_token(self.start_embedding)

    @property
    def end(self) -> Tensor:
        """END's embedding [d], differentiable in `end_embedding`."""
        return self._meta_token(self.end_embedding)

    def _meta_token(self, parameter: Tensor) -> Tensor:
        return (parameter * self.config.embedding_scale).to(embedding_table(self.base).dtype)

    @property
    def logits_size(self) -> int:
        """V, the rows of the LM head."""
        return head_weight(self.base).shape[0]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [..., d] of token ids [...]."""
        embeddings: Tensor = self.base.get_input_embeddings()(input_ids)
        return embeddings

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """What the LM head alone makes of hidden states [..., d]: [..., V], in float32 at least."""
        logits = apply_head(self.base.get_output_embeddings(), hidden.to(head_weight(self.base).dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def finish(self, raw: Tensor) -> Tensor:
        """Logits [..., V] from raw ones: the scales and softcaps of the base's own forward, run around them."""
        return finish_logits(self.base, raw)

    def mix(self, hidden: Tensor, end_hidden: Tensor) -> Tensor:
        """The thoughts' weights w [..., N] from base states [..., d] and END states [..., N, d]."""
        first = next(self.mixing_head.parameters())
        pair = torch.cat([hidden[..., None, :].expand_as(end_hidden), end_hidden], -1)
        with torch.autocast(first.device.type, enabled=False):  # 1 - w is 1 in bfloat16 for a small w
            weight: Tensor = self.mixing_head(pair.to(first.device, first.dtype))[..., 0]
        return weight

    def mixed_logits(self, raw_base: Tensor, end_hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits [..., N, V] from raw base logits [..., V], END states [..., N, d] and weights [..., N]."""
        end = self.raw_logits(end_hidden)
        return self.finish(torch.lerp(raw_base[..., None, :], end, weight[..., None].to(end)))

    def banned_ids(self, device: torch.device) -> Tensor | None:
        """bool [V], True at ids that must never be sampled; None if there are none."""
        if not self.config.reserved_ids:
            return None
        banned = torch.zeros(self.logits_size, dtype=torch.bool, device=device)
        banned[self.config.reserved_ids] = True
        return banned

    # -- thinking over a text

    @torch.no_grad()
    def think_at_every_token(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        seed: int | None = None,
        sequence_ids: Tensor | None = None,
        thoughts_per_token: int | None = None,
        thought_temperature: float = 1.0,
        thought_top_k: int | None = None,
        thought_top_p: float | None = None,
    ) -> Thoughts:
        """N thoughts after every token of a text, all in parallel (arXiv 2403.09629, section 4.2).

        Args:
            input_ids: int64 [B, T]. attention_mask: [B, T], 0 at padding, which may lie on either side.
            positions: int64 [K] or [B, K], the columns after which to think; None is all. With them, every field has K
                columns, and the log-probabilities are 0 where a text ends.
            seed: of all draws; None takes one from torch's generator. A thought token depends on (seed, sequence id,
                position without padding, thought, step) alone, not on the batch or on what is computed beside it.
            sequence_ids: int64 [B]; None numbers the rows.
            thoughts_per_token: N; None is the configuration's. The other arguments shape the thoughts' sampling.

        Returns:
            `Thoughts`. Memory grows linearly with T.

        Raises:
            ValueError, TypeError: ids or positions out of range, an empty row, a mask with holes, a text that with its
                thoughts passes the model's context, NaN logits (the row is named), an option out of range.
        """
        sampling = (seed, thoughts_per_token, thought_temperature, thought_top_k, thought_top_p, sequence_ids)
        text, options = self._prepare(input_ids, attention_mask, sampling)
        columns = check_positions(positions, input_ids)
        hidden, round_ = self._think_after(columns, input_ids, text, options)
        weight = self.mix(hidden, round_.end_hidden)
        T = input_ids.shape[1]
        following = (columns + 1).clamp_max(T - 1)
        base, mixed = self._log_probs(input_ids.gather(1, following), hidden, round_.end_hidden, weight)
        real = real_tokens(input_ids, text.mask)
        here = real.gather(1, columns)
        both = here & real.gather(1, following) & (columns < T - 1)
        base, mixed = base.masked_fill(~both, 0), mixed.masked_fill(~both[..., None], 0)
        check_no_nan(base, mixed)
        if positions is None:
            base, mixed = base[:, :-1], mixed[:, :-1]
        return Thoughts(
            tokens=round_.tokens.masked_fill(~here[:, :, None, None], -1),
            log_probs=round_.log_probs.masked_fill(~here[:, :, None, None], 0),
            weight=weight.masked_fill(~here[:, :, None], 0),
            mixed_log_probs=mixed,
            base_log_probs=base,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        think: Think = "always",
        objective: QuietStarObjective | None = None,
        target_counts: Tensor | None = None,
        may_be_empty: bool = False,
        seed: int | None = None,
        sequence_ids: Tensor | None = None,
        thoughts_per_token: int | None = None,
        thought_temperature: float = 1.0,
        thought_top_k: int | None = None,
        thought_top_p: float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | ThinkingLoss:
        """Next-token logits [B, T, V] after thinking at every token; with labels [B, T] (-100: ignored), also the loss.

        With N > 1 the logits are log-probabilities averaged over the thoughts in probability. Arguments are those of
        `think_at_every_token`; `think="never"` is the base's own forward, which takes any further argument. No gradient
        flows through a thinking forward, but with an objective: then this is `thinking_loss`, behind the door that
        wrappers (DistributedDataParallel, FSDP, autocast, PEFT) watch.
        """
        check_word("think", think, Think)
        if think == "never":
            return self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        given = {name for name, value in kwargs.items() if value is not None}
        if unknown := given - {"return_dict", "use_cache"}:
            raise TypeError(f'forward with think="always" does not take {", ".join(sorted(unknown))}')
        if objective is not None:
            return self.thinking_loss(
                input_ids,
                attention_mask,
                labels,
                objective=objective,
                seed=seed,
                sequence_ids=sequence_ids,
                target_counts=target_counts,
                may_be_empty=may_be_empty,
            )
        sampling = (seed, thoughts_per_token, thought_temperature, thought_top_k, thought_top_p, sequence_ids)
        with torch.no_grad():
            text, options = self._prepare(input_ids, attention_mask, sampling)
            hidden, round_ = self._think_after(check_positions(None, input_ids), input_ids, text, options)
            weight = self.mix(hidden, round_.end_hidden)
            raw = self.raw_logits(hidden)
            parts = [
                average(self.mixed_logits(raw[:, part], round_.end_hidden[:, part], weight[:, part]))
                for part in chunks(input_ids.shape[1], input_ids.shape[0] * options.thoughts * self.logits_size)
            ]
            logits = torch.cat(parts, 1)
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.logits_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def _prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, sampling: tuple[Any, ...]
    ) -> tuple[Text, ThoughtOptions]:
        """Where the text lies, and how its thoughts are drawn, checked; `sampling` as in `ThoughtOptions.checked`."""
        check_inputs(input_ids, attention_mask, embedding_table(self.base).shape[0])
        text = Text.of(input_ids, attention_mask)
        check_context(self.config, int(text.length.max()))
        return text, ThoughtOptions.checked(self.config.thoughts_per_token, input_ids.shape[0], *sampling)

    def _think_after(
        self, columns: Tensor, input_ids: Tensor, text: Text, options: ThoughtOptions
    ) -> tuple[Tensor, Round]:
        """Hidden states [B, K, d] at the columns [B, K] of the text, read as the base reads it, and thoughts there."""
        thinker = Thinker(self, text, options)
        hidden = thinker.read(input_ids)
        index = columns[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index), thinker.think(columns + 1)

    def _log_probs(self, target: Tensor, hidden: Tensor, end_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets [B, K]: base [B, K] and mixed [B, K, N], a chunk of positions at a time."""
        B, K, N = weight.shape
        base, mixed = [], []
        for part in chunks(K, B * (N + 1) * self.logits_size):
            raw = self.raw_logits(hidden[:, part])
            base.append(log_prob(self.finish(raw), target[:, part]))
            logits = self.mixed_logits(raw, end_hidden[:, part], weight[:, part])
            mixed.append(log_prob(logits, target[:, part, None].expand(-1, -1, N)))
        return torch.cat(base, 1), torch.cat(mixed, 1)

    # -- what transformers asks of a model

    @property
    def dtype(self) -> torch.dtype:
        """The base's; what mixes stays in float32 beside a base in half precision."""
        return cast(torch.dtype, self.base.dtype)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base's own; refused for an official model, whose last two rows are START and END."""
        if self.config.official:
            raise ValueError("an official model's vocabulary is fixed: resize the base before from_base(official=True)")
        return cast(nn.Module, self.base.resize_token_embeddings(*args, **kwargs))

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base.get_output_embeddings())

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)


def _tokenizer_at(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None
    return tokenizer


AutoConfig.register("quiet_star", QuietStarConfig, exist_ok=True)
AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM, exist_ok=True)
