"""PEFT adapters on a thinking model's base: taken over, recorded when it is saved, laid out again when it is loaded.

Adapter layers are the base's own modules, so that weights of base, adapters, START, END and head are in one state dict.
What a configuration has to tell beside the base's is where which layers lie: that is the record.
"""

import json
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from pyquiet.quiet_star.modeling import QuietStarForCausalLM

Record = dict[str, Any]


class AdaptedBase:
    """A thinking model's saving and loading where its base has adapters."""

    def save_pretrained(self: "QuietStarForCausalLM", *args: Any, **options: Any) -> None:  # type: ignore[misc]
        """Saves as any transformers model; adapters on the base go into the same files.

        Raises:
            ValueError: the base's adapters are merged, or of a kind that could not be loaded again.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                "this model lies inside a PeftModel: save that, or take it out with merge_and_unload first"
            )
        before, record = self.config.base_adapters, record_adapters(self.base)
        if before != record:
            settle_adapters(self.base, record)
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.config.base_adapters = record
        super().save_pretrained(*args, **options)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Loads as any transformers model; with adapters on the base, what was frozen is frozen again."""
        loaded = super().from_pretrained(*args, **options)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if (record := model.config.base_adapters) is not None:
            for name, parameter in model.base.named_parameters():
                parameter.requires_grad_(_any_layer(name) in record["trainable"])
        return loaded

    def add_adapter(self, *args: Any, **options: Any) -> None:
        """Refused: adapters belong on the base, beside START, END and the mixing head, which stay trainable there."""
        raise ValueError("adapters go on the base of a thinking model: model.base.add_adapter(...)")

    def load_adapter(self, *args: Any, **options: Any) -> None:
        """Refused, as `add_adapter`."""
        raise ValueError("adapters go on the base of a thinking model: model.base.load_adapter(...)")


def unwrapped(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, adapter layers in place; anything else as it is.

    Raises:
        ValueError: the PEFT method changes more than layers of the model, as prompt learning does; it is named.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    for config in model.peft_config.values():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"model: the PEFT method {_method(config)} puts vectors before the text instead of adapting layers, "
                "and thoughts would not see them; use LoRA or another method that adapts layers"
            )
    return model.get_base_model()


def record_adapters(base: PreTrainedModel) -> Record | None:
    """What a configuration tells of adapters, as JSON: their configurations, which are active, what trains, dtypes.

    Raises:
        ValueError: the adapters are merged, or a base with adapters laid out anew would not have the same parameters.
    """
    configs = getattr(base, "peft_config", None)
    if not configs:
        return None
    from peft import get_model_status

    status = get_model_status(base)
    if status.merged_adapters:
        raise ValueError("base: its adapters are merged into its weights and would count twice; unmerge them first")
    if "irregular" in (status.active_adapters, status.enabled):
        raise ValueError("base: its layers differ in which adapters are active; call base.set_adapter for all of them")
    parameters = {_clean(name): parameter for name, parameter in base.named_parameters()}
    names: dict[Tensor, list[str]] = {}  # of each parameter: the first, and those tied to it
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(_clean(name))
    float32 = {_any_layer(n) for n, p in parameters.items() if base.dtype.itemsize < 4 and p.dtype == torch.float32}
    record: Record = {
        "configs": {name: _fields(config) for name, config in configs.items()},
        "active": status.active_adapters,
        "enabled": status.enabled,
        "trainable": sorted({_any_layer(name) for name, p in parameters.items() if p.requires_grad}),
        "float32": sorted(float32),
        "tied": {target: source for source, *targets in names.values() for target in targets},
    }
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(base.config)
            buffers = dict(empty.named_buffers()).keys()
            lay_out_adapters(empty, record)
        # What is neither in the checkpoint nor made by the base would hold anything after loading.
        lost = dict(empty.named_buffers()).keys() - buffers - empty.state_dict().keys()
        lost |= parameters.keys() ^ dict(empty.named_parameters()).keys()
        reason: Any = f"their configuration does not give back {min(lost)}" if lost else None
    except ValueError as error:
        reason = error
    if reason is not None:
        kinds = ", ".join(sorted({_method(config) for config in configs.values()}))
        raise ValueError(f"base: adapters of type {kinds} could not be loaded again: {reason}")
    return record


def lay_out_adapters(base: PreTrainedModel, record: Record) -> None:
    """Puts the layers of recorded adapters, still without their weights, into a base.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import PeftConfig, inject_adapter_in_model
        from peft.functional import set_adapter
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper
    except ImportError as error:
        names = ", ".join(record["configs"])
        raise ImportError(
            f'the base of this model has PEFT adapters ({names}): pip install "pyquiet[train]"'
        ) from error
    with warnings.catch_warnings(action="ignore"):  # PEFT has said them when the adapters were made
        for name, fields in record["configs"].items():
            inject_adapter_in_model(PeftConfig.from_peft_type(**fields), base, name)
    set_adapter(base, record["active"])
    for module in base.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(record["enabled"])
    for name, parameter in base.named_parameters():
        if _any_layer(name) in record["float32"]:
            parameter.data = parameter.data.to(torch.float32)


def settle_adapters(base: PreTrainedModel, record: Record | None) -> None:
    """Tells transformers whether a base has adapters, and how tied weights are called: adapter layers rename them."""
    base._hf_peft_config_loaded = record is not None  # base.set_adapter, base.disable_adapters etc. work
    if record is None:
        vars(base).pop("_tied_weights_keys", None)  # the class's own again
    else:
        base._tied_weights_keys = record["tied"]
    base.all_tied_weights_keys = base.get_expanded_tied_weights_keys()


def _fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    if "init_lora_weights" in fields:
        fields["init_lora_weights"] = True  # the others compute from base weights, and change them
    return fields


def _method(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _clean(name: str) -> str:
    """A parameter's name without what FSDP puts into it."""
    return name.replace("_fsdp_wrapped_module.", "")


def _any_layer(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
