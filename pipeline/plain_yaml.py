"""YAML that is only data: what recipes and cards are read with.

A recipe may be somebody else's, and PyYAML's safe loader is safe from code alone.  Here there are
no anchors and aliases (a few hundred bytes of them stand for gigabytes), no tags, no key twice in
one mapping, no depth without end, no control characters, no number with more digits than any has;
nothing of it is missed in a recipe.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
MAX_DIGITS = 40


class PlainYamlError(yaml.YAMLError):
    """What is wrong, in words for one line."""


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise PlainYamlError(f"line {line} has an anchor or alias; write the value out")
        if getattr(event, "tag", None) is not None:
            raise PlainYamlError(f"line {line} has a tag; plain values need none")
        if self._depth >= MAX_DEPTH:
            raise PlainYamlError(f"line {line} is nested more than {MAX_DEPTH} deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen = set()
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise PlainYamlError(f"line {line} gives {key[:60]!r} a second time")
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:  # noqa: ANN401  (as the base has it)
        value = super().construct_scalar(node)
        line = node.start_mark.line + 1
        if isinstance(value, str):
            if any((ord(c) < 32 and c not in "\n\t") or 0xD800 <= ord(c) < 0xE000 for c in value):
                raise PlainYamlError(f"line {line} has a control character in its value")
            if not node.tag.endswith(":str") and len(value) > MAX_DIGITS:
                raise PlainYamlError(f"line {line} has a number that is too long")
        return value


def parse_yaml(text: str) -> Any:  # noqa: ANN401  (any YAML)
    """The data of one document; yaml.YAMLError, of one line, for what is no plain YAML."""
    if len(text) > MAX_BYTES:
        raise PlainYamlError(f"more than {MAX_BYTES:,} characters")
    try:
        return _Loader(text).get_single_data()
    # Besides its own errors the loader raises others, for a 31st of February for one.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise PlainYamlError(" ".join(str(error).split())[:300]) from None


def read_yaml(path: Path) -> tuple[Any, str]:
    """The data of a recipe file, and its text; RecipeError for what cannot be read or parsed."""
    try:
        with path.open("rb") as stream:  # no size is asked for: a recipe may come from a pipe
            text = stream.read(MAX_BYTES + 1).decode("utf-8")
        return parse_yaml(text), text
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
