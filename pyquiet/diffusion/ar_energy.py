"""The energy of an autoregressive model: a denoiser's candidates weighed by what a causal LM says of them.

Letters: B texts, k candidates of each, T positions, R rows, V vocabulary, d width.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from pyquiet.checks import check_count
from pyquiet.diffusion.energy import Energy, check_candidates, check_mask_id
from pyquiet.diffusion.padding import leftward
from pyquiet.heads import cache_argument, finish_logits, head_weight, log_prob, rows_at_once

_TOKENS = 1 << 15  # of texts that go through the model at once, unless `microbatch` says otherwise


class AREnergy(Energy):
    """E = -log p_AR(x0) + log mu(x0 | x): the corrected law is the causal LM's posterior given all observed tokens.

    All tokens of a text are scored, those to the right of a mask too, for they tell what stood there. The text is read
    behind a BOS, and a text that begins with a given BOS is read as it is: that token is the condition, without a
    score. With the log mu of the denoiser, Z is p_AR of the observed tokens (arXiv 2410.21357).

    Tokens that all candidates of a text begin with go through the model once, into its KV cache. Log-probabilities are
    float32, whatever the model is in, and its logits [B, k, T, V] never exist. Neither gradients nor autocast enter.

    Args:
        lm: any causal LM of transformers, in evaluation mode; of a thinking model its base answers, without thoughts.
        bos_id: None takes `lm.config.bos_token_id`.
        mask_id: the denoiser's, so that a mask among the candidates is found out where `lm` knows such a token.
        carry_over: score the masked positions alone, given what is to their left: E = -sum log p_AR(x0_i | x0_<i) +
            log mu, with Z = 1. Left-to-right filling that does not look to the right, so its texts are not those of
            `lm` in more than one step. Needs `mask_id`.
        microbatch: texts that go through the model at once; None takes as many as have 2^15 tokens.

    Raises:
        TypeError: `lm` is no causal LM of transformers, as one that looks ahead is none.
        ValueError: no BOS is known or it is outside the vocabulary; carry_over without mask_id; from `check`: `lm` is
            in training mode, a text exceeds its context or holds an id that `lm` does not know; from a call: the same
            of candidates, or that they hold the mask.
    """

    needs_log_mu = True
    time_free = True

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        bos_id: int | None = None,
        mask_id: int | None = None,
        carry_over: bool = False,
        microbatch: int | None = None,
    ) -> None:
        if not isinstance(lm, PreTrainedModel) or lm.get_output_embeddings() is None or lm.config.is_encoder_decoder:
            raise TypeError(f"lm must be a transformers causal LM with its head, got {type(lm).__name__}")
        lm = lm.base if lm.config.model_type == "quiet_star" else lm
        config = lm.config.get_text_config()
        bos_id = config.bos_token_id if bos_id is None else bos_id
        self.vocab_size = head_weight(lm).shape[0]
        if bos_id is None:
            raise ValueError("bos_id is None and lm.config has no bos_token_id; pass the token that opens a text")
        if not 0 <= bos_id < self.vocab_size:
            raise ValueError(f"bos_id must be a token of lm, in 0..{self.vocab_size - 1}, got {bos_id}")
        if carry_over and mask_id is None:
            raise ValueError("mask_id is None: carry_over scores the masked positions, so it needs the denoiser's")
        if microbatch is not None:
            check_count("microbatch", microbatch, least=1)
        self.lm, self.bos_id, self.mask_id = lm, bos_id, mask_id
        self.carry_over, self.microbatch = carry_over, microbatch
        self.self_normalized = carry_over
        self._cache = cache_argument(lm.base_model.__class__)
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        self._shares = self._tried()

    @torch.no_grad()
    def __call__(
        self,
        candidates: Tensor,
        input_ids: Tensor,
        time: Tensor,
        log_mu: Tensor,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Energy.__call__`; `time` is not read."""
        real = check_candidates(candidates, input_ids, attention_mask)
        scored = self._scored(input_ids, real)
        self._check(candidates, scored[:, None], scored)
        counted = scored & (input_ids == self.mask_id) if self.carry_over else scored
        # Side by side from the left, behind one BOS: then padding, being to the right, is seen by no token.
        places = leftward(scored)
        texts = candidates.masked_fill(~scored[:, None], self.bos_id)
        texts = texts.gather(2, places[:, None].expand_as(texts))
        texts = nn.functional.pad(texts, (1, 0), value=self.bos_id)
        with torch.autocast(self.lm.device.type, enabled=False):
            log_p = self._log_p(texts.to(self.lm.device), counted.gather(1, places).to(self.lm.device))
        dtype = torch.promote_types(self.lm.dtype, torch.float32)
        return (log_mu.double() - log_p.to(log_mu.device)).to(dtype)

    def check(self, input_ids: Tensor, masked: Tensor, attention_mask: Tensor | None = None) -> None:
        real = check_candidates(input_ids[:, None], input_ids, attention_mask)
        if self.mask_id is not None:
            check_mask_id(self.mask_id, input_ids, masked)
        scored = self._scored(input_ids.masked_fill(masked, -1), real)  # what is to come is no given BOS
        self._check(input_ids[:, None], (scored & ~masked)[:, None], scored)

    def _scored(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """What is scored of texts, bool [B, T]: all that is no padding but a given BOS that opens one."""
        first = real.byte().argmax(1, keepdim=True)
        return real & ~torch.zeros_like(real).scatter_(1, first, input_ids.gather(1, first) == self.bos_id)

    def _check(self, candidates: Tensor, known: Tensor, scored: Tensor) -> None:
        """Of candidates [B, k, T], of which `known` [B, 1, T] must be tokens of the model, and what is scored."""
        if self.lm.training:
            raise ValueError("lm is in training mode, where dropout changes its law; call lm.eval()")
        wrong = (candidates < 0) | (candidates >= self.vocab_size)
        if self.mask_id is not None:
            wrong |= candidates == self.mask_id
        wrong &= known
        if wrong.any():
            found = int(candidates[wrong][0])
            what = "the mask" if found == self.mask_id else f"no token of lm, which knows {self.vocab_size}"
            raise ValueError(f"candidates hold the id {found}, {what}; denoiser and lm must share one tokenizer")
        longest = int(scored.sum(1).max()) if len(scored) else 0
        if self._context is not None and longest > self._context:
            raise ValueError(
                f"energy: candidates have {longest} tokens to score, but lm was made for {self._context}; shorten the "
                "texts, or take an lm that reads as many"
            )

    def _log_p(self, texts: Tensor, counted: Tensor) -> Tensor:
        """Sums of the log-probabilities of counted tokens, float64 [B, k]; texts [B, k, 1 + T], counted [B, T]."""
        B, k, _ = texts.shape
        out = torch.zeros(B, k, dtype=torch.float64, device=texts.device)
        lead = (texts == texts[:, :1]).all(1).long().cumprod(1).sum(1)  # tokens that all candidates begin with
        columns = torch.arange(1, counted.shape[1] + 1, device=counted.device)
        stop = (counted * columns).amax(1)  # tokens that a counted one comes after
        limit = self.microbatch or max(1, _TOKENS // texts.shape[2])
        # Neighbours in this order have prefixes of like length, and the shortest of a group is what it shares.
        for rows in lead.argsort(dim=0, stable=True).split(max(1, limit // k)):
            end = int(stop[rows].max())
            shared = min(int(lead[rows].min()), end)
            if shared:
                parts = self._group_log_p(texts[rows, :, : end + 1], counted[rows, :end], shared, limit)
                out[rows] = torch.cat(list(parts), 1)
        return out

    def _group_log_p(self, texts: Tensor, counted: Tensor, shared: int, limit: int) -> Iterator[Tensor]:
        """The same of a few texts, a part of their candidates at a time; the first `shared` tokens are read once."""
        B, k, length = texts.shape
        inputs, more = texts[..., :-1], shared < length - 1
        if more and not self._shares:
            shared = 1
        prefix = self.lm.base_model(inputs[:, 0, :shared], use_cache=more and self._shares)
        hidden = prefix.last_hidden_state
        constant = self._score(hidden[:, :-1], texts[:, 0, 1:shared], counted[:, : shared - 1])
        for part in torch.arange(k, device=texts.device).split(max(1, limit // B)):
            n = len(part)
            rows = hidden[:, -1:].repeat_interleave(n, 0)
            if more and self._shares:
                cache = copy.deepcopy(prefix[self._cache])
                cache.batch_repeat_interleave(n)
                rest = self.lm.base_model(inputs[:, part, shared:].flatten(0, 1), **{self._cache: cache})
                rows = torch.cat([rows, rest.last_hidden_state], 1)
            elif more:
                rows = self.lm.base_model(inputs[:, part].flatten(0, 1), use_cache=False).last_hidden_state
            targets = texts[:, part, shared:].flatten(0, 1)
            some = counted[:, shared - 1 :].repeat_interleave(n, 0)
            yield constant[:, None] + self._score(rows, targets, some).view(B, n)

    def _score(self, hidden: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """The sum over counted tokens [R, S] of their log-probabilities, float64 [R], after hidden states [R, S, d]."""
        out = torch.zeros(counted.shape, dtype=torch.float64, device=hidden.device)
        size = rows_at_once(self.vocab_size)
        pieces = zip(hidden[counted].split(size), targets[counted].split(size), strict=True)
        scores = [log_prob(self._logits(rows), tokens).double() for rows, tokens in pieces]
        out[counted] = torch.cat(scores) if scores else out.new_empty(0)
        return out.sum(1)

    def _logits(self, rows: Tensor) -> Tensor:
        head = self.lm.get_output_embeddings()
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if type(head) is nn.Linear:  # logits rounded to bfloat16 would be off by hundredths of a nat each
            bias = None if head.bias is None else head.bias.to(dtype)
            raw = nn.functional.linear(rows.to(dtype), head.weight.to(dtype), bias)
        else:
            raw = head(rows).to(dtype)
        return finish_logits(self.lm, raw)

    @torch.no_grad()
    def _tried(self) -> bool:
        """Whether the model keeps keys and values, which candidates can share; a recurrent state is left alone.

        Raises TypeError for a model whose first state depends on its second token.
        """
        bos, other = self.bos_id, (self.bos_id + 1) % self.vocab_size
        out = self.lm.base_model(torch.tensor([[bos, bos], [bos, other]], device=self.lm.device), use_cache=True)
        one, another = out.last_hidden_state[:, 0].float()
        rounding = max(64 * torch.finfo(torch.float32).eps, 2 * torch.finfo(self.lm.dtype).eps) * one.abs().max()
        if self.vocab_size > 1 and not self.lm.training and bool((one - another).abs().max() > rounding):
            raise TypeError(f"lm is a {type(self.lm).__name__}, which looks ahead; give a causal LM")
        cache: Any = out.get(self._cache)
        return isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def check_tokenizers(denoiser: PreTrainedTokenizerBase, lm: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless each token that the denoiser may write, all but its mask, has the same id in both.

    An energy scores the ids that a denoiser draws, so that other ids would be other texts; `lm` may know more.
    """
    mine, theirs = denoiser.get_vocab(), lm.get_vocab()
    wrong = [token for token, i in mine.items() if token != denoiser.mask_token and theirs.get(token) != i]
    if wrong:
        token = min(wrong, key=mine.__getitem__)
        found = f"has the id {theirs[token]}" if token in theirs else "does not exist"
        raise ValueError(
            f"tokenizers differ: {token!r} has the id {mine[token]} for the denoiser and {found} for the lm, one of "
            f"{len(wrong)} such tokens; take an lm that was trained with the denoiser's tokenizer"
        )
