"""Verification of drafts on a CUDA device: the kernel against what a user would otherwise write.

Every method is captured in a CUDA graph, so what is timed is the device, not the launches; none waits for the host.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pyquiet.kernels import verify_draft
from pyquiet.randomness import Purpose, Stream, draw, uniforms

from .cuda import Gpu, median_seconds
from .thought_attention_cases import name_of

STREAM = Stream(0)


@dataclass(frozen=True)
class Problem:
    """Rows of a draft and of a target near it, drafts drawn from theirs, and the uniforms of `STREAM`."""

    target: Tensor  # [B, k + 1, V]
    draft: Tensor  # [B, k, V]
    tokens: Tensor  # [B, k]
    lse: Tensor  # [B, k]
    log_u: Tensor  # [B, k], of the tests
    u: Tensor  # [B, k + 1], of what is drawn at each row

    @classmethod
    @functools.lru_cache(maxsize=1)
    def make(cls, B: int, k: int, V: int, dtype: torch.dtype, device: str = "cuda") -> "Problem":
        """Return the problem that all methods of a shape are given; some four in five drafts are accepted."""
        g = torch.Generator(device).manual_seed(0)
        target = 3 * torch.randn(B, k + 1, V, generator=g, device=device)
        draft = target[:, :k] + 0.3 * torch.randn(B, k, V, generator=g, device=device)
        target, draft = target.to(dtype), draft.to(dtype)
        drawn = draw(draft.view(B * k, V).float(), stream=Stream(0, Purpose.DRAFT))
        sequence, position = torch.arange(B).repeat_interleave(k + 1), torch.arange(k + 1).repeat(B)

        def of(purpose: Purpose) -> Tensor:
            return uniforms(Stream(0, purpose, sequence, position), B * (k + 1)).view(B, k + 1).to(device)

        u = torch.cat([of(Purpose.RESIDUAL)[:, :k], of(Purpose.BONUS)[:, k:]], 1)
        log_u = of(Purpose.ACCEPT)[:, :k].log()
        return cls(target, draft, drawn.tokens.view(B, k), drawn.lse.view(B, k), log_u, u)

    def to(self, device: str) -> "Problem":
        """Return a copy on a device."""
        return Problem(*(getattr(self, field.name).to(device) for field in fields(self)))

    def sequence(self, b: int) -> "Problem":
        """Return sequence b alone."""
        return Problem(*(getattr(self, field.name)[b : b + 1] for field in fields(self)))


def assemble(given: Problem, kept: Tensor, last: Tensor) -> Tensor:
    """Return tokens [B, k + 1]: `kept` [B] drafts, then `last` [B], then -1."""
    column = torch.arange(given.u.shape[1], device=kept.device)
    drafts = torch.nn.functional.pad(given.tokens, (0, 1))
    tokens = torch.where(column < kept[:, None], drafts, -1)
    return torch.where(column == kept[:, None], last[:, None], tokens)


def race(given: Problem) -> Tensor:
    """Both softmaxes, then the race of exponentials over what each row would leave: speculative decoding in vLLM."""
    q, p = given.target.softmax(-1, torch.float32), given.draft.softmax(-1, torch.float32)
    ids = given.tokens[..., None]
    accepted = given.log_u.exp() * p.gather(-1, ids)[..., 0] < q[:, :-1].gather(-1, ids)[..., 0]
    kept = accepted.long().cumprod(1).sum(1)
    q[:, :-1] = (q[:, :-1] - p).clamp_min_(0)
    noise = torch.empty_like(q[:, 0]).exponential_()
    return assemble(given, kept, (q / noise[:, None]).argmax(-1).gather(1, kept[:, None])[:, 0])


def cdf(given: Problem, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-sum-exps and gathers, then the CDF of the one row that is drawn from: as little as torch can do."""
    k, V = given.draft.shape[1:]
    q_lse, p_lse = given.target.to(dtype).logsumexp(-1), given.draft.to(dtype).logsumexp(-1)
    ids = given.tokens[..., None]
    log_q = given.target[:, :k].gather(-1, ids)[..., 0].to(dtype) - q_lse[:, :k]
    log_p = given.draft.gather(-1, ids)[..., 0].to(dtype) - p_lse
    kept = (given.log_u.to(dtype) < log_q - log_p).long().cumprod(1).sum(1)
    row, other = kept[:, None], kept.clamp_max(k - 1)[:, None]
    weights = (given.target.gather(1, row[..., None].expand(-1, -1, V))[:, 0].to(dtype) - q_lse.gather(1, row)).exp()
    taken = (given.draft.gather(1, other[..., None].expand(-1, -1, V))[:, 0].to(dtype) - p_lse.gather(1, other)).exp()
    sums = (weights - taken * (row < k)).clamp_min(0).cumsum(-1)
    limit = given.u.gather(1, row).to(dtype) * sums[:, -1:]
    return assemble(given, kept, torch.searchsorted(sums, limit, right=True)[:, 0].clamp_max(V - 1))


