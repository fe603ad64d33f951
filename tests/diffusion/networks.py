"""Small networks and an energy for the mechanics of `diffuse`: of no known law, but real."""

import torch
from transformers import BertConfig, BertForMaskedLM

from pyquiet.diffusion import MaskedDenoiser, backbone
from pyquiet.diffusion.energy import Energy

V, MASK = 23, 7  # the mask token stands in the midst


def network(kind="modernbert", seed=0):
    """A random masked LM in evaluation mode as a denoiser; its logits have a standard deviation of about 1.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "modernbert":
            model = backbone(
                V, mask_token_id=MASK, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
            )
        else:
            config = BertConfig(
                vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
            )
            model = BertForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return MaskedDenoiser(model.eval(), MASK)


class PairEnergy(Energy):
    """Energies of neighbours, from a table; padding is skipped. Keeps what it is called with."""

    def __init__(self, scale=1.0, seed=0):
        self.table = scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
        self.calls = []

    def __call__(self, candidates, input_ids, time, log_mu, *, attention_mask=None):
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        carried = (real & (input_ids != MASK))[:, None]
        assert ((candidates == input_ids[:, None]) | ~carried).all(), "a given token was changed, or rows were mixed"
        assert (candidates != MASK)[real[:, None].expand_as(candidates)].all(), "a candidate is masked"
        self.calls.append((candidates.clone(), input_ids.clone(), time.clone(), log_mu.clone()))
        pairs = self.table[candidates[..., :-1], candidates[..., 1:]]
        return pairs.where((real[:, 1:] & real[:, :-1])[:, None], 0.0).sum(-1)

    def of(self, tokens):
        """Of whole texts [B, T]."""
        return self.table[tokens[:, :-1], tokens[:, 1:]].sum(-1)
