def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def openmp_threads() -> int: ...
def philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]: ...
def uniforms(
    out: int,
    rows: int,
    seed: int,
    sequence_rows: int,
    sequence: int,
    position_rows: int,
    position: int,
    step_rows: int,
    step: int,
    purpose: int,
    index_rows: int,
    index: int,
    /,
) -> None: ...