def ours(given: Problem, lse: Tensor | None = None) -> Tensor:
    return verify_draft(given.target, given.draft, given.tokens, stream=STREAM, draft_lse=lse).tokens


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "pyquiet": ours,
    "pyquiet draft_lse": lambda given: ours(given, given.lse),
    "race": race,
    "cdf": cdf,
    "compiled cdf": torch.compile(cdf, dynamic=False),
}
SHAPES = {
    torch.float32: [(1, 5, 32000), (1, 5, 151936), (8, 7, 50257)],
    torch.bfloat16: [(1, 5, 151936), (8, 7, 50257), (64, 8, 128256)],
}


def cases() -> list[object]:
    """Return every (shape, dtype, method), shape by shape, so that a shape's rows are timed together."""
    return [
        pytest.param(shape, dtype, method, id=f"B{shape[0]}-k{shape[1]}-V{shape[2]}-{name_of(dtype)}-{method}")
        for dtype, shapes in SHAPES.items()
        for shape in shapes
        for method in METHODS
    ]


def check(given: Problem, tokens: Tensor, method: str) -> None:
    """Raise unless it keeps what float64 keeps and, where the same uniform serves, draws the same.

    One draw in eight may differ: in a CDF of float32 sums, ids of small weight change places.
    """
    B, tokens = len(tokens), tokens.to(given.target.device)
    expected = torch.cat([cdf(given.sequence(b), torch.float64) for b in range(B)])
    assert torch.equal(tokens < 0, expected < 0), f"{method} keeps other drafts than float64"
    other = (tokens != expected).sum().item()
    assert method == "race" or other <= B / 8, f"{method} draws {other} other tokens than float64"


def least_bytes(given: Problem, method: str) -> int:
    """Return the bytes of the rows that must be read once: with the draft's log-sum-exps, its rejected ones alone."""
    (B, k, V), size = given.draft.shape, given.draft.itemsize
    return B * V * size * (k + 2 if method == "pyquiet draft_lse" else 2 * k + 1)


@pytest.mark.parametrize("method", METHODS)
def test_baselines_agree(method: str) -> None:
    """On the CPU, where there may be no device."""
    given = Problem.make(16, 3, 101, torch.float32, "cpu")
    function = cdf if method == "compiled cdf" else METHODS[method]
    tokens = function(given)
    check(given, tokens, method)
    assert (tokens[:, -1] < 0).any()
    assert (tokens[:, -1] >= 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype", "method"), cases())
def test_device(
    benchmark: BenchmarkFixture, gpu: Gpu, shape: tuple[int, int, int], dtype: torch.dtype, method: str
) -> None:
    if method.startswith("pyquiet") and importlib.util.find_spec("pyquiet._cuda") is None:
        pytest.skip("pyquiet._cuda is not built: only the reference would be timed")
    given = Problem.make(*shape, dtype)
    torch.compiler.reset()
    METHODS[method](given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = METHODS[method](given)
    graph.replay()
    check(given, tokens, method)
    seconds = median_seconds(benchmark, graph.replay)
    gbs = least_bytes(given, method) / seconds * 1e-9
    benchmark.extra_info.update(
        table=f"draft verification on {gpu.name}, {name_of(dtype)}",
        shape=f"B{shape[0]}-k{shape[1]}-V{shape[2]}",
        method=method,
        seconds=seconds,
        moved_gbs=gbs,
        of_copy=gbs / gpu.copy_gbs,
    )
