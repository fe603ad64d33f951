from collections.abc import Sequence

from torch import Tensor

def architectures() -> list[str]: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
def gpus() -> list[tuple[str, tuple[int, int]]]: ...
def thought_attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    text_limits: Tensor,
    text_start: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
    stream: int,
    /,
) -> bool: ...
def thought_attention_backward(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    text_limits: Tensor,
    text_start: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    d_query: Tensor,
    d_text_key: Tensor,
    d_text_value: Tensor,
    d_path_key: Tensor,
    d_path_value: Tensor,
    workspace: Tensor,
    stream: int,
    /,
) -> bool: ...
def thought_attention_backward_workspace(B: int, H: int, T: int, Q: int, G: int, S: int, P: int, /) -> int: ...
def verify_draft(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_tokens: Tensor,
    draft_lse: Tensor | None,
    banned: Tensor | None,
    lengths: Tensor | None,
    stream_sequence: Tensor | None,
    stream_position: Tensor | None,
    stream_step: Tensor | None,
    stream_index: Tensor | None,
    stream_words: Sequence[int],
    seed: int,
    temperature: float,
    draft_temperature: float,
    top_k: int | None,
    top_p: float | None,
    first_is_exact: bool,
    gumbel: bool,
    deterministic: bool,
    tokens: Tensor,
    count: Tensor,
    accepted: Tensor,
    log_probs: Tensor,
    bonus: Tensor,
    fault: Tensor,
    workspace: Tensor,
    stream: int,
    /,
) -> bool: ...
def verify_draft_workspace(B: int, k: int, rows: int, V: int, /) -> int: ...
