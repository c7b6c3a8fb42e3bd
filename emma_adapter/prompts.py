"""Prompts for conversations, by a processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import DataError


class Prompts:
    """Renders conversations as text, and makes batches of them, as ``generate`` meets them.

    Args:
        processor: a model's processor, with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        # Some templates write the token that begins a text, and some leave it to the tokenizer.
        first = tokenizer("a")["input_ids"][0]
        self._start: str = tokenizer.bos_token if first == tokenizer.bos_token_id is not None else ""

    def rendered(self, messages: Sequence[Any]) -> str:
        """A whole conversation.

        Raises:
            DataError: if the template refuses it, as some do a system turn.
        """
        return self._started(self._templated(messages))

    def prompt(self, messages: Sequence[Any]) -> str:
        """A conversation that ends where the model's answer begins."""
        return self._started(self._templated(messages, add_generation_prompt=True))

    def batch(self, conversations: Sequence[Sequence[Any]], images: Sequence[Sequence[Any]]) -> Any:
        """The model's inputs for some prompts, each with its images."""
        return self.processor(
            images=[list(own) for own in images],
            text=[self.prompt(messages) for messages in conversations],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )

    def _templated(self, messages: Sequence[Any], **settings: Any) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.processor.apply_chat_template(messages, tokenize=False, **settings))
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"the model's chat template refuses a conversation of {roles} ({error}): leave out the turns that it "
                "doesn't take, or set another template, processor.chat_template"
            ) from error

    def _started(self, text: str) -> str:
        return text if text.startswith(self._start) else self._start + text
