"""Griffe extension: how the docstrings and comments of the sources become Markdown."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Examples (`>>> ...`) are code, and a field's comment (`weight: Tensor  # [B, T, N]`) is its documentation."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            examples = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
            obj.docstring.value = examples.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno and attr.lineno == attr.endlineno:
            line = attr.lines_collection[attr.filepath][attr.lineno - 1]
            if comment := re.search(r"  # (?!type: |noqa)(.+)$", line):
                attr.docstring = griffe.Docstring(comment[1], parent=attr)
