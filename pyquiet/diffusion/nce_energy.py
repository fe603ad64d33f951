"""`NCEEnergy`: a trained energy, the denoiser's own trunk that sees the noisy and the complete text at once.

Letters: B texts, k candidates of each, R = B k rows, T positions, e embedding and d hidden width.
"""

import copy
import inspect
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from pyquiet.checks import check_word
from pyquiet.diffusion.energy import Energy, check_candidates, check_mask_id
from pyquiet.diffusion.modeling import MaskedDenoiser, as_denoiser, longest_text
from pyquiet.diffusion.padding import leftward, where_real
from pyquiet.heads import embedding_table

Pool = Literal["sum_masked", "mean"]

_TOKENS = 1 << 15  # of texts that go through the trunk at once, unless `microbatch` says otherwise


class NCEEnergyConfig(PreTrainedConfig):
    """Configuration of `NCEEnergy`.

    Args:
        base_config: the trunk's configuration, or the dict of it.
        pool: "sum_masked" or "mean"; see `NCEEnergy`.
        mask_token_id: the denoiser's.

    Raises:
        ValueError: the pool is unknown.
    """

    model_type = "pyquiet_energy"
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        pool: Pool = "sum_masked",
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_word("pool", pool, Pool)
        base = AutoConfig.for_model(**base_config) if isinstance(base_config, dict) else base_config
        self.base_config: PreTrainedConfig | None = base
        self.pool = pool
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)


