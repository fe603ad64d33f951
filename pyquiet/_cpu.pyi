from torch import Tensor

def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def openmp_threads() -> int: ...
def philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]: ...
def uniforms(
    out: int,
    rows: int,
    seed: int,
    purpose: int,
    sequence: tuple[int, int],
    position: tuple[int, int],
    step: tuple[int, int],
    index: tuple[int, int],
    /,
) -> None: ...
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
    threads: int,
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
    threads: int,
    /,
) -> bool: ...
