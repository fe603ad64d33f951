"""The harness's view of a causal or thinking model."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.checks import can_think
from pyquiet.environment import environment_record
from pyquiet.evaluation.lm_eval.requests import Wish, batches, in_order, write
from pyquiet.evaluation.prompts import check_think
from pyquiet.evaluation.scoring import Continuation, number_of, score_continuations
from pyquiet.prompts import Ranks
from pyquiet.quiet_star.thinking import Think
from pyquiet.zoo import available, load

_DEFAULT_LENGTH = 2048  # of a model that names no context


class PyquietLM(TemplateLM):
    """The model `pyquiet` of the harness, in one process or, under torchrun, in one for each share of the documents.

    Answers depend on the request and the seed alone, not on the batch, on other requests or on a cache: thoughts are
    counted by a hash of what is given. The choices of a question share the thoughts after its text, and with them the
    luck of the draw. (Sampled answers of a plain model come from torch's generator: there the batch matters.)

    Args:
        pretrained: an embedded model's name, the folder or name of a Hugging Face model, or a model; then with its
            tokenizer.
        tokenizer: None takes the model's.
        think: "always" or "never"; None thinks where the model can.
        seed: of thoughts and of sampled answers.
        thoughts_per_token: N, averaged in probability; None is the model's.
        batch_size: requests at a time.
        max_length: tokens of a text; None is what the model's context has room for, a thought included. Longer ones
            lose their beginning; `loglikelihood_rolling` reads them in windows.
        max_gen_toks: new tokens of a task that does not say how many.
        prefix_token_id: what stands before a text without a context; None is BOS, or else EOS.
        device: None is a GPU where there is one. dtype: as `from_pretrained` takes it; "auto" and None
            leave an embedded model in float32.
        max_batch_size: the harness gives it; not used, since no batch size is found by trying.

    Raises:
        ValueError: an argument is out of range, or thoughts are asked of a plain model.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        think: Think | None = None,
        seed: int = 0,
        thoughts_per_token: int | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}: none is found by trying")
        model, self.tokenizer = _load(pretrained, tokenizer, dtype)
        self.think: Think = think or ("always" if can_think(model) else "never")
        check_think(model, self.think)
        self._ranks = Ranks.current()
        self._rank, self._world_size = self._ranks.rank, self._ranks.size
        self._ranks.join()
        self.model = model.eval().to(self._ranks.device(_usable(device)))
        self._device = self.model.device
        self.seed, self.thoughts_per_token, self.batch_size = seed, thoughts_per_token, int(batch_size)
        self.max_gen_toks, self._prefix = max_gen_toks, prefix_token_id
        self.max_length = max_length or _room(self.model, self.think)
        self._arguments = {
            "pretrained": str(pretrained) if isinstance(pretrained, str | os.PathLike) else type(model).__name__,
            "think": self.think,
            "seed": seed,
            "thoughts_per_token": thoughts_per_token,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }

    # -- what the harness asks about a model

    @property
    def eot_token_id(self) -> int | None:
        """EOS, or None."""
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context; ValueError if there is nothing."""
        for token in (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has neither BOS nor EOS to put before a text: give prefix_token_id")

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches of requests by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None opens a text as the tokenizer does, unless it begins with BOS already."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the tokenizer's own words."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness puts into its results: the environment, and which weights."""
        return {"pyquiet": environment_record("lm_eval", self._arguments, {"model": self.model})}

    # -- how the harness gathers what its processes found

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one behind the other; of a scalar, as many as there are processes."""
        return torch.cat([torch.atleast_1d(one) for one in self._ranks.everyones(tensor)])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, in process `dst`; None in others."""
        objects = self._ranks.everyones(obj)
        return objects if self.rank == dst else None

    def barrier(self) -> None:
        """Returns when all processes have called it."""
        self._ranks.wait()

    # -- what the harness asks of a model

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._fitted(context, tokens, number_of(context)) for _, context, tokens in requests]
        answers = self._scored(rows, disable_tqdm)
        for (given, _, _), answer in zip(requests, answers, strict=True):
            if given is not None:
                self.cache_hook.add_partial("loglikelihood", given, answer)
        return answers

    def loglikelihood_rolling(self, requests: Iterable[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts behind the prefix token, every token once, a window at a time."""
        texts = [request.args[0] for request in requests]
        rows: list[Continuation] = []
        owner: list[int] = []
        for i, text in enumerate(texts):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for j, window in enumerate(windows):
                before, tokens = make_disjoint_window(window)
                rows.append(Continuation(before, tokens, number_of(ids, j)))
                owner.append(i)
        totals = [0.0] * len(texts)
        for i, (log_prob, _) in zip(owner, self._scored(rows, disable_tqdm), strict=True):
            totals[i] += log_prob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Iterable[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes until a stop sequence, its end of text or the number of tokens that a task allows.

        Sampling is from the whole law unless a task gives top_k or top_p. A request that stands several times among
        the requests is answered with as many draws.
        """
        args = [request.args for request in requests]
        wishes = [Wish.of(kwargs, self.max_gen_toks) for _, kwargs in args]
        prompts = [self._prompt(context, wish) for (context, _), wish in zip(args, wishes, strict=True)]
        seen: Counter[str] = Counter()
        numbers = []
        for i, arg in enumerate(args):
            numbers.append(number_of(prompts[i], seen[repr(arg)]))
            seen[repr(arg)] += 1
        order = batches(range(len(args)), self.batch_size, lambda i: len(prompts[i]), lambda i: repr(wishes[i]))
        answers: list[str] = []
        for batch in tqdm(order, "writing", disable=disable_tqdm or self.rank > 0):
            answers += write(
                self.model,
                self.tokenizer,
                [prompts[i] for i in batch],
                wishes[batch[0]],
                think=self.think,
                seed=self.seed,
                numbers=[numbers[i] for i in batch],
                thoughts_per_token=self.thoughts_per_token,
            )
        answers = in_order(order, answers)
        for arg, answer in zip(args, answers, strict=True):
            self.cache_hook.add_partial("generate_until", arg, answer)
        return answers

    def _prompt(self, context: str, wish: Wish) -> list[int]:
        """Ids of the context's end, as much as leaves room for what is to be written."""
        room = self.max_length - wish.new_tokens
        if room < 1:
            raise ValueError(
                f"{wish.new_tokens} new tokens leave no room for a prompt in max_length={self.max_length}: give a "
                "smaller max_gen_toks, in --gen_kwargs or, where the task does not say, in --model_args"
            )
        return self.tok_encode(context)[-room:]

    def _fitted(self, context: list[int], tokens: list[int], number: int) -> Continuation:
        """The continuation and as much of its context as there is room for."""
        room = self.max_length + 1 - len(tokens)
        if not tokens or room < 1:
            raise ValueError(
                f"a continuation of {len(tokens)} tokens cannot be scored: it needs at least 1, and at most "
                f"max_length={self.max_length}, which is all that the model can read"
            )
        return Continuation(context[-room:], tokens, number)

    def _scored(self, rows: list[Continuation], disable_tqdm: bool) -> list[tuple[float, bool]]:
        order = batches(rows, self.batch_size, lambda row: len(row.read))
        answers: list[tuple[float, bool]] = []
        for batch in tqdm(order, f"think={self.think}", disable=disable_tqdm or self.rank > 0):
            log_probs, likeliest = score_continuations(
                self.model,
                [rows[i] for i in batch],
                think=self.think,
                seed=self.seed,
                thoughts_per_token=self.thoughts_per_token,
            )
            answers += zip(log_probs.tolist(), likeliest.tolist(), strict=True)
        return in_order(order, answers)


def _load(
    pretrained: Any, tokenizer: PreTrainedTokenizerBase | str | None, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(pretrained, PreTrainedModel):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError("tokenizer is missing: a model that is given as an object needs its tokenizer as one")
        return pretrained, tokenizer
    if pretrained in available():
        model, words = load(pretrained)
        if dtype not in (None, "auto"):
            kind = getattr(torch, str(dtype).removeprefix("torch."), None)
            if not isinstance(kind, torch.dtype):
                raise ValueError(f"dtype must be a dtype of torch, such as float32, got {dtype!r}")
            model = model.to(kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(pretrained, **({} if dtype is None else {"dtype": dtype}))
        words = None
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return model, tokenizer
    return model, words or AutoTokenizer.from_pretrained(tokenizer or pretrained)


def _usable(device: str | None) -> str:
    """The device of that name; the CPU for a GPU that is not there, since the harness asks for one by itself."""
    if torch.cuda.is_available():
        return device or "cuda"
    if device is not None and device.startswith("cuda"):
        warnings.warn(f"device={device}: torch sees no GPU, so the CPU is used", stacklevel=3)
        return "cpu"
    return device or "cpu"


def _room(model: PreTrainedModel, think: Think) -> int:
    """Tokens of a text that the model's context has room for, with a thought after the last one."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_LENGTH
    return int(context) - (model.config.thought_tokens + 2 if think == "always" else 0)
