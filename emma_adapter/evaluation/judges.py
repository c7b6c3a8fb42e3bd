"""Judges of pictures: transformers models, loaded from a folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .loading import explained_loading
from .objects import Found
from .tasks import COLOURS

# GenEval's wordings: two with the class, one for any object.
_COLOUR_TEMPLATES = ("a photo of a {{}} {}", "a photo of a {{}}-colored {}", "a photo of a {{}} object")
_CONSISTENCY = (
    "The first pictures were to be edited as follows, and the last picture is the result. Instruction: {}\n"
    "Give two marks from 0 to 10: how fully the instruction was followed, and how well everything else was left as it "
    'was (0: a different scene). Answer with JSON alone: {{"score": [mark, mark], "reasoning": "a few words"}}'
)
_QUALITY = (
    "Give this picture two marks from 0 to 10: how natural it looks (light, perspective, proportions), and how free it "
    "is of artifacts (distortions, seams, blur, wrong limbs). Answer with JSON alone: "
    '{"score": [mark, mark], "reasoning": "a few words"}'
)


def _pipeline(task: str, source: str, device: Any) -> Any:
    from transformers import pipeline

    with explained_loading(source, task):
        return pipeline(task, model=source, device=device)  # type: ignore[call-overload]


class Detector:
    """Finds objects by the names of their classes."""

    def __init__(self, source: str, device: Any) -> None:
        self._pipeline = _pipeline("zero-shot-object-detection", source, device)

    def __call__(self, picture: Any, classes: Sequence[str], threshold: float) -> dict[str, list[Found]]:
        """Return the objects of each class above a confidence; boxes are in pixels."""
        found: dict[str, list[Found]] = {name: [] for name in classes}
        # One of the wordings that the detectors were trained with.
        labels = {f"a photo of a {name}": name for name in classes}
        for detection in self._pipeline(picture, candidate_labels=list(labels), threshold=threshold):
            box = detection["box"]
            found[labels[detection["label"]]].append(
                Found((box["xmin"], box["ymin"], box["xmax"], box["ymax"]), float(detection["score"]))
            )
        return found


class ColourClassifier:
    """Names the colours of objects, from the part of the picture in their box."""

    def __init__(self, source: str, device: Any) -> None:
        self._pipeline = _pipeline("zero-shot-image-classification", source, device)

    def __call__(self, picture: Any, name: str, found: Sequence[Found]) -> list[str]:
        """Return the colour of each object of a class: the most probable one on average over three wordings."""
        return [self._colour(picture.crop(_whole_pixels(each.box)), name) for each in found]

    def _colour(self, part: Any, name: str) -> str:
        sums = dict.fromkeys(COLOURS, 0.0)
        for template in _COLOUR_TEMPLATES:
            wording = template.format(name)
            for result in self._pipeline(part, candidate_labels=list(COLOURS), hypothesis_template=wording):
                sums[result["label"]] += result["score"]
        return max(sums, key=lambda colour: sums[colour])


def _whole_pixels(box: Sequence[float]) -> tuple[int, int, int, int]:
    """Truncate a box to whole pixels, of which at least one remains."""
    x0, y0 = int(box[0]), int(box[1])
    return x0, y0, max(int(box[2]), x0 + 1), max(int(box[3]), y0 + 1)


class VisionLanguageJudge:
    """A vision-language model that answers with yes or no, or with marks."""

    def __init__(self, source: str, device: Any, dtype: str = "auto", *, trust_remote_code: bool = False) -> None:
        from ..models.loading import load_model, load_processor
        from ..models.prompts import Prompts

        self._model = load_model(source, dtype, trust_remote_code=trust_remote_code).to(device).eval()
        processor = load_processor(source, trust_remote_code=trust_remote_code)
        self._tokenizer = processor.tokenizer
        self._prompts = Prompts(processor)
        yes, no = self._first_tokens("yes"), self._first_tokens("no")
        # Some tokenizers make the space a token of its own, which doesn't tell the answers apart.
        self._yes, self._no = yes - no, no - yes
        if not self._yes or not self._no:
            raise ConfigError(
                f"{source} can't answer yes or no, which its tokenizer begins with the same token: use another judge"
            )

    def says_yes(self, picture: Any, question: str) -> bool:
        """Return whether the answer begins with yes more probably than with no.

        The probabilities are summed over the spellings of each, in lower case or with a capital, after a space or not.
        Nothing is generated: there is always an answer, and always the same one.
        """
        import torch

        with torch.inference_mode():
            logits = self._model(**self._inputs([picture], f"{question} Answer yes or no.")).logits[0, -1].double()
        yes, no = (torch.logsumexp(logits[sorted(tokens)], 0) for tokens in (self._yes, self._no))
        return bool(yes > no)

    def consistency(self, sources: Sequence[Any], picture: Any, instruction: str) -> str:
        """Ask for marks for how well an edit follows its instruction, and return the answer."""
        return self._answer([*sources, picture], _CONSISTENCY.format(instruction))

    def quality(self, picture: Any) -> str:
        """Ask for marks for how natural a picture looks, and return the answer."""
        return self._answer([picture], _QUALITY)

    def _answer(self, pictures: Sequence[Any], text: str) -> str:
        import torch

        inputs = self._inputs(pictures, text)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=256, do_sample=False)
        return str(self._tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def _inputs(self, pictures: Sequence[Any], text: str) -> Any:
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        inputs = self._prompts.batch([[{"role": "user", "content": content}]], [pictures])
        return inputs.to(self._model.device, self._model.dtype)

    def _first_tokens(self, word: str) -> set[int]:
        spellings = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
        return {self._tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in spellings}
