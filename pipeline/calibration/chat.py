"""Chat records through the tokenizer's own template, run in transformers' sandbox with limits."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.calibration.source import Record, TextSource
from pipeline.calibration.templates import ChatTemplate, TemplateRefusal
from pipeline.calibration.tokens import Tokenizer
from pipeline.errors import CalibrationError


def chat_template(tokenizer: Tokenizer, source: TextSource) -> ChatTemplate:
    """The chat template of a tokenizer; CalibrationError for one that has none."""
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{source.name}: is a chat, and the tokenizer of {tokenizer.model} has no chat"
            " template; calibrate on plain texts, or put the model's chat_template.jinja there"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)


def render(template: ChatTemplate, record: Record, field: str) -> str:
    """The text of a list of {role, content}, as the model was trained to see it.

    Raises CalibrationError for what is no such list, and for what the template refuses.
    """
    messages = record.value
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(f"{record.where}: {field!r} is no list of messages")
    for place, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise CalibrationError(
                    f"{record.where}: {field}[{place}] has no text under {key!r}; a message is"
                    " {role, content}"
                )
    try:
        return template.render(messages)
    except TemplateRefusal as refusal:
        raise CalibrationError(
            f"{record.where}: the chat template refuses it ({refusal})"
        ) from None
