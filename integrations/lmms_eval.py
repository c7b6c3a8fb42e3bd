"""lmms-eval: ``--model emma``, any supported vision-language model, with an adapter or without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.video_utils import VideoMetadata, load_video

from emma_adapter import ConfigError, UnsupportedModelError, load_adapter
from emma_adapter.data.images import to_rgb

Conversation = list[dict[str, Any]]

DTYPES = ("auto", "float32", "float16", "bfloat16")
INSTRUCTIONS = ("prompt", "first_line")
KERNELS = ("auto", "eager", "triton")
# lmms-eval adds it to every task that names no stop string; it would cut an answer after its first paragraph.
DEFAULT_STOP = "\n\n"


class Emma(lmms):
    """A model of any supported family, with its processor's own chat template.

    Without ``adapter`` it is the base model, unpatched, run by the same code.

    Args:
        pretrained: hub id or folder of the model and its processor.
        revision: branch, tag or commit of ``pretrained``.
        adapter: folder that ``save_pretrained`` wrote, or a hub id.
        adapter_revision: branch, tag or commit of ``adapter``.
        adapter_subfolder: folder inside ``adapter``, such as ``last-checkpoint``.
        instruction: the text that the adapter reads: ``"prompt"``, the user's turn as
            :func:`~emma_adapter.load_adapter` finds it; ``"first_line"``, only the first line of that turn, as in the
            authors' evaluation.
        instruction_encoder: the current location of the adapter's instruction encoder, if it has moved since saving.
        kernel: the implementation that computes the adapter, as in :class:`~emma_adapter.EmmaConfig`.
        device: default: the GPU of this process, or the CPU.
        device_map: spreads one model over several GPUs, as in ``from_pretrained``.
        dtype: of the base model; ``"auto"`` is the checkpoint's own.
        attn_implementation: as in ``from_pretrained``.
        trust_remote_code: as in ``from_pretrained``.
        batch_size: rows per ``generate``; on the command line it is ``--batch_size``.
        max_new_tokens: used if the task sets none.
        system_prompt: a text, or a file with one.
        chat_template: a file with a Jinja template, for a processor that has none.
        num_frames: at most this many frames of a video, evenly spaced.
        processor_kwargs: JSON object of arguments for each call of the processor, such as ``{"max_patches": 6}``.

    Raises:
        ConfigError: for an argument that is unknown or has a value that is not allowed.
        UnsupportedModelError: if the processor has no chat template, or no part for videos that a task shows.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        adapter_revision: str | None = None,
        adapter_subfolder: str | None = None,
        instruction: str | None = None,
        instruction_encoder: str | None = None,
        kernel: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        num_frames: int = 32,
        processor_kwargs: str | dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = sorted(set(Emma.__init__.__kwdefaults__ or ()) | {"pretrained"})
            raise ConfigError(f"unknown model argument(s) {sorted(unknown)}; known are {known}")
        if pretrained is None:
            raise ConfigError("model argument pretrained is missing: --model_args pretrained=llava-hf/llava-1.5-7b-hf")
        texts = {"pretrained": pretrained, "revision": revision, "adapter": adapter}
        adapter_options = {
            "adapter_revision": adapter_revision,
            "adapter_subfolder": adapter_subfolder,
            "instruction": instruction,
            "instruction_encoder": instruction_encoder,
            "kernel": kernel,
        }
        _check_texts({**texts, **adapter_options, "chat_template": chat_template, "system_prompt": system_prompt})
        if adapter is None and (unused := [name for name, value in adapter_options.items() if value is not None]):
            raise ConfigError(f"model argument(s) {unused} say how to use an adapter, and none is named: add adapter=…")
        _check_choice("dtype", dtype, DTYPES)
        if instruction is not None:
            _check_choice("instruction", instruction, INSTRUCTIONS)
        if kernel is not None:
            _check_choice("kernel", kernel, KERNELS)
        _check_choice("trust_remote_code", trust_remote_code, (True, False))
        self.batch_size = _positive("batch_size", batch_size)
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self.num_frames = _positive("num_frames", num_frames)
        self.processor_kwargs = _json_object("processor_kwargs", processor_kwargs)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.first_line_only = instruction == "first_line"

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        placement = self._place(device, device_map)
        source: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        self.processor = AutoProcessor.from_pretrained(pretrained, **source)
        self._prepare_processor(pretrained, chat_template)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, **source, dtype=dtype, device_map=placement, attn_implementation=attn_implementation
        ).eval()
        # Inputs go there, and so does what lmms-eval gathers from all processes.
        self.device = self.model.device
        if adapter is not None:
            loaded = load_adapter(
                self.model,
                adapter,
                processor=self.processor,
                instruction_encoder=instruction_encoder,
                kernel=kernel,  # type: ignore[arg-type]
                revision=adapter_revision,
                subfolder=adapter_subfolder,
            )
            logger.info(f"{loaded}")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the answers in the order of the requests; rows are batched by their generation settings."""
        # Long prompts first: if memory is short, that shows at once.
        collator = Collator(
            [request.args for request in requests],
            lambda args: (-len(args[0]), args[0]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        answers: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="emma") as progress:
            for batch in collator.get_batched(n=self.batch_size):
                conversations = [
                    self._conversation(to_messages(self.task_dict[task][split][doc]))
                    for _, to_messages, _, doc, task, split in batch
                ]
                answers += self._answer(conversations, batch[0][2])
                progress.update(len(batch))
        return collator.get_original(answers)

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError(
            "--model emma writes answers and doesn't score given ones: lmms-eval asks models with a chat template for "
            "answers only. Choose a variant of the task with output_type: generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError(
            "--model emma answers one round. Choose a variant of the task with output_type: generate_until"
        )

    def _place(self, device: str | None, device_map: str | None) -> str:
        """Return the ``device_map`` for ``from_pretrained``."""
        if self.accelerator.num_processes == 1:
            return device_map or device or str(self.accelerator.device)
        if self.accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            raise ConfigError(
                "--model emma has a whole model in each process, which "
                f"{self.accelerator.distributed_type.value} doesn't; choose plain multi-GPU in `accelerate config`"
            )
        if device_map is not None:
            raise ConfigError("device_map spreads one model over all GPUs: start one process, or leave device_map out")
        return str(self.accelerator.device)

    def _prepare_processor(self, pretrained: str, chat_template: str | None) -> None:
        if chat_template is not None:
            if not Path(chat_template).is_file():
                raise ConfigError(f"model argument chat_template={chat_template!r} is no file; it names a Jinja file")
            self.processor.chat_template = Path(chat_template).read_text(encoding="utf-8")
        if getattr(self.processor, "chat_template", None) is None:
            raise UnsupportedModelError(
                f"the processor of {pretrained} ({type(self.processor).__name__}) has no chat template; "
                "write one as a Jinja file and add chat_template=FILE"
            )
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            # The attention mask hides it.
            tokenizer.pad_token = tokenizer.eos_token

    def _conversation(self, messages: Conversation) -> Conversation:
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        return ChatMessages(messages=messages).to_hf_messages()

    def _answer(self, conversations: list[Conversation], task_settings: dict[str, Any]) -> list[GenerationResult]:
        stops, settings = _generation_settings(task_settings, self.max_new_tokens)
        if self.first_line_only:
            settings["instruction"] = [_first_line(conversation) for conversation in conversations]
        inputs = self._encode(conversations).to(self.device, self.model.dtype)
        tokenizer = self.processor.tokenizer
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                **settings,
                **({"stop_strings": stops, "tokenizer": tokenizer} if stops else {}),
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = []
        for generated_ids in output[:, inputs["input_ids"].shape[1] :]:
            text = tokenizer.decode(generated_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for stop in stops:
                text = text.split(stop)[0]
            count = int((generated_ids != tokenizer.pad_token_id).sum())
            answers.append(GenerationResult(text=text.strip(), token_counts=TokenCounts(output_tokens=count)))
        return answers

    def _encode(self, conversations: list[Conversation]) -> Any:
        settings = {**self.processor_kwargs, "padding": True, "padding_side": "left"}
        parts = [part for messages in conversations for message in messages for part in message["content"]]
        if any(part["type"] == "audio" for part in parts):
            raise UnsupportedModelError("the task has audio, which vision-language models don't take; choose another")
        for part in parts:
            # Tasks open image files as stored; the processor rotates only those that it opens itself.
            if isinstance(part.get("image"), Image.Image):
                part["image"] = to_rgb(part["image"])
        videos = [part for part in parts if part["type"] == "video"]
        if videos:
            if getattr(self.processor, "video_processor", None) is None:
                raise UnsupportedModelError(
                    f"the task has videos, which {type(self.processor).__name__} doesn't take; choose another task, or "
                    "a model for videos"
                )
            settings |= {"do_sample_frames": False, "video_metadata": [self._load_video(part) for part in videos]}
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
        )

    def _load_video(self, part: dict[str, Any]) -> VideoMetadata:
        """Replace the path in ``part`` by frames ``[at most num_frames, height, width, 3]``; return their metadata."""
        start, end = part.pop("video_start", None), part.pop("video_end", None)

        def sample(metadata: VideoMetadata, **_: Any) -> Any:
            last = metadata.total_num_frames - 1
            first = 0 if start is None else min(int(start * metadata.fps), last)
            if end is not None:
                last = max(first, min(int(end * metadata.fps), last))
            return np.linspace(first, last, min(self.num_frames, last - first + 1)).round().astype(int)

        # PyAV is what lmms-eval installs.
        part["video"], metadata = load_video(part["video"], backend="pyav", sample_indices_fn=sample)
        return metadata


def _first_line(conversation: Conversation) -> str:
    """Return the first non-blank line of the last user turn; "" if there is none."""
    turn = [message for message in conversation if message["role"] == "user"][-1]
    text = "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _generation_settings(task_settings: dict[str, Any], max_new_tokens: int) -> tuple[list[str], dict[str, Any]]:
    """Return stop strings and arguments of ``generate`` for a task's ``generation_kwargs``."""
    settings = {"max_new_tokens": max_new_tokens, **task_settings}
    until = settings.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop != DEFAULT_STOP]
    temperature = settings.get("temperature")
    # A temperature alone turns sampling on, as in lmms-eval's own models; 0 is greedy whatever else is set.
    settings["do_sample"] = temperature != 0 and settings.get("do_sample", temperature is not None)
    if not settings["do_sample"]:
        # None, so that a checkpoint's generation_config doesn't set them either.
        settings |= {"temperature": None, "top_p": None, "top_k": None}
    # Tasks also hold settings for LLaVA's own code, such as image_aspect_ratio.
    known = GenerationConfig().to_dict().keys()
    if foreign := sorted(settings.keys() - known):
        logger.warning(f"generation settings {foreign} of the task are not for transformers' generate: left out")
    return stops, {name: value for name, value in settings.items() if name in known}


def _check_texts(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ConfigError(
                f"model argument {name} must be a text that is not empty; got {value!r}. lmms-eval reads digits as a "
                "number: write a folder as ./1, a revision as its full name"
            )


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"model argument {name} must be one of {list(allowed)}; got {value!r}")


def _positive(name: str, value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"model argument {name} must be an integer >= 1; got {value!r}")
    return number


def _json_object(name: str, value: str | dict[str, Any] | None) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value or {}
    except ValueError as error:
        raise ConfigError(f"model argument {name} must be a JSON object; got {value!r}: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"model argument {name} must be a JSON object; got {value!r}")
    return parsed
