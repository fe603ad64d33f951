"""Books as 27 symbols, the letters and the space: windows of them to train on, and a tokenizer that spells them."""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_causal"))
from corpus import read_books

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
MASK, BOS = len(SYMBOLS), len(SYMBOLS) + 1  # known to the denoiser; to the left-to-right model too
T, STRIDE = 64, 32  # of the windows
TRAINED = 0.8  # of each book; what follows is held out


def spelled(text: str) -> str:
    """Without accents and capitals; all that is no letter is one space."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z]+", " ", plain).strip() + " "


def read(folder: Path) -> tuple[str, str]:
    """The beginnings of all books, and their ends, which are held out."""
    beginnings, ends = [], []
    for book in read_books(folder):
        text = spelled(" ".join(paragraph for section in book.train + book.held_out for paragraph in section))
        cut = int(TRAINED * len(text))
        beginnings.append(text[:cut])
        ends.append(text[cut:])
    return "".join(beginnings), "".join(ends)


def windows(text: str) -> Tensor:
    """Pieces of T symbols, one every STRIDE: int64 [W, T]."""
    ids = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()
    return ids.sub(ord("a") - 1).clamp(min=0).unfold(0, T, STRIDE)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each symbol, the mask and BOS, which opens what the left-to-right model reads."""
    names = [*SYMBOLS, "[MASK]", "[BOS]"]
    spelling = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}))
    spelling.pre_tokenizer = Split(Regex("."), "isolated")
    spelling.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=spelling, mask_token="[MASK]", bos_token="[BOS]")
