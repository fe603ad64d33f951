"""One way to register a kernel with torch.library, so that torch.compile and torch.export pass through it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

_LIBRARY = torch.library.Library("pyquiet", "DEF")


def register_op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the op `torch.ops.pyquiet.<name>`.

    The schema comes from its annotations; the function must be pure: new tensors out, nothing changed. `fake` takes the
    same arguments and returns outputs of the same shapes, strides and dtypes without computing them.
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        name = forward.__name__.lstrip("_")
        _LIBRARY.define(name + torch.library.infer_schema(forward, mutates_args=()))
        _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyquiet::{name}", fake, lib=_LIBRARY)
        return forward

    return register


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def is_plain(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """True if eager code may skip the dispatcher: no compiler is tracing and no argument is a tensor subclass."""
    return not is_compiling() and _PLAIN.issuperset(map(type, tensors))
