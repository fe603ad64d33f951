"""What a command says where it cannot do what it was asked."""


def error_line(capsys) -> str:
    """The last line on standard error, which is pyquiet's own and no traceback; standard output has none."""
    captured = capsys.readouterr()
    last = captured.err.strip().split("\n")[-1]
    assert last.startswith("pyquiet: error: ")
    assert captured.out == ""
    return last
