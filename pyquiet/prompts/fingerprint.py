"""What tells whether a run that was stopped is the one that goes on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyquiet.environment import fingerprint

_NO_MATTER = {"_name_or_path", "transformers_version"}  # of a configuration: where it lay, and who wrote it


def model_digest(model: nn.Module) -> str:
    """A digest of all weights and buffers and of every configuration in the model."""
    settings = {}
    for name, module in model.named_modules():
        for kind in ("config", "generation_config"):
            found = getattr(module, kind, None)
            if found is not None and hasattr(found, "to_dict"):
                settings[f"{name}.{kind}"] = _settled(found.to_dict())
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b((fingerprint(model) + text).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: vocabulary, merges and all it does to a text, but for padding and truncation."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _settled(value: Any) -> Any:
    """A configuration without what does not matter, inner ones too."""
    if isinstance(value, dict):
        return {str(name): _settled(part) for name, part in value.items() if name not in _NO_MATTER}
    return value


def check_same(found: Mapping[str, Any], now: Mapping[str, Any], what: str, remedy: str) -> None:
    """ValueError with the names of all that differs, as JSON knows it, and the values of the first."""
    now = json.loads(json.dumps(now))
    names = [name for name in {**found, **now} if found.get(name) != now.get(name)]
    if names:
        was, becomes = (json.dumps(values.get(names[0]))[:80] for values in (found, now))
        more = f" (and another {', '.join(names[1:])})" if names[1:] else ""
        raise ValueError(f"{what} another {names[0]}: {was}, now {becomes}{more}; {remedy}")
