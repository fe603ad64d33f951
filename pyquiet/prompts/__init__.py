"""Many prompts: read from a file, answered in batches by any number of processes, written in their order."""

from pyquiet.prompts.fingerprint import model_digest, tokenizer_digest
from pyquiet.prompts.ranks import Ranks
from pyquiet.prompts.reading import Prompt, read_prompts
from pyquiet.prompts.running import answer_prompts

__all__ = ["Prompt", "Ranks", "answer_prompts", "model_digest", "read_prompts", "tokenizer_digest"]
