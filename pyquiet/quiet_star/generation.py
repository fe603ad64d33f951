"""Cached thinking generation through `model.generate`: m + 1 forwards of the base a token (arXiv 2403.09629)."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from pyquiet.checks import check_word
from pyquiet.heads import embedding_table
from pyquiet.quiet_star.inputs import check_context, check_inputs, check_way, to_left_padding
from pyquiet.quiet_star.thinking import Text, Think, Thinker, ThoughtOptions, average
from pyquiet.randomness import Purpose, Stream, check_temperature, draw

if TYPE_CHECKING:
    from pyquiet.quiet_star.modeling import QuietStarForCausalLM


@dataclass
class GeneratedThoughts:
    """The thoughts before each new token. After a row has ended, tokens are -1 and everything else is 0."""

    tokens: Tensor  # int64 [B, new, N, m]
    log_probs: Tensor  # [B, new, N, m]
    weight: Tensor  # [B, new, N]


@dataclass
class QuietStarGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`: transformers' fields and these.

    `calls` holds forwards of the base by kind ("think"), `token_passes` the rows that went through them, int64 [B].
    """

    thoughts: GeneratedThoughts | None = None
    calls: dict[str, Tensor] | None = None
    token_passes: Tensor | None = None


class ThinkingGeneration(GenerationMixin):
    """`generate` for thinking models; every draw comes from a `Stream`, none from torch's generator."""

    _supported_generation_modes: ClassVar[list[GenerationMode]] = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    @torch.no_grad()
    def generate(
        self: "QuietStarForCausalLM",
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        think: str = "always",
        seed: int | None = None,
        sequence_ids: Tensor | None = None,
        thoughts_per_token: int | None = None,
        thought_temperature: float = 1.0,
        thought_top_k: int | None = None,
        thought_top_p: float | None = None,
        return_thoughts: bool = False,
        **kwargs: Any,
    ) -> QuietStarGenerateOutput | Tensor:
        """Continues prompts, thinking before every new token; takes what transformers' `generate` takes, and

        Args:
            think: "always", or "never" for the base's own `generate`, bit for bit (with a seed, torch's generator is
                seeded for the call and put back).
            seed: of thoughts and answers; None takes one from torch's generator. The same seed gives a prompt the same
                tokens whatever is in the batch beside it.
            sequence_ids: int64 [B], ids the draws are counted by; None numbers the prompts. Return r of
                `num_return_sequences` draws its own numbers; return 0 is what a single return would be.
            thoughts_per_token: N thoughts a token, averaged in probability; None is the configuration's.
            thought_temperature, thought_top_k, thought_top_p: sampling of thoughts; temperature, top_k and top_p stay
                the answer's, which is greedy unless do_sample.
            return_thoughts: also return the thoughts; implies return_dict_in_generate.

        A streamer with a method `put_thoughts(tokens[B, N, m], weight[B, N])` gets each thought before its token.
        Prompts may be padded on either side; new tokens follow the prompt's last column.

        Returns:
            int64 [B, L], or `QuietStarGenerateOutput`. START and END never appear in it.

        Raises:
            ValueError, TypeError: as `think_at_every_token`; also for beam search and assisted generation, and for a
                temperature by which float32 cannot divide.
        """
        check_word("think", think, Think)
        if think == "never":
            if return_thoughts:
                raise ValueError('return_thoughts=True needs think="always"')
            result = self._generate_with_base(inputs, generation_config, seed, kwargs)
            return cast(QuietStarGenerateOutput | Tensor, result)
        input_ids, mask = self._read_prompts(inputs, generation_config, kwargs)
        thoughts = (thoughts_per_token, thought_temperature, thought_top_k, thought_top_p)
        options = ThoughtOptions.checked(self.config.thoughts_per_token, len(input_ids), seed, *thoughts, sequence_ids)
        if return_thoughts:
            kwargs["return_dict_in_generate"] = True
        left_ids, left_mask = to_left_padding(input_ids, mask)
        result = super().generate(
            left_ids,
            generation_config,
            attention_mask=left_mask,
            thinking=_Request(options, input_ids.shape[0], return_thoughts),
            **kwargs,
        )
        sequences = result if isinstance(result, Tensor) else result.sequences
        returns = len(sequences) // len(input_ids)
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(returns, 0)
        return cast(QuietStarGenerateOutput | Tensor, result)

    def _read_prompts(
        self: "QuietStarForCausalLM",
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The prompts and their mask, int64 [B, T] each, taken out of `generate`'s arguments and checked with them."""
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None or kwargs.get("inputs_embeds") is not None or kwargs.get("past_key_values") is not None:
            raise ValueError("generate needs input_ids; inputs_embeds and past_key_values are not supported")
        for name in ("position_ids", "cache_implementation", "custom_generate"):
            if kwargs.get(name) is not None:
                raise ValueError(f"generate with thoughts does not take {name}: leave it out")
        merged, _ = self._prepare_generation_config(generation_config, **kwargs)  # as transformers will
        _check_temperature(merged)
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            mask = self._prepare_mask(input_ids, merged)
        check_inputs(input_ids, mask, embedding_table(self.base).shape[0])
        check_way(merged, kwargs.get("assistant_model"), len(input_ids), embedding_table(self.base).shape[0])
        if mask is None:
            mask = torch.ones_like(input_ids)
        check_context(self.config, int(mask.sum(1).max()) + _new_tokens(merged, input_ids.shape[1]) - 1)
        return input_ids, mask

    def _generate_with_base(
        self: "QuietStarForCausalLM",
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        seed: int | None,
        kwargs: dict[str, Any],
    ) -> Any:
        config = copy.deepcopy(generation_config or self.generation_config)
        others = config.update(**kwargs)
        _check_temperature(config)
        if self.config.reserved_ids:
            config.suppress_tokens = [*(config.suppress_tokens or []), *self.config.reserved_ids]
        if seed is None:
            return self.base.generate(inputs, config, **others)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.base.generate(inputs, config, **others)

    def _prepare_mask(self, input_ids: Tensor, config: GenerationConfig) -> Tensor | None:
        """Without a mask, pad tokens at a row's ends are padding where they cannot also mean the end."""
        pad, eos = config.pad_token_id, config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        if pad is None or pad in ends or not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            return None  # all tokens
        token: Tensor = (input_ids != pad).long()
        return (token.cumsum(1) * token.flip(1).cumsum(1).flip(1)).clamp_max(1)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "thinking"})

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: text and paths live in a cache of our own."""

    def _sample(
        self: "QuietStarForCausalLM",
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> QuietStarGenerateOutput | Tensor:
        request: _Request = model_kwargs["thinking"]
        loop = _Loop(self, input_ids, model_kwargs.get("attention_mask"), request, generation_config)
        pad = generation_config._pad_token_tensor
        may_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        done = False
        while self._has_unfinished_sequences(done, synced_gpus, device=input_ids.device):
            logits = loop.think(input_ids, streamer)
            if done:  # another rank still works
                continue
            scores = logits_processor(input_ids, logits)
            tokens = loop.choose(scores)
            if may_end:
                tokens = torch.where(loop.running, tokens, pad)
            loop.record(logits, scores)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            loop.running &= ~stopping_criteria(input_ids, loop.scores)
            done = not bool(loop.running.any())
        if streamer is not None:
            streamer.end()
        return loop.result(input_ids)


def _check_temperature(config: GenerationConfig) -> None:
    """Raises ValueError for a temperature by which logits are not divided in float32; transformers asks that of 0."""
    if config.do_sample and config.temperature:
        check_temperature("temperature", config.temperature)


def _new_tokens(config: GenerationConfig, prompt_length: int) -> int:
    """How many tokens transformers' `generate` will add at most to a prompt of that many columns."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        return 20  # transformers' default
    return int(config.max_length) - prompt_length


