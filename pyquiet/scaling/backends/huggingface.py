"""Hugging Face models in this process as drafts and targets: requests of many chains, run in one batch."""

import asyncio
import hashlib
import json
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.checks import can_think, check_count
from pyquiet.environment import bits
from pyquiet.heads import embedding_table
from pyquiet.randomness import check_processing
from pyquiet.scaling.backends.base import (
    NO_USAGE,
    Choose,
    ContextOverflowError,
    Generate,
    Generated,
    GoneError,
    Prompt,
    RefusedError,
    Score,
    Scored,
    TextCodec,
)
from pyquiet.scaling.backends.codec import HFCodec
from pyquiet.scaling.backends.decoding import DecoderRunner
from pyquiet.scaling.backends.jobs import Job, Runner, Worker, Writing
from pyquiet.scaling.backends.kv import KVStore
from pyquiet.scaling.backends.thinking import ThinkingRunner
from pyquiet.scaling.backends.turns import turns_on


class HFBackend:
    """A `Backend` for a causal LM in this process; a `QuietStarForCausalLM` thinks before every token.

    One thread runs the model, on batches that requests join and leave between two tokens. Draws are counted by the
    request's seed and the token's place, so they do not depend on the batch; logits do in their last bits, so near
    ties may fall otherwise. What was read of a chain is kept, and only what differs is read again.

    Args:
        model: put into evaluation mode, and on `device` if one is given. tokenizer: a fast one.
        max_batch: texts that are written at once.
        max_wait, max_steps: seconds that an idle model, and tokens that a busy one waits for further requests.
        cache_bytes: of keys and values kept between requests; the least recently used chain's go first.
        deterministic: one request at a time and nothing kept, so that equal requests give equal bits.

    A thinking model keeps nothing and writes a batch to its end; its draws are counted by the low 32 bits of the seed,
    the thoughts of a score by the prompt alone, and it tells no entropies.

    Raises:
        TypeError: a slow tokenizer. ValueError: a count out of range.
        NotImplementedError: the model cannot go on from a cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 64,
        max_wait: float = 0.002,
        max_steps: int = 4,
        cache_bytes: int = 1 << 30,
        deterministic: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_count("max_batch", max_batch, least=1)
        check_count("max_steps", max_steps, least=0)
        check_count("cache_bytes", cache_bytes, least=0)
        if not max_wait >= 0:
            raise ValueError(f"max_wait must be at least 0 seconds, got {max_wait}")
        self._codec = HFCodec(tokenizer)
        self.codec: TextCodec | None = self._codec
        self.model = (model if device is None else model.to(device)).eval()
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        self._eos = frozenset([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
        self._store = KVStore(0 if deterministic else cache_bytes)
        self._thinks = can_think(model)
        runner: Runner = (
            ThinkingRunner(self.model, self._writing, self._codec.size) if self._thinks
            else DecoderRunner(self.model, self._writing, self._store, self._codec.size)
        )  # fmt: skip
        self._runner, self._batching = runner, (1, 0.0, 0) if deterministic else (max_batch, max_wait, max_steps)
        self._worker = self._new_worker()
        config = self.model.config.get_text_config()
        self._vocabulary = embedding_table(self.model).shape[0]
        self._context = getattr(config, "max_position_embeddings", None)
        if self._thinks and self._context is not None:
            self._context -= self.model.config.thought_tokens + 2

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name, dtype, and hashes of configuration, weights and tokenizer; the weights are read once."""
        config = json.loads(self.model.config.to_json_string())
        config.pop("transformers_version", None)  # says who wrote it, not what the model is
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(bits(tensor))
        return {
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype),
            "weights": digest.hexdigest(),
            "tokenizer": self._codec.fingerprint,
        }

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Bytes of keys and values that a token takes, by a cache that the model has filled.

        None for a model whose cache is more than that, and for one that thinks, whose thoughts take some too.
        """
        return self._runner.token_bytes if isinstance(self._runner, DecoderRunner) else None

    @property
    def kept_bytes(self) -> int:
        """Bytes of keys and values kept between requests now."""
        return self._store.size

    async def open(self) -> None:
        """Starts the thread, a new one if it was closed."""
        if self._worker.started and not self._worker.is_alive():
            self._worker = self._new_worker()
        self._start()

    async def ready(self) -> None:
        """At once."""

    async def generate(self, request: Generate) -> Generated:
        """Writes behind the prompt; RefusedError or ContextOverflowError, before anything runs, for what cannot be."""
        ids = self._ids(request.prompt)
        if request.max_tokens < 1 or not 0 <= request.seed < 2**63:
            raise RefusedError(f"max_tokens and seed must be at least 1 and in [0, 2^63), got {request}")
        try:
            check_processing(self._vocabulary, request.temperature, request.top_k, request.top_p)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        self._check(ids, request.max_tokens)
        answer: Generated = await self._ask(Job(request, ids))
        return answer

    async def score(self, request: Score) -> Scored:
        """Log-probabilities from one forward; the errors are those of `generate`."""
        ids, start = self._ids(request.prompt), request.start
        if request.prompt.ids is None:
            encoded, opened = self._codec.encode(request.prompt.text), len(ids)
            opened -= len(encoded.ids)
            inside = (i for i, (_, end) in enumerate(encoded.offsets) if end > start)
            start = opened + next(inside, len(encoded.ids))
        if not 1 <= start < len(ids):
            raise RefusedError(f"a score must start at token 1 to {len(ids) - 1} of its prompt, got {start}")
        if request.entropy and self._thinks:
            raise RefusedError("a thinking model tells no entropies")
        self._check(ids, 0)
        answer: Scored = await self._ask(Job(request, ids, start))
        return answer

    async def choose(self, request: Choose) -> Scored:
        """Log-probabilities of the options, each the sum over the tokens that differ from the prompt's."""
        prompt, chain = self._ids(request.prompt), f"{request.chain}/choose"
        if request.prompt.ids is None:
            opening = prompt[: len(prompt) - len(self._codec.encode(request.prompt.text).ids)]
            whole = [opening + self._codec.encode(request.prompt.text + option).ids for option in request.options]
        else:
            whole = [prompt + self._codec.encode(option).ids for option in request.options]
        columns = zip(*whole, strict=False)
        head = next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, whole)))
        cost = NO_USAGE
        if head > 1:  # read once, and then known to all
            cost = (await self.score(Score(chain, Prompt(whole[0][:head]), head - 1))).usage
        scored = await asyncio.gather(*(self.score(Score(chain, Prompt(ids), head)) for ids in whole))
        return Scored(tuple(sum(a.log_probs) for a in scored), sum((a.usage for a in scored), cost))

    def forget(self, chain: str) -> None:
        """Drops the keys and values of a chain."""
        self._store.forget(chain)
        self._store.forget(f"{chain}/choose")

    async def close(self) -> None:
        """Ends the thread; open requests are cancelled."""
        if self._worker.started:  # one that never was begins when the backend is opened
            self._worker.close()
            await asyncio.to_thread(self._worker.join)

    def _new_worker(self) -> Worker:
        return Worker(self._runner, turns_on(self.model.device), *self._batching)

    def _start(self) -> None:
        if not self._worker.started:
            self._worker.start()
        elif not self._worker.is_alive():
            raise GoneError("this backend is closed; open it again")

    async def _ask(self, job: Job) -> Any:
        self._start()
        self._worker.submit(job)
        return await asyncio.wrap_future(job.future)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.ids is not None:
            return prompt.ids
        ids, opening = self._codec.encode(prompt.text).ids, self._codec.opening
        return ids if ids[: len(opening)] == opening else opening + ids

    def _check(self, ids: tuple[int, ...], more: int) -> None:
        if not ids or min(ids) < 0 or max(ids) >= self._vocabulary:
            raise RefusedError(
                f"a prompt must hold at least one id, all in 0..{self._vocabulary - 1}, got {ids[:8]} ..."
            )
        if self._context is not None and len(ids) + more > self._context:
            raise ContextOverflowError(f"{len(ids)} tokens and {more} more pass the context of {self._context}")

    def _writing(self, job: Job, cached: int) -> Writing:
        return Writing(job, cached, self._codec, self._eos)
