"""`infill`: the missing tokens of a text from their exact joint law, several at a time (arXiv 2504.20456)."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyquiet.any_subset.cost import SEQUENTIAL, CostModel, Plan, by_number
from pyquiet.any_subset.drafting import ngram_drafter
from pyquiet.any_subset.engine import Engine, undisturbed
from pyquiet.any_subset.inputs import read_inputs
from pyquiet.any_subset.rounds import Round, Session
from pyquiet.checks import check_word
from pyquiet.randomness import COUPLINGS, check_processing, resolve_seed, resolve_sequence_ids

FIXED_METHODS = ("sequential", "assd", "one_call", "ngram")
METHODS = ("auto", *FIXED_METHODS)
DRAFTS = {"assd": 5, "one_call": 2, "ngram": 5}  # a round, where nothing says how many
_PLANS = [Plan("assd", k) for k in (3, 5, 8)] + [Plan("one_call", k) for k in (1, 2, 3, 4)]
# What rounds of a model have cost so far, by the sizes of batch and text, the law and the bonus.
_COSTS: WeakKeyDictionary[Any, dict[tuple[Any, ...], CostModel]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Infilling:
    """Filled texts. B sequences, N positions.

    Attributes:
        tokens: int64 [B, N].
        log_probs: float32 [B, N], each filled token's under its law given all before it, processing included; 0 at
            given tokens, at padding and at temperature 0.
        calls: of the network, by kind: "draft" (gave drafts) and "density" (gave laws), int64 [B] each. Together never
            more than the tokens to fill.
        drafter_calls: of another drafter than the network, int64 [B].
        rounds: int64 [B].
        reveal_round: int64 [B, N], the number of the round that decided each position; -1 where it was given.
        origin: int64 [B, N], how: a `pyquiet.any_subset.Origin`.
        refused: int64 [B, N], the draft that was refused there; -1 where none was.
        method, k: that were used; of "auto", the most frequent.
        accepted_by_rank, tried_by_rank: int64 [drafts], of all sequences: how often a round's draft number j was kept,
            and how often its turn came. The first draft of "assd" is exact and always kept.
        seconds: of all rounds.
    """

    tokens: Tensor
    log_probs: Tensor
    calls: dict[str, Tensor]
    drafter_calls: Tensor
    rounds: Tensor
    reveal_round: Tensor
    origin: Tensor
    refused: Tensor
    method: str
    k: int
    accepted_by_rank: Tensor
    tried_by_rank: Tensor
    seconds: float


@undisturbed
def infill(
    model: Any,
    input_ids: Tensor,
    *,
    mask: Tensor,
    method: Any = "auto",
    k: int | str = "auto",
    seed: int | None = 0,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    coupling: str = "rejection",
    bonus: bool = True,
    sequence_ids: Tensor | None = None,
    order: Tensor | None = None,
) -> Infilling:
    """Fill the masked positions of each text with a draw from the model's joint law (arXiv 2504.20456).

    Whatever the method, the tokens follow the law of the sequential sampler: position after position, each from its
    processed conditional given all that is known. The methods differ in calls of the network and in time:

    - "sequential": one token a call;
    - "assd": k drafts in one call, the first of them exact, and their verification in a second;
    - "one_call": the k drafts of the last round are verified and the next k drafted in one call;
    - "ngram": k drafts from the bigrams of the known tokens; one call verifies them;
    - a callable: the same with drafts of yours, see `pyquiet.any_subset.Context`;
    - "auto": of the first three what measured times and acceptance so far say is fastest.

    Args:
        model: transformers' XLNetLMHeadModel, in evaluation mode, or a `pyquiet.any_subset.Engine`.
        input_ids: int64 [B, N]. What stands at masked positions is ignored.
        mask: bool [B, N], True where a token is to be filled in. All of a text may be masked, or none.
        k: drafts a round; "auto" chooses by measured time where `method` is "auto", "assd" or "one_call". In "assd" it
            counts the exact first draft, and k=1 is the sequential sampler.
        seed: of all noise; None takes one number from torch's generator. What is drawn for a text depends on the seed
            and its sequence id alone, not on the batch.
        attention_mask: [B, N], 0 at padding, which is neither seen nor filled. Never inferred from ids.
        temperature, top_k, top_p, banned: processing of every conditional, as in `pyquiet.randomness.draw`; banned is
            bool [V]. No special token is banned by default.
        coupling: "rejection", or "gumbel": noise bound to the position decides each token, so that every method gives
            the same tokens, but for near ties where logits differ in their last bits (in half precision, now and then).
            What is chosen by time is always coupled so: the tokens then depend, up to these, on the seed alone.
        bonus: where all drafts are kept, draw one more token in the same round. "one_call" always does.
        sequence_ids: int64 [B], name the noise of each text; None is its number in the batch.
        order: int64 [B, N], rank to position, the known ones first; None fills from left to right.

    Raises:
        ValueError, TypeError: what is wrong with an argument, by its name and before anything is computed; or a law
            that is no law (NaN, or nothing left that is not banned).
    """
    _check_options(method, k, coupling)
    seed = resolve_seed(seed)
    engine: Engine = model
    # What is no bool is refused by its name.
    given = ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else mask
    inputs = read_inputs(engine, input_ids, given, attention_mask, order, mask_name="mask")
    by_time = k == "auto" and method in ("auto", "assd", "one_call")
    session = Session(
        engine,
        input_ids,
        inputs,
        seed=seed,
        sequences=resolve_sequence_ids(sequence_ids, len(input_ids)),
        coupling="gumbel" if by_time else coupling,
        bonus=bonus,
        options=_checked_law(engine, temperature, top_k, top_p, banned),
    )
    began = time.perf_counter()
    with torch.inference_mode():  # a tenth faster than no_grad; what is returned was made outside of it
        rounds = _by_time(session, method) if by_time else _fixed(session, method, k)
    seconds = time.perf_counter() - began
    plan = _most_used(rounds)
    tried, accepted = by_number(*(_together([getattr(done, name) for _, done in rounds]) for name in ("tried", "kept")))
    return Infilling(
        **session.results(),
        calls=session.calls,
        drafter_calls=session.drafter_calls,
        rounds=session.rounds,
        method=plan.kind,
        k=plan.k,
        accepted_by_rank=accepted,
        tried_by_rank=tried,
        seconds=seconds,
    )


Taken = list[tuple[Plan, Round]]


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def _fixed(session: Session, method: Any, k: Any) -> Taken:
    """All rounds by one method."""
    name = "drafter" if callable(method) else method
    k = DRAFTS.get(name, 5) if k == "auto" else k
    drafter = ngram_drafter(session.engine.vocab_size, session.options["banned"]) if method == "ngram" else method
    plan = SEQUENTIAL if name == "sequential" or (name == "assd" and k == 1) else Plan(name, k)
    width = min(k, int((session.total - session.known).max()))  # more drafts than tokens would be rows for nothing
    take = {
        "sequential": session.sequential,
        "assd": lambda: session.assd(width),
        "one_call": lambda: session.one_call(width),
    }.get(plan.kind, lambda: session.drafted(width, drafter))
    rounds = []
    while session.live.any():
        rounds.append((plan, session.run(take)))
    return rounds


def _by_time(session: Session, method: str) -> Taken:
    """Rounds of the kind that is expected to be fastest, as far as is known."""
    plans = [plan for plan in _PLANS if method in ("auto", plan.kind)]
    known = _COSTS.setdefault(session.engine.owner, {})
    law = tuple(session.options[name] for name in ("temperature", "top_k", "top_p"))
    rounds: Taken = []
    while session.live.any():
        sizes = int(session.live.sum()).bit_length(), session.order.shape[1].bit_length()
        if (key := (*sizes, *law, session.bonus)) not in known:
            known[key] = CostModel(session.bonus)
        costs = known[key]
        opened = bool(rounds) and rounds[-1][1].opens
        plan = rounds[-1][0] if opened else costs.choose(plans)
        began = time.perf_counter()
        done = session.run(lambda plan=plan: _take(session, plan))  # type: ignore[misc]
        seconds = time.perf_counter() - began
        decided = done.decided / done.sequences
        if rounds and not done.opens:
            costs.observe(plan, seconds, decided, done.tried, done.kept)
        else:  # it read the prompt, or drafted for the next
            costs.charge(plan, seconds, decided)
        rounds.append((plan, done))
    return rounds


def _take(session: Session, plan: Plan) -> Round:
    if plan == SEQUENTIAL:
        return session.sequential()
    return session.assd(plan.k) if plan.kind == "assd" else session.one_call(plan.k)


def _most_used(rounds: Taken) -> Plan:
    used: Counter[Plan] = Counter()
    for plan, done in rounds:
        used[plan] += done.decided
    return used.most_common(1)[0][0] if used else SEQUENTIAL


def _check_options(method: Any, k: Any, coupling: str) -> None:
    if method not in METHODS and not callable(method):
        raise ValueError(f"method must be one of {', '.join(METHODS)} or a callable drafter, got {method!r}")
    if k != "auto" and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise ValueError(f"k must be a number of drafts, 1 or more, or 'auto', got {k!r}")
    if k != "auto" and method == "auto":
        raise ValueError(f"k={k} goes with a method of its own; leave it out, or name the method: 'assd' or 'one_call'")
    check_word("coupling", coupling, COUPLINGS)


def _checked_law(
    engine: Engine, temperature: float, top_k: int | None, top_p: float | None, banned: Tensor | None
) -> dict[str, Any]:
    """The options of processing, checked before any call."""
    check_processing(engine.vocab_size, temperature, top_k, top_p, banned)
    if banned is not None:
        if bool(banned.all()):
            raise ValueError("banned bans every token of the vocabulary; leave one")
        banned = banned.to(engine.device)
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "banned": banned}
