"""Thinking models in lm-evaluation-harness: importing this module registers the model `pyquiet`.

    python -m pyquiet.evaluation.lm_eval --model pyquiet --model_args pretrained=DIR,think=always --tasks lambada_openai

The harness looks for models of others nowhere, so its own command `lm_eval` cannot know this one; the line above is
that command, and takes all of its options.
"""

try:
    import lm_eval.models  # noqa: F401  # first: the harness registers its own models only where there is none yet
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "lm_eval":
        raise
    raise ImportError('lm-evaluation-harness is missing: pip install "pyquiet[eval]"') from None

from pyquiet.evaluation.lm_eval.model import PyquietLM

register_model("pyquiet")(PyquietLM)

__all__ = ["PyquietLM"]
