"""How thoughts enter any decoder: the layout of a forward's rows, the cache and the registered attention function.

A forward's rows are first text, then thought paths, path by path. Text rows go through the base's own attention
function and mask; path rows through the thought attention kernel. No model code is touched: the base's configuration
names our function while a `thinking` context is open, and the layout travels to it as a keyword argument, which, other
than a context variable, is there again when activation checkpointing recomputes a layer in the backward pass.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyquiet.heads import cache_argument
from pyquiet.kernels import thought_attention
from pyquiet.quiet_star.support import check_layer

ATTENTION_NAME = "pyquiet_thoughts"
_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")  # transformers' layers, torch's wrappers


class ThoughtLayer(CacheLayerMixin):
    """One layer's keys and values: those of the text, kept, and those of the open paths, dropped after each thought."""

    is_sliding = False  # windows are the mask's and the kernel's business; all text keys are kept

    def __init__(self) -> None:
        super().__init__()
        self.text_length = 0
        self.layout: ThoughtLayout | None = None
        self.path_keys: Tensor | None = None  # [B, G, paths, steps, D]
        self.path_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the rows of a forward, [B, G, rows, D], and returns the keys and values of the text, [B, G, S, D]."""
        assert self.layout is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = self.layout.text_rows
        if n:
            self._reserve(n)
            self.keys[:, :, self.text_length : self.text_length + n] = key_states[:, :, :n]
            self.values[:, :, self.text_length : self.text_length + n] = value_states[:, :, :n]
            self.text_length += n
        if self.layout.paths:
            self.path_keys = self._store_path(self.path_keys, key_states[:, :, n:])
            self.path_values = self._store_path(self.path_values, value_states[:, :, n:])
        return self.keys[:, :, : self.text_length], self.values[:, :, : self.text_length]

    def _reserve(self, n: int) -> None:
        capacity, needed = self.keys.shape[2], self.text_length + n
        if needed > capacity:
            grow = max(needed, 2 * capacity) - capacity
            self.keys = functional.pad(self.keys, (0, 0, 0, grow))
            self.values = functional.pad(self.values, (0, 0, 0, grow))

    def _store_path(self, store: Tensor | None, rows: Tensor) -> Tensor:
        layout = self.layout
        assert layout is not None
        B, G, _, D = rows.shape
        rows = rows.unflatten(2, (layout.paths, 1, layout.steps))  # [B, G, paths, 1, steps, D]
        if store is None:
            store = rows.new_empty((B, G, layout.paths * layout.copies, layout.path_length, D))
        view = store.view(B, G, layout.paths, layout.copies, layout.path_length, D)
        view[..., layout.first_step : layout.first_step + layout.steps, :] = rows
        return store

    def open_paths(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, paths, steps so far, D] of the paths whose rows are in this forward."""
        layout = self.layout
        assert layout is not None
        if self.path_keys is None or self.path_values is None:
            raise NotImplementedError("a layer attends without storing keys of its own (shared K/V layers)")
        end = layout.first_step + layout.steps
        return self.path_keys[:, :, :: layout.copies, :end], self.path_values[:, :, :: layout.copies, :end]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        rows = self.layout.text_rows if self.layout is not None else 0
        return self.text_length + rows, 0

    def get_seq_length(self, *args: Any) -> int:
        return self.text_length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class ThoughtCache(Cache):
    """Keys and values of text and open paths for every layer, [B, G, text, D] and [B, G, paths, steps, D]."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[ThoughtLayer() for _ in range(layers)])

    def expect(self, layout: "ThoughtLayout") -> None:
        """Tells every layer what the rows of the next forward are."""
        for layer in self.layers:
            layer.layout = layout

    def drop_paths(self) -> None:
        """Forgets the paths; the text stays."""
        for layer in self.layers:
            layer.path_keys = layer.path_values = None


@dataclass
class ThoughtLayout:
    """What the rows of one forward are: `text_rows` of text, then `steps` rows of each of `paths` paths.

    Without a cache the forward is packed: its rows are the whole text and whole paths, and gradients flow.
    """

    cache: ThoughtCache | None
    text_rows: int
    paths: int = 0
    steps: int = 0
    first_step: int = 0  # place on the path of the first of the steps
    path_length: int = 0  # steps of a whole path, END included
    copies: int = 1  # paths that share these rows (START, before the thoughts of a position part)
    text_limits: Tensor | None = None  # int64 [B, paths]
    text_start: Tensor | None = None  # int64 [B], the left padding
    base_attention: str = field(default="", init=False)  # the base's own attention function
    layers_seen: list[Any] = field(default_factory=list, init=False)  # their numbers


_layout: ContextVar[ThoughtLayout | None] = ContextVar("pyquiet_layout", default=None)
# Configurations are changed while a forward thinks, and bases may share them: one thread at a time.
_turn = threading.RLock()


@contextmanager
def thinking(base: PreTrainedModel, *, packed: bool = False) -> Iterator[None]:
    """Lends the base our attention function; on leaving, it is as it was.

    Activation checkpointing would take the cache away, so it is off meanwhile. A packed forward has none: there it
    stays on, and its function lends ours again when the backward pass, long after, runs a layer once more.
    """
    # This runs at every forward: one walk, and no lookup that nn.Module answers slowly for what is not there.
    attributes = [(module, vars(module)) for module in base.modules()]
    configs = list({id(own["config"]): own["config"] for _, own in attributes if "config" in own}.values())
    switches = _CHECKPOINT_FUNCTIONS if packed else ("gradient_checkpointing",)
    before = [(module, name, own[name]) for module, own in attributes for name in switches if own.get(name)]
    try:
        for module, name, value in before:
            setattr(module, name, _lending(value, configs) if packed else False)
        with _lent(configs):
            yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _lent(configs: list[Any]) -> Iterator[None]:
    with _turn:
        names = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = ATTENTION_NAME
            yield
        finally:
            for config, name in zip(configs, names, strict=True):
                config._attn_implementation = name


def _lending(checkpoint: Callable[..., Any], configs: list[Any]) -> Callable[..., Any]:
    """The checkpoint function, for layers that need our attention whenever they run."""

    def run(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def lent(*inputs: Any, **named: Any) -> Any:
            with _lent(configs):
                return layer(*inputs, **named)

        return checkpoint(lent, *args, **kwargs)

    return run


def run_rows(
    base: PreTrainedModel,
    embeds: Tensor,
    position_ids: Tensor,
    mask: Tensor | None,
    layout: ThoughtLayout,
) -> Tensor:
    """Final-norm hidden states [B, rows, d] of the rows `embeds` [B, rows, d].

    position_ids is int64 [B, rows]; mask, bool or int [B, S], is the padding mask of the text including its new rows.

    Raises:
        NotImplementedError: some attention layer of the base did not follow the attention interface.
    """
    packed = layout.cache is None
    if layout.cache is not None:
        layout.cache.expect(layout)
    elif mask is None:  # without one, transformers would look for texts packed one after another
        mask = position_ids.new_ones(len(position_ids), layout.text_rows)
    config = base.config.get_text_config()
    token = _layout.set(layout)
    try:
        with _turn:
            layout.base_attention = config._attn_implementation
            with thinking(base, packed=packed):
                output = base.base_model(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    position_ids=position_ids,
                    use_cache=not packed,
                    thought_layout=layout,
                    **{cache_argument(base.base_model.__class__): layout.cache},
                )
    finally:
        _layout.reset(token)
    seen, layers = layout.layers_seen, config.num_hidden_layers
    if not len(seen) == len(set(seen)) == layers:
        raise NotImplementedError(
            f"{type(base).__name__} cannot think: {len(set(seen))} of its {layers} layers passed the thoughts' layout "
            f"through the transformers attention interface, {len(seen)} times in all, so its output would be wrong"
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: query [B, H, rows, D], key and value [B, G, S, D] of the text.

    In a packed forward they are [B, G, rows, D], those of the paths after those of the text.
    """
    layout: ThoughtLayout | None = kwargs.pop("thought_layout", None)
    if layout is None:
        _refuse_other_threads()
        raise NotImplementedError(
            f"thoughts cannot pass {type(module).__name__}: no keyword arguments of the model are handed on to it"
        )
    own_mask = attention_mask if layout.text_rows == 0 else None
    check_layer(module, query, value, own_mask, kwargs)
    layout.layers_seen.append(module.layer_idx)
    n = layout.text_rows
    query, path_query = _split_rows(query, n)
    own: tuple[Tensor, Tensor] | None = None
    if layout.cache is None:
        key, path_key = _split_rows(key, n)
        value, path_value = _split_rows(value, n)
        sizes = (layout.paths, layout.steps)
        own = path_key.unflatten(2, sizes), path_value.unflatten(2, sizes)
    elif layout.paths:
        own = layout.cache.layers[module.layer_idx].open_paths()
    parts = []
    if n:
        if (position_ids := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = position_ids[..., :n]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(layout.base_attention, _eager(module))
        parts.append(attend(module, query, key, value, attention_mask, **kwargs)[0])
    if own is not None:
        parts.append(_attend_paths((path_query, key, value, *own), layout, kwargs))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


def _split_rows(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rows [B, heads, rows, D] of text and of paths; unlike two slices, their gradients are put together once."""
    text, paths = rows.split([n, rows.shape[2] - n], 2)
    return text, paths


def _attend_paths(tensors: tuple[Tensor, ...], layout: ThoughtLayout, kwargs: dict[str, Any]) -> Tensor:
    assert layout.text_limits is not None
    query, *others = tensors
    D, device = query.shape[-1], query.device.type
    # Under autocast a model's queries, keys and values may come in different types.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    scale = kwargs.get("scaling")
    inputs = [x.to(dtype) for x in (query.unflatten(2, (layout.paths, layout.steps)), *others)]
    if D % 8:  # the kernel wants head sizes that are multiples of 8
        inputs = [functional.pad(x, (0, -D % 8)) for x in inputs]
    out = thought_attention(
        *inputs,
        text_limits=layout.text_limits,
        text_start=layout.text_start,
        scale=D**-0.5 if scale is None else scale,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    assert isinstance(out, Tensor)
    return out[..., :D].flatten(2, 3).transpose(1, 2)


def _refuse_other_threads() -> ThoughtLayout:
    """This thread's layout; RuntimeError in one that does not think, but calls a base with which another does."""
    layout = _layout.get()
    if layout is None:
        raise RuntimeError("another thread thinks with this model: call the base in one thread at a time")
    return layout


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The registered mask function: the base's own mask, for the text rows alone."""
    layout = _refuse_other_threads()
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(layout.base_attention)
    if layout.text_rows == 0 or make is None:
        return None
    sizes = {"q_length": layout.text_rows}
    if layout.cache is None:
        sizes["kv_length"] = layout.text_rows
    return make(*args, **{**kwargs, **sizes})


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)
