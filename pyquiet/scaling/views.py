"""How one chain's text is shown to draft and target: as shared token ids where their tokenizers agree, else as text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyquiet.scaling.backends.base import Backend, Generated, Prompt, TextCodec
from pyquiet.scaling.backends.codec import decode_after
from pyquiet.scaling.records import Question

Role = Literal["draft", "target"]
Template = str | Callable[[str], str]
_SLOT = "{question}"
_CONTEXT = 32  # characters before a text that settle how its first token is written


class Views:
    """The question and what a chain has written behind it, for each of the two models.

    Where both have tokenizers that agree on every text, the chain is one list of token ids behind each model's head
    (the question in its template), so that nothing is ever tokenised again. Where they differ, the chain is text, and
    each model's tokenizer reads head and text as a whole. A model without a tokenizer on this side gets the text.

    Args:
        draft, target: the models; only their `codec` is used.
        template: text with `{question}` in it, or a callable that makes the head's text of the question; None: the
            model's own chat template, or the bare question where it has none.
        system: system message of the chat template; where there is none it stands before the question's text.

    Raises:
        ValueError: the template lacks `{question}`, or the head is empty, so that nothing could follow it.
        TypeError: the template is neither.
    """

    def __init__(
        self,
        draft: Backend,
        target: Backend,
        question: Question,
        *,
        template: Template | None = None,
        system: str | None = None,
    ) -> None:
        codecs = {"draft": draft.codec, "target": target.codec}
        self._heads = {role: _Head.of(codec, question, template, system) for role, codec in codecs.items()}
        self._text = ""
        self._ids: tuple[int, ...] | None = None  # of what was written, where they are shared
        if draft.codec is not None and target.codec is not None:
            shared = draft.codec is target.codec or draft.codec.fingerprint == target.codec.fingerprint
            self._ids = () if shared else None

    @property
    def text(self) -> str:
        """What was written so far. Where ids are shared it is what they say, which a stop string does not cut short."""
        return self._text

    def prompt(self, role: Role) -> Prompt:
        """What this model reads before it goes on."""
        head = self._heads[role]
        if self._ids is not None:
            return Prompt(head.ids + self._ids, head.text + self._text)
        return head.prompt(self._text)[0]

    def with_chunk(self, chunk: Generated) -> tuple[Prompt, int]:
        """What the target reads to score a chunk, and where the chunk begins in it.

        Index of a token where the target has a tokenizer here: the first one that overlaps the chunk; else of a
        character.
        """
        head = self._heads["target"]
        if self._ids is None:
            return head.prompt(self._text, chunk.text)
        before = head.ids + self._ids
        return Prompt(before + self._piece(chunk), head.text + self._text + chunk.text), len(before)

    def append(self, chunk: Generated, role: Role) -> None:
        """Takes in what a model has written, or text that stands there by other means (ids None)."""
        if self._ids is None:
            self._text += chunk.text
            return
        head, ids = self._heads[role], self._piece(chunk)
        assert head.codec is not None
        self._text += decode_after(head.codec, head.ids + self._ids, ids)
        self._ids += ids

    def _piece(self, chunk: Generated) -> tuple[int, ...]:
        if chunk.ids is not None:
            return chunk.ids
        head = self._heads["target"]
        assert head.codec is not None
        return encode_after(head.codec, head.text + self._text, chunk.text)


def encode_after(codec: TextCodec, before: str, text: str) -> tuple[int, ...]:
    """Ids that spell `text` behind `before`, whose own ids stay as they are.

    The tokens of the two may not be merged, so if the tokenizer would, the text is read behind another character.
    """
    for context in (before[-_CONTEXT:], "\n", "a", "."):
        encoded = codec.encode(context + text)
        inside = [begin >= len(context) for begin, _ in encoded.offsets]
        first = inside.index(True) if True in inside else len(inside)
        if first == 0 or encoded.offsets[first - 1][1] <= len(context):
            return encoded.ids[first:]
    return codec.encode(text).ids


@dataclass(frozen=True, slots=True)
class _Head:
    """The question as one model sees it."""

    codec: TextCodec | None
    text: str
    ids: tuple[int, ...]
    opening: tuple[int, ...]  # the first of the ids, which stand for no text

    @classmethod
    def of(cls, codec: TextCodec | None, question: Question, template: Template | None, system: str | None) -> "_Head":
        text = _head_text(codec, question.text, template, system)
        opening: tuple[int, ...] = ()
        if codec is None:
            if not text:
                raise ValueError(f"question {question.id!r}: nothing stands before the answer; give it a text")
            return cls(None, text, (), ())
        ids = codec.encode(text).ids
        if not (template is None and codec.has_template) and ids[: len(codec.opening)] != codec.opening:
            opening = codec.opening  # a chat template spells it out itself if it wants one
        if not opening + ids:
            raise ValueError(f"question {question.id!r}: nothing stands before the answer; give it a text")
        return cls(codec, text, opening + ids, opening)

    def prompt(self, written: str, chunk: str = "") -> tuple[Prompt, int]:
        """The prompt of a text that is written behind, and where its last part, the chunk, begins."""
        before = len(self.text) + len(written)
        whole = self.text + written + chunk
        if self.codec is None:
            return Prompt(None, whole), before
        encoded = self.codec.encode(whole)
        start = next((i for i, (_, end) in enumerate(encoded.offsets) if end > before), len(encoded.ids))
        return Prompt(self.opening + encoded.ids, whole), len(self.opening) + start


def _head_text(codec: TextCodec | None, question: str, template: Template | None, system: str | None) -> str:
    if template is None and codec is not None and codec.has_template:
        return codec.render(question, system)
    if template is None:
        text = question
    elif isinstance(template, str):
        if _SLOT not in template:
            raise ValueError(f"template must say where the question stands: put {_SLOT} into {template!r}")
        text = template.replace(_SLOT, question)
    elif callable(template):
        text = template(question)
    else:
        raise TypeError(f"template must be a text with {_SLOT} or a callable, got {type(template).__name__}")
    return text if system is None else f"{system}\n\n{text}"
