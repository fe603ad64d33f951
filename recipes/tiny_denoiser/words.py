"""How many of the words a denoiser writes are none: its continuations of held-out passages, by temperature.

python recipes/tiny_denoiser/words.py TRAINING_JSONL DENOISER_FOLDER [--every N]

A word counts as none where it stands nowhere in the texts the models learned from. The passages themselves
and what tiny-causal writes, alone, are measured with the same ruler; the denoiser has it as its energy.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

import pyquiet
from pyquiet.datasets import read_dataset
from pyquiet.diffusion import by_confidence
from pyquiet.zoo import held_out

PROMPT_WORDS, TOKENS, STEPS, CANDIDATES = 8, 40, 40, 8
TEMPERATURES = (1.0, 0.8, 0.5, 0.3)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def share_unknown(texts: Iterable[str], known: set[str]) -> str:
    """The share of the words of `texts` that are not known, with its standard error over the texts."""
    counts = torch.tensor([(sum(word not in known for word in found), len(found)) for found in map(words, texts)])
    unknown, total = counts.double().unbind(1)
    mean = unknown.sum() / total.sum()
    error = (unknown - mean * total).std() * len(counts) ** 0.5 / total.sum()  # of a ratio of sums
    return f"{mean:.1%} +- {error:.1%} | {int(total.sum())}"


def whole_words(text: str) -> str:
    """`text` without what may be part of a word at its ends."""
    return re.sub(r"^\w+|\w+$", "", text)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("training", type=Path)
    parser.add_argument("denoiser", type=Path)
    parser.add_argument("--every", type=int, default=10, metavar="N", help="continue every N-th passage alone")
    args = parser.parse_args()
    known = {word for text in read_dataset(str(args.training), "text") for word in words(text)}
    passages = [row["text"] for row in held_out("passages")][:: args.every]
    causal, tokenizer = pyquiet.load("tiny-causal")
    prompts = [" ".join(text.split()[:PROMPT_WORDS]) for text in passages]
    ids = [torch.tensor([[tokenizer.bos_token_id, *tokenizer(p, add_special_tokens=False).input_ids]]) for p in prompts]

    print("| written by | temperature | words in no text of the training | of |\n|---|---|---|---|")
    print(f"| people: the passages themselves | | {share_unknown(passages, known)} |")
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        law = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": TOKENS}
        texts = [whole_words(tokenizer.decode(causal.generate(x, **law)[0, x.shape[1] :])) for x in ids]
        print(f"| tiny-causal | {temperature} | {share_unknown(texts, known)} |")

    tokenizer = pyquiet.load("tiny-denoiser")[1]
    denoiser = pyquiet.MaskedDenoiser(AutoModelForMaskedLM.from_pretrained(args.denoiser, dtype=torch.float32).eval())
    energy = pyquiet.AREnergy(causal, bos_id=tokenizer.bos_token_id)
    for name, order in (("tiny-denoiser", None), ("tiny-denoiser, the surest token first", by_confidence(1))):
        for temperature in TEMPERATURES:
            texts = []
            for number, prompt in enumerate(ids):
                full = torch.cat([prompt, torch.full((1, TOKENS), tokenizer.mask_token_id)], 1)
                law = {"temperature": temperature, "candidates": CANDIDATES, "seed": number, "order": order}
                out = pyquiet.diffuse(denoiser, energy, input_ids=full, steps=STEPS, **law)
                texts.append(whole_words(tokenizer.decode(out.tokens[0, prompt.shape[1] :], skip_special_tokens=True)))
            print(f"| {name} | {temperature} | {share_unknown(texts, known)} |")


if __name__ == "__main__":
    main()
