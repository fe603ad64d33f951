"""Griffe extension: how the docstrings and comments of the sources become Markdown."""

import re
from typing import Any

import griffe

EXAMPLES = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+)((?:, \w+)+): ", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Examples (`>>> ...`) are code, and a field's comment (`weight: Tensor  # [B, T, N]`) is its documentation.

    Attributes that share a line stand under the first one's name, with all names before their text.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = EXAMPLES.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
            before, title, attributes = text.partition("Attributes:\n")
            obj.docstring.value = before + title + SEVERAL.sub(r"\1\2: \2\3: ", attributes)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno and attr.lineno == attr.endlineno:
            line = attr.lines_collection[attr.filepath][attr.lineno - 1]
            if comment := re.search(r"  # (?!type: |noqa)(.+)$", line):
                attr.docstring = griffe.Docstring(comment[1], parent=attr)
