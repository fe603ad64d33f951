"""lm-evaluation-harness's own command, which knows the model `pyquiet` when it is started from here."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