class NCEEnergy(PreTrainedModel, Energy):
    """A bidirectional encoder as an energy, trained to tell texts from the denoiser's completions (arXiv 2410.21357).

    It reads, at each position, a linear map of the embeddings of the noisy and of the complete text, which starts as
    their mean. An MLP d -> d -> 1 behind the trunk starts at zero, so a fresh energy is 0 and mu is left as it is.
    With pool "sum_masked" the energy is the sum of what the MLP makes of each masked position, and so grows with their
    number, as a ratio of laws of as many tokens does; "mean" makes it of the mean of all positions, as in the paper.
    The MLP's other layer starts as the identity, so nothing in a fresh energy is random.

    Build one with `from_denoiser`; save and load it as any transformers model. Time is not an input. `microbatch`, an
    attribute, is the number of texts that go through the trunk at once; None takes as many as have 2^15 tokens.
    """

    config: NCEEnergyConfig
    config_class = NCEEnergyConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"head"}  # its numbers are summed over the text

    time_free = True

    def __init__(self, config: NCEEnergyConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.base_config is None or config.mask_token_id is None:
            raise ValueError("config needs base_config and mask_token_id; NCEEnergy.from_denoiser fills them in")
        if trunk is None:
            trunk = _new_trunk(config.base_config)
        else:
            for module in trunk.modules():
                module._is_hf_initialized = True  # so that post_init leaves its weights alone
        self.trunk = trunk
        self.mask_id = config.mask_token_id
        self.microbatch: int | None = None
        table = trunk.get_input_embeddings().weight
        e, d, dtype = table.shape[1], trunk.config.hidden_size, torch.promote_types(table.dtype, torch.float32)
        self.projection = nn.Linear(2 * e, e, bias=False, dtype=table.dtype, device=table.device)
        self.head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 1, bias=False)).to(table.device, dtype)
        self.post_init()

    @classmethod
    def from_denoiser(cls, denoiser: MaskedDenoiser | PreTrainedModel, pool: Pool = "sum_masked") -> "NCEEnergy":
        """An energy of 0, whose trunk is a copy of the denoiser's.

        Raises:
            TypeError: the denoiser is neither a `MaskedDenoiser` nor a masked language model.
            NotImplementedError: its trunk does not read embeddings the way it reads ids.
            ValueError: the pool is unknown.
        """
        found = as_denoiser(denoiser)
        if not isinstance(found, MaskedDenoiser):
            raise TypeError(f"denoiser must be a MaskedDenoiser or a masked LM, got {type(denoiser).__name__}")
        trunk = copy.deepcopy(found.model.base_model)
        _check_reads_embeddings(trunk, found.mask_id)
        config = NCEEnergyConfig(copy.deepcopy(trunk.config), pool=pool, mask_token_id=found.mask_id, dtype=trunk.dtype)
        energy = cls(config, trunk)
        energy.train(found.training)
        return energy

    def check(self, input_ids: Tensor, masked: Tensor, attention_mask: Tensor | None = None) -> None:
        check_mask_id(self.mask_id, input_ids, masked)
        known = len(embedding_table(self.trunk))
        given = input_ids[where_real(input_ids, attention_mask) & ~masked]
        if len(given) and int(given.max()) >= known:
            raise ValueError(f"energy: a text holds the id {int(given.max())}, but its trunk knows {known}")
        most = longest_text(self.trunk)
        if most is not None and input_ids.shape[1] > most:
            raise ValueError(
                f"energy: texts of {input_ids.shape[1]} columns are longer than the {most} that its trunk was made for"
            )

    def forward(
        self,
        candidates: Tensor,
        input_ids: Tensor,
        time: Tensor | None = None,
        log_mu: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Energy.__call__`, and differentiable; `time` and `log_mu` are not read."""
        real = check_candidates(candidates, input_ids, attention_mask)
        B, k, T = candidates.shape
        # Padding to the right, so that positions are counted from a text's first token in every architecture.
        places = leftward(real)
        complete = candidates.masked_fill(~real[:, None], 0).gather(2, places[:, None].expand_as(candidates))
        noisy = self.trunk.get_input_embeddings()(input_ids.masked_fill(~real, 0).gather(1, places))
        masked = (real & (input_ids == self.mask_id)).gather(1, places)
        real = real.gather(1, places)
        limit = self.microbatch or max(1, _TOKENS // max(1, T))
        parts = []
        for rows in torch.arange(B * k, device=candidates.device).split(limit):
            texts = rows // max(1, k)
            some = None if attention_mask is None else real[texts].long()
            hidden = self._hidden(complete.flatten(0, 1)[rows], noisy[texts], some)
            parts.append(self._pooled(hidden, masked[texts], real[texts]))
        return torch.cat(parts).view(B, k)

    def _hidden(self, complete: Tensor, noisy: Tensor, attention_mask: Tensor | None) -> Tensor:
        both = torch.cat([noisy, self.trunk.get_input_embeddings()(complete)], -1)
        out = self.trunk(inputs_embeds=self.projection(both), attention_mask=attention_mask)
        return cast(Tensor, out.last_hidden_state)

    def _pooled(self, hidden: Tensor, masked: Tensor, real: Tensor) -> Tensor:
        """Energies [R] of hidden states [R, T, d]."""
        dtype = cast(nn.Linear, self.head[-1]).weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(dtype)
            if self.config.pool == "mean":
                mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
                energies = self.head(mean)[:, 0]
            else:
                each = hidden.new_zeros(masked.shape)
                each[masked] = self.head(hidden[masked])[:, 0]
                energies = each.sum(1)
        return cast(Tensor, energies.to(torch.promote_types(energies.dtype, torch.float32)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.projection:  # the trunk starts from the mean of two texts, so from what it knows
            half = torch.eye(len(self.projection.weight)) / 2
            self.projection.weight.copy_(torch.cat([half, half], 1))
        elif module is self.head[0]:
            nn.init.eye_(cast(nn.Linear, module).weight)
            nn.init.zeros_(cast(nn.Linear, module).bias)
        elif module is self.head[-1]:
            nn.init.zeros_(cast(nn.Linear, module).weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.trunk.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.set_input_embeddings(value)


def _new_trunk(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a configuration, with random weights and without the pooler, which masked LMs have none of."""
    network = MODEL_MAPPING[type(config)]
    pooler = "add_pooling_layer" in inspect.signature(network.__init__).parameters
    return cast(PreTrainedModel, AutoModel.from_config(config, **({"add_pooling_layer": False} if pooler else {})))


@torch.no_grad()
def _check_reads_embeddings(trunk: PreTrainedModel, mask_id: int) -> None:
    """Raises NotImplementedError unless a text's own embeddings give the trunk what its ids give."""
    mode = trunk.training
    trunk.eval()
    special = {mask_id, trunk.config.pad_token_id}
    ids = torch.tensor([[i for i in range(6) if i not in special][:4]], device=trunk.device)
    try:
        embedded = trunk(inputs_embeds=trunk.get_input_embeddings()(ids)).last_hidden_state
        error = (embedded - trunk(input_ids=ids).last_hidden_state).float().abs().max()
    except Exception as problem:
        raise NotImplementedError(f"{type(trunk).__name__} cannot be an energy's trunk: {problem}") from problem
    finally:
        trunk.train(mode)
    if error > 0.01:
        raise NotImplementedError(
            f"{type(trunk).__name__} cannot be an energy's trunk: what it makes of embeddings is not what it makes of "
            "their ids"
        )


AutoConfig.register("pyquiet_energy", NCEEnergyConfig, exist_ok=True)
AutoModel.register(NCEEnergyConfig, NCEEnergy, exist_ok=True)