@dataclass
class _Request:
    """What `generate` hands to `_sample` beside transformers' own arguments."""

    options: ThoughtOptions
    prompts: int
    return_thoughts: bool


class _Loop:
    """The state of one generation: the thinker, which rows still run and what is to be returned."""

    def __init__(
        self,
        model: "QuietStarForCausalLM",
        input_ids: Tensor,
        mask: Tensor | None,
        request: _Request,
        generation_config: GenerationConfig,
    ) -> None:
        B, device = len(input_ids), input_ids.device
        self.model, self.config, self.request = model, generation_config, request
        returns = B // request.prompts
        self.return_index = torch.arange(returns, device=device).repeat(request.prompts)
        ids = request.options.sequence_ids
        ids = torch.arange(request.prompts, device=device) if ids is None else ids.to(device)
        request.options.sequence_ids = ids.repeat_interleave(returns)
        self.thinker = Thinker(model, Text.of(input_ids, mask), request.options, self.return_index)
        self.banned = model.banned_ids(device)
        self.running = torch.ones(B, dtype=torch.bool, device=device)
        keep = generation_config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keep and generation_config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep and generation_config.output_logits else None
        self.thoughts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.calls = torch.zeros(B, dtype=torch.int64, device=device)
        self.token_passes = torch.zeros(B, dtype=torch.int64, device=device)

    def think(self, input_ids: Tensor, streamer: Any) -> Tensor:
        """Reads the tokens not yet read, thinks after the last one and returns the next token's logits [B, V]."""
        model, thinker = self.model, self.thinker
        new = input_ids[:, thinker.cache.get_seq_length() :]
        text = thinker.text
        if new.shape[1] == 1 and text.mask is not None:
            text.mask = torch.cat([text.mask, text.mask.new_ones(len(new), 1)], 1)
        text.length = input_ids.shape[1] - text.start
        calls, passes = thinker.calls, thinker.token_passes
        round_ = thinker.think(torch.full((len(new), 1), input_ids.shape[1], device=new.device), new)
        self.calls += self.running * (thinker.calls - calls)
        self.token_passes += self.running * (thinker.token_passes - passes)
        assert round_.text_hidden is not None
        hidden, end = round_.text_hidden[:, -1], round_.end_hidden[:, 0]  # [B, d], [B, N, d]
        weight = model.mix(hidden, end)
        if self.request.return_thoughts:
            self._keep(round_.tokens[:, 0], round_.log_probs[:, 0], weight)
        if hasattr(streamer, "put_thoughts"):
            streamer.put_thoughts(round_.tokens[:, 0].cpu(), weight.cpu())
        logits = average(model.mixed_logits(model.raw_logits(hidden), end, weight))
        if self.banned is not None:
            logits = logits.masked_fill(self.banned, -torch.inf)
        return logits

    def choose(self, scores: Tensor) -> Tensor:
        """The next tokens, int64 [B]."""
        seed, sequence, position = self.request.options.seed, self.thinker.sequence, self.thinker.text.length
        stream = Stream(seed, Purpose.ANSWER, sequence, position, index=self.return_index)
        temperature = 1.0 if self.config.do_sample else 0.0
        return draw(scores, stream=stream, temperature=temperature, banned=self.banned).tokens

    def record(self, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def _keep(self, tokens: Tensor, log_probs: Tensor, weight: Tensor) -> None:
        ended = ~self.running
        self.thoughts.append(
            (
                tokens.masked_fill(ended[:, None, None], -1),
                log_probs.masked_fill(ended[:, None, None], 0),
                weight.masked_fill(ended[:, None], 0),
            )
        )

    def result(self, sequences: Tensor) -> QuietStarGenerateOutput | Tensor:
        if not self.config.return_dict_in_generate:
            return sequences
        thoughts = None
        if self.thoughts:
            tokens, log_probs, weight = (torch.stack(parts, 1) for parts in zip(*self.thoughts, strict=True))
            thoughts = GeneratedThoughts(tokens, log_probs, weight)
        return QuietStarGenerateOutput(
            sequences=sequences,
            scores=self.scores,
            logits=self.logits,
            thoughts=thoughts,
            calls={"think": self.calls},
            token_passes=self.token_passes,
        )
