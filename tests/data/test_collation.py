"""A collator that names the instruction, beside instructions that are read off the same batch."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from accelerate.utils.operations import concatenate, slice_tensors
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from emma_adapter import DataError, EmmaConfig, InstructionCollator, InstructionError, patch_model
from tests.support import tiny
from tests.support.budget import some
from tests.support.zoo import ZOO

PROCESSOR = tiny.processor()
TALKS = [
    [tiny.user("how many dogs are there?"), tiny.assistant("two"), tiny.user("why?", 0), tiny.assistant("USER: so")],
    [tiny.user("is there a cat in the picture?"), tiny.assistant("no")],
]


def rows(talks=TALKS):
    return [{"messages": talk, "images": [tiny.picture(number)]} for number, talk in enumerate(talks)]


class Collator:
    """As one writes it, for rows of chat messages; labels supervise the last answer."""

    def __init__(self, processor=PROCESSOR):
        self.processor = processor

    def __call__(self, batch):
        texts = [self.processor.apply_chat_template(row["messages"]) for row in batch]
        prompts = [
            self.processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True) for row in batch
        ]
        images = [picture for row in batch for picture in row["images"]]
        made = self.processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        prompts = self.processor(text=prompts, images=images, padding=True, padding_side="right", return_tensors="pt")
        made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        for labels, length in zip(made["labels"], prompts["attention_mask"].sum(1), strict=True):
            labels[:length] = -100
        return made


def patched(entry=None, processor=PROCESSOR, **changes):
    model = entry.model() if entry else tiny.llava(vocab_size=len(PROCESSOR.tokenizer), image_token=4)
    adapter = patch_model(model, EmmaConfig(**changes), processor=processor)
    tiny.train_randomly(adapter.alignment)
    return model, adapter


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("last_turn", ["why?", "is there a cat in the picture?"]),
        ("shortest_turn", ["why?", "is there a cat in the picture?"]),
        ("all_turns", ["how many dogs are there? why?", "is there a cat in the picture?"]),
    ],
)
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_text_of_the_turns_that_the_policy_names(policy, expected, column):
    _, adapter = patched(instruction_policy=policy)
    collator = InstructionCollator(lambda rows: {"input_ids": len(rows)}, adapter)
    made = collator([{column: row["messages"], "completion": [tiny.assistant("never")]} for row in rows()])
    assert made == {"input_ids": 2, "instruction": expected}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("what is it? ", "what is it?"),
        ([{"type": "image", "text": None}, {"type": "text", "text": "what?"}], "what?"),
        ([{"type": "text", "text": "is"}, *[{"type": "image"}] * 2, {"type": "text", "text": "it?"}], "is it?"),
        ([{"type": "text", "text": "is "}, {"type": "text", "text": "it?"}], "is it?"),
        ([{"type": "image"}], ""),
        (None, ""),
    ],
)  # fmt: skip
def test_words_of_a_message(content, expected):
    _, adapter = patched()
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}, tiny.assistant("a bird")]
    assert InstructionCollator(lambda _: {}, adapter)([{"messages": talk}]) == {"instruction": [expected]}


def test_instructions_are_read_before_the_collator_changes_rows():
    def collator(rows):
        for row in rows:
            row["prompt"] = "rendered"
        return {}

    _, adapter = patched()
    made = InstructionCollator(collator, adapter)([{"prompt": [tiny.user("why?")], "completion": []}])
    assert made == {"instruction": ["why?"]}


def test_instruction_of_other_columns():
    _, adapter = patched()
    collator = InstructionCollator(lambda _: {}, adapter, instruction_of=lambda row: row["question"])
    assert collator([{"question": "why?"}]) == {"instruction": ["why?"]}


@pytest.mark.parametrize("row", [{"text": "USER: why?"}, {"prompt": "USER: why?"}, {"messages": []}])
def test_rows_that_are_no_chat_are_an_error(row):
    _, adapter = patched()
    with pytest.raises(InstructionError, match=r"(?s)instruction_of=.*remove_unused_columns"):
        InstructionCollator(lambda _: {}, adapter)([row])


@pytest.mark.parametrize(
    "talk", [[tiny.user(" ")], [{"role": "user", "content": ""}], [tiny.user("why?"), tiny.user("")]]
)
@pytest.mark.parametrize("media", [{"images": [tiny.picture(0)]}, {"image": "bird.png"}])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_empty_question_about_an_image_is_an_error(talk, media, as_tokens):
    _, adapter = patched()
    row = {"messages": [*talk, tiny.assistant("a bird")], **media}
    collator = InstructionCollator(lambda _: {}, adapter, as_tokens=as_tokens)
    with pytest.raises(DataError, match=r"row 2 of a batch of 2.*empty question"):
        collator([rows()[0], row])
    with pytest.raises(DataError, match="empty question"):
        InstructionCollator(lambda _: {}, adapter, instruction_of=lambda row: "")([row])
    collator([{**row, "images": [], "image": None}])  # a row of text needs no instruction


@pytest.mark.parametrize("told", ["prompt", "text", "tokens"])
def test_training_with_an_empty_question_warns_once(told):
    model, _ = patched()
    inputs = tiny.chat_inputs([[tiny.user(""), tiny.assistant("a bird")], [tiny.user("why?", 0)]], generate=False)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    more = {
        "prompt": {},
        "text": {"instruction": [" ", ""]},
        "tokens": {"instruction": torch.tensor([[5], [5]]), "instruction_mask": torch.tensor([[0], [1]])},
    }[told]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=labels, **more)  # not training
    with pytest.warns(UserWarning, match="an empty instruction"):
        model.train()(**inputs, labels=labels, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=labels, **more)


def test_rows_without_a_user_are_an_error():
    _, adapter = patched()
    with pytest.raises(InstructionError, match="user"):
        InstructionCollator(lambda _: {}, adapter)([{"messages": [tiny.assistant("hello")]}])


def test_tokens_need_a_tokenizer():
    _, adapter = patched(processor=None)
    InstructionCollator(Collator(), adapter)
    with pytest.raises(InstructionError, match="processor="):
        InstructionCollator(Collator(), adapter, as_tokens=True)


def instructions(model, adapter, batch):
    """What the adapter is given."""
    seen = []
    handle = adapter.alignment.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:3]))
    loss = model.train()(**batch).loss
    handle.remove()
    [(tokens, mask)] = seen
    return loss, tokens, mask


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("policy", ["last_turn", "shortest_turn", "all_turns"])
def test_explicit_equals_inferred_with_a_text_tower(policy, clip_folder):
    model, adapter = patched(instruction_encoder=str(clip_folder), instruction_policy=policy)
    inferred = instructions(model, adapter, Collator()(rows()))
    adapter.clear_cache()
    assert same(instructions(model, adapter, InstructionCollator(Collator(), adapter)(rows())), inferred)
    assert adapter.cache_info().misses == 2
    assert same(
        instructions(model, adapter, InstructionCollator(Collator(), adapter, as_tokens=True)(rows())), inferred
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("policy", ["last_turn", "shortest_turn", "all_turns"])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_explicit_equals_inferred_with_the_language_models_embeddings(name, policy, as_tokens):
    """Where the template puts no space before the user's words, which would be part of the first one's token."""
    entry = ZOO[name]
    processor = entry.processor()
    model, adapter = patched(entry, processor, instruction_policy=policy)
    collator = Collator(processor)
    talks = [TALKS[1], [tiny.user("how many birds are there?"), tiny.assistant("two")]]
    inferred = instructions(model, adapter, collator(rows(talks)))
    explicit = InstructionCollator(collator, adapter, as_tokens=as_tokens)(rows(talks))
    assert isinstance(explicit["instruction"], torch.Tensor if as_tokens else list)
    assert same(instructions(model, adapter, explicit), inferred)


def test_rows_of_tokens_may_be_empty():
    """The collator refuses them for images; a call may make them."""
    model, adapter = patched()
    batch = InstructionCollator(Collator(), adapter, as_tokens=True)(rows())
    batch["instruction_mask"][0] = False
    instructions(model, adapter, batch)[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("as_tokens", [False, True])
def test_it_goes_to_worker_processes_without_the_model(as_tokens):
    _, adapter = patched()
    collator = InstructionCollator(Collator(), adapter, as_tokens=as_tokens)
    made = collator(rows())
    twin = pickle.loads(pickle.dumps(collator))
    assert not any(isinstance(value, torch.nn.Module) for value in vars(twin).values())
    for batch in (twin(rows()), next(iter(DataLoader(rows(), 2, collate_fn=collator, num_workers=1)))):
        assert set(batch) == set(made)
        assert all(
            torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
            for name, value in made.items()
        )


# ---------------------------------------------------------------------------------------------- Trainer


def trained_with(folder, collator_of, dataset, processor=PROCESSOR, **options):
    model, adapter = patched(processor=processor)
    adapter.train_only()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_strategy="no", per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, seed=0, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collator_of(adapter), train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    trainer.evaluate()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


OPTIONS = [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}, {"label_smoothing_factor": 0.1}]


@pytest.mark.parametrize(("options", "as_tokens"), some(1, OPTIONS, [False, True]))
def test_trainer_hands_instructions_on(tmp_path, as_tokens, options):
    """Also where Trainer takes the labels away, which without a template tell whose words are whose."""
    dataset = rows([TALKS[1], [tiny.user("why?"), tiny.assistant("so")]] * 4)
    processor = PROCESSOR if as_tokens else None

    def losses(**told):
        def named(adapter):
            reader = adapter.model._emma.pipeline.reader
            reader.tokenizer = reader._texts.tokenization.tokenizer = PROCESSOR.tokenizer
            return InstructionCollator(Collator(), adapter, as_tokens=as_tokens, **told)

        return trained_with(tmp_path, named, dataset, processor, **options)

    said = losses()
    assert len(said) == 3
    assert said == losses(instruction_of=lambda row: row["messages"][0]["content"][-1]["text"])
    assert said != losses(instruction_of=lambda row: "is there?")


def test_tokens_can_be_cut_and_joined_as_accelerate_does():
    """With ``dispatch_batches`` and several processes. Text it can't join, and gives whole to each process."""
    _, adapter = patched()
    text, tokens = (InstructionCollator(Collator(), adapter, as_tokens=which)(rows()) for which in (False, True))
    half = slice_tensors(concatenate([tokens, tokens]), slice(1, 3))
    assert torch.equal(half["instruction"], tokens["instruction"].flip(0))
    assert torch.equal(half["instruction_mask"], tokens["instruction_mask"].flip(0))
    assert slice_tensors(text, slice(0, 1))["instruction"] == text["instruction"]
    with pytest.raises(TypeError, match="str"):
        concatenate([text, text])
