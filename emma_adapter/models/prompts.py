"""Prompts for conversations, rendered by a processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..errors import DataError


class Prompts:
    """Renders conversations as text, and makes batches of them for ``generate``.

    Args:
        processor: a model's processor, with a chat template.
        stops: texts of the tokens at which the model's ``generate`` stops; default: the tokenizer's end token.
    """

    def __init__(self, processor: Any, stops: Sequence[str] = ()) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        self._stops = tuple(stops) or tuple(filter(None, [tokenizer.eos_token]))
        # Some templates write the token that begins a text, and some leave it to the tokenizer.
        first = tokenizer("a")["input_ids"][0]
        self._start: str = tokenizer.bos_token if first == tokenizer.bos_token_id is not None else ""

    def rendered(self, messages: Sequence[Any]) -> str:
        """Render a whole conversation.

        Raises:
            DataError: if the template refuses it, as some refuse a system turn.
        """
        return self._started(self._templated(messages))

    def answered(self, messages: Sequence[Any]) -> tuple[str, str]:
        """Render a conversation that ends in an answer; return its prompt, and the whole, which begins with the prompt.

        The whole ends with a token at which ``generate`` stops. If the template, like LLaVA-1.5's, writes none, it is
        added, so that a model can learn to stop.
        """
        whole, prompt = self.rendered(messages), self.prompt(messages[:-1])
        # Some templates write a generation prompt that differs from the text before answers.
        prompt = whole[: shared_length(prompt, whole)]
        answer = whole[len(prompt) :].rstrip()
        if self._stops and not answer.endswith(self._stops):
            whole = prompt + answer + self._stop
        return prompt, whole

    @property
    def _stop(self) -> str:
        end_token = self.processor.tokenizer.eos_token
        return end_token if end_token in self._stops else self._stops[0]

    def prompt(self, messages: Sequence[Any]) -> str:
        """Render a conversation that ends where the model's answer begins."""
        return self._started(self._templated(messages, add_generation_prompt=True))

    def batch(self, conversations: Sequence[Sequence[Any]], images: Sequence[Sequence[Any]]) -> Any:
        """Return the model's inputs for the prompts of conversations, each with its images."""
        return self.processor(
            images=[list(prompt_images) for prompt_images in images],
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


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids at which a model's ``generate`` stops; none if neither it nor the tokenizer names one."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token_id for token_id in (*ids, getattr(tokenizer, "eos_token_id", None)) if token_id is not None})
