"""Prompts for conversations, by a processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..errors import DataError


class Prompts:
    """Renders conversations as text, and makes batches of them, as ``generate`` meets them.

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
        """A whole conversation.

        Raises:
            DataError: if the template refuses it, as some do a system turn.
        """
        return self._started(self._templated(messages))

    def answered(self, messages: Sequence[Any]) -> tuple[str, str]:
        """A conversation that ends in an answer, as its prompt and as a whole, of which the prompt is the beginning.

        The whole ends with a token at which ``generate`` stops. Where the template doesn't write one, as LLaVA-1.5's,
        it is added, so that a model can learn to stop.
        """
        whole, prompt = self.rendered(messages), self.prompt(messages[:-1])
        # Some templates write the generation prompt otherwise than before answers.
        prompt = whole[: shared_length(prompt, whole)]
        answer = whole[len(prompt) :].rstrip()
        if self._stops and not answer.endswith(self._stops):
            whole = prompt + answer + self._stop
        return prompt, whole

    @property
    def _stop(self) -> str:
        own = self.processor.tokenizer.eos_token
        return own if own in self._stops else self._stops[0]

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


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long the beginning is that both have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which a model's ``generate`` stops; none if neither it nor the tokenizer names one."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({number for number in (*ids, getattr(tokenizer, "eos_token_id", None)) if number is not None})
