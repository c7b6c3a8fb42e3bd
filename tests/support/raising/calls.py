"""Errors about one call: its images, its placeholders and its instruction."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from emma_adapter import (
    ConfigError,
    DataError,
    EmmaConfig,
    InstructionCollator,
    InstructionError,
    MediaLayout,
    RoutingError,
    UnsupportedModelError,
    patch_model,
    register_family,
    unify_model,
)
from emma_adapter.integrations.llava import LlavaFamily
from emma_adapter.models import registry
from tests.support import tiny
from tests.support.zoo import ZOO, Row, mllama

from .triggers import Bench, question, raises

TWO_IMAGES = tiny.token_inputs([1, 1])


def labelled(**changes):
    talk = [tiny.user("is there a cat?"), tiny.assistant("no")]
    inputs = tiny.chat_inputs([talk], generate=False)
    return {**inputs, "labels": inputs["input_ids"].clone(), **changes}


# ----------------------------------------------------------------------------------------------- routing


@raises(RoutingError, "patching/planning.py:_is_placeholder", "needs input_ids or inputs_embeds")
def pixels_alone(bench: Bench) -> None:
    bench.adapter().model(pixel_values=question()["pixel_values"])


@raises(RoutingError, "patching/planning.py:_is_placeholder", "; got {type(prompt).__name__}")
def token_ids_in_a_list(bench: Bench) -> None:
    inputs = question()
    bench.adapter().model(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"].tolist())


@raises(RoutingError, "patching/planning.py:_is_placeholder", "input_ids must be integers")
def token_ids_of_a_row_alone(bench: Bench) -> None:
    inputs = question()
    bench.adapter().model.generate(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"][0])


@raises(RoutingError, "patching/planning.py:_is_placeholder", "input_ids must be integers")
def token_ids_as_floats(bench: Bench) -> None:
    inputs = question()
    bench.adapter().model(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"].float())


@raises(RoutingError, "patching/planning.py:_is_placeholder", "inputs_embeds must be")
def embeddings_of_a_row_alone(bench: Bench) -> None:
    model = bench.adapter().model
    embeds = model.get_input_embeddings()(torch.ones(8, dtype=torch.long))
    model(inputs_embeds=embeds, pixel_values=question()["pixel_values"], instruction="is there a cat?")


@raises(RoutingError, "patching/planning.py:_equals_embedding", "has no embedding")
def embeddings_without_one_for_the_placeholder(bench: Bench) -> None:
    model = tiny.llava(image_token=10**6)
    adapter = patch_model(model, processor=tiny.processor())
    embeds = model.get_input_embeddings()(torch.ones(1, 8, dtype=torch.long))
    adapter.model(inputs_embeds=embeds, pixel_values=question()["pixel_values"], instruction="is there a cat?")


@raises(RoutingError, "patching/routing.py:rows_of_media", "but the prompts hold")
def fewer_images_than_placeholders(bench: Bench) -> None:
    # LLaVA-NeXT knows from their sizes how many tokens its images take.
    entry = ZOO["llava_next"]
    model = entry.model()
    patch_model(model, processor=entry.processor())
    inputs = entry.batch([Row(images=((56, 56),)), Row(images=((56, 56),))])
    model(**inputs | {"pixel_values": inputs["pixel_values"][:1], "image_sizes": inputs["image_sizes"][:1]})


@raises(RoutingError, "patching/routing.py:check_tokens", "as an argument of its own")
def fewer_images_than_placeholders_that_they_share(bench: Bench) -> None:
    inputs = tiny.token_inputs([2])
    bench.adapter().model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})


@raises(RoutingError, "patching/planning.py:cached_length", "caches of different lengths")
def two_caches(bench: Bench) -> None:
    model = bench.adapter().model
    cache = model(**question(), use_cache=True).past_key_values
    model.generate(**question(), past_key_values=cache, cache=DynamicCache())


@raises(RoutingError, "patching/routing.py:rows_of_media", "would begin in one row")
def an_image_across_two_rows(bench: Bench) -> None:
    inputs = {name: value.clone() for name, value in TWO_IMAGES.items()}
    rows, columns = (inputs["input_ids"] == 4).nonzero(as_tuple=True)
    inputs["input_ids"][rows[0], columns[0]] = 9
    inputs["input_ids"][1, -1] = 4
    bench.adapter().model(**inputs)


@raises(RoutingError, "models/families.py:share_evenly", "evenly")
def placeholders_that_can_not_be_shared(bench: Bench) -> None:
    inputs = {name: value.clone() for name, value in TWO_IMAGES.items()}
    inputs["input_ids"][0, -1] = 4
    bench.adapter().model(**inputs)


@raises(RoutingError, "models/families.py:ProjectorCall.size", "by which its family divides them")
def pixels_without_their_sizes(bench: Bench) -> None:
    entry = ZOO["qwen2_vl"]
    adapter = patch_model(entry.model(), processor=entry.processor())
    inputs = entry.batch([Row(images=((56, 56),))])
    visual = adapter.model.model.visual
    with adapter.instruction("is there a cat?"):
        visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


class Announces(LlavaFamily):
    """A family whose layout is wrong."""

    model_types = ("llava",)
    packed = False

    def layout(self, call):
        entries = call.visual_tokens.shape[0]
        grids = [(2, 2)] if self.packed else None
        return MediaLayout(tokens=[4] * entries, entries=[2] * entries, grids=grids, packed=self.packed)


class AnnouncesTooFewGrids(Announces):
    packed = True


@raises(RoutingError, "models/feature_calls.py:checked_layout", "pass on everything that the model's processor returns")
def a_family_that_announces_more_images(bench: Bench) -> None:
    bench.monkeypatch.setattr(registry, "_FAMILIES", {})
    register_family(Announces())
    bench.adapter().model(**question())


@raises(RoutingError, "models/feature_calls.py:checked_layout", "must name the grid of each entry")
def a_family_that_announces_too_few_grids(bench: Bench) -> None:
    bench.monkeypatch.setattr(registry, "_FAMILIES", {})
    register_family(AnnouncesTooFewGrids())
    bench.adapter().model(**question())


@raises(RoutingError, "integrations/llava_next.py:frames_of", "videos must come as one tensor")
def videos_in_a_list(bench: Bench) -> None:
    entry = ZOO["llava_next_video"]
    model = entry.model()
    patch_model(model, processor=entry.processor())
    inputs = entry.batch([Row(videos=(3,))])
    projector = model.model.multi_modal_projector
    frames = torch.ones(3, 4, projector.linear_1.in_features)
    bench.monkeypatch.setattr(type(model.model), "get_video_features", lambda self, clips, **_: projector(frames))
    model(**{**inputs, "pixel_values_videos": list(inputs["pixel_values_videos"])})


@raises(RoutingError, "integrations/internvl_chat.py:InternVLChatFamily.placeholder_id", "img_context_token_id")
def internvl_that_does_not_know_its_placeholder(bench: Bench) -> None:
    from tests.support.remote_internvl import internvl_chat, internvl_inputs

    model = internvl_chat(set_context_token=False)
    patch_model(model)
    model(**internvl_inputs([[1]]))


@raises(RoutingError, "integrations/llava_original.py:LlavaOriginalFamily.layout", "one image for each placeholder")
def an_image_too_few_for_the_original_llava(bench: Bench) -> None:
    from tests.support.remote_llava import llava_inputs, llava_original

    model = llava_original(padding_side="left")
    patch_model(model)
    inputs = llava_inputs([2, 1], padding_side="left")
    model(**inputs | {"images": inputs["images"][:-1]})


@raises(RoutingError, "integrations/mllama.py:MllamaFamily.layout", "with the images of each row in a list")
def images_of_other_rows_for_llama(bench: Bench) -> None:
    model = mllama.ENTRY.model()
    patch_model(model, processor=mllama.ENTRY.processor())
    inputs = mllama.ENTRY.batch([Row(images=((56, 28), (28, 28))), Row(images=((28, 28),))])
    of_images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    model(**inputs | {name: inputs[name].flip(0) for name in of_images})


@raises(UnsupportedModelError, "models/projected_tokens.py:require_alignable_output", "nothing can be aligned")
def scores_of_a_visual_vocabulary_to_align(bench: Bench) -> None:
    patch_model(ZOO["ovis2"].model(), EmmaConfig(place="after_projector"), processor=ZOO["ovis2"].processor())


@raises(UnsupportedModelError, "unified/branches.py:make_branch", "can't be made to draw")
def drawing_with_llama(bench: Bench) -> None:
    from tests.unified.small import autoencoder

    unify_model(mllama.ENTRY.model(), processor=mllama.ENTRY.processor(), autoencoder=autoencoder())


# -------------------------------------------------------------------------------- an instruction in the call


@raises(InstructionError, "patching/hooks.py:_raise_for_lack_of_an_instruction", "outside of a call")
def features_outside_of_a_call(bench: Bench) -> None:
    bench.adapter().model.get_image_features(pixel_values=question()["pixel_values"])


@raises(InstructionError, "patching/hooks.py:_raise_for_lack_of_an_instruction", "patch_model first; then checkpoint")
def features_that_were_checkpointed_before_patching(bench: Bench) -> None:
    model = tiny.llava()
    plain = model.model.get_image_features
    model.model.get_image_features = lambda *args, **more: checkpoint(plain, *args, use_reentrant=False, **more)
    patch_model(model, processor=tiny.processor())
    model(**question()).logits.sum().backward()


@raises(InstructionError, "modules/gradient_checkpointing.py:RecomputationMemory.recall", "{_AMBIGUOUS}")
def whole_calls_that_cannot_be_told_apart(bench: Bench) -> None:
    adapter = bench.adapter()
    inputs = question()
    with adapter.disabled():
        one = checkpoint(adapter.model, **inputs, use_reentrant=False).logits
    other = checkpoint(adapter.model, **inputs, use_reentrant=False).logits
    (one + other).sum().backward()


@raises(InstructionError, "patching/planning.py:_instruction_tokens", "can't be read from inputs_embeds")
def embeddings_without_an_instruction(bench: Bench) -> None:
    model = bench.adapter().model
    inputs = question()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])


@raises(InstructionError, "patching/planning.py:_instruction_tokens", "there is no instruction=")
def a_mask_without_an_instruction(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction_mask=torch.ones(1, 3))


@raises(InstructionError, "instructions/pipeline.py:InstructionPipeline.explicit", "must be a text")
def a_number_for_the_instruction(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=5)


@raises(InstructionError, "instructions/pipeline.py:InstructionPipeline.explicit", "must be a text")
def a_mapping_without_token_ids(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction={"text": "is there a cat?"})


@raises(InstructionError, "instructions/pipeline.py:InstructionPipeline.explicit", "is an empty list")
def an_empty_list_of_instructions(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=[])


@raises(InstructionError, "instructions/pipeline.py:InstructionPipeline.explicit", "row(s)")
def two_instructions_for_one_row(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=["a cat?", "a dog?"])


@raises(InstructionError, "instructions/pipeline.py:InstructionPipeline.explicit", "instruction= is text")
def a_mask_beside_a_text(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction="a cat?", instruction_mask=torch.ones(1, 2))


@raises(InstructionError, "instructions/pipeline.py:InstructionTokens.for_each", "one for each")
def three_named_instructions_for_one_row(bench: Bench) -> None:
    adapter = bench.adapter()
    with adapter.instruction(["a cat?", "a dog?", "a bird?"]):
        adapter.model(**question())


@raises(InstructionError, "instructions/pipeline.py:_checked_ids", "must be integers")
def token_ids_that_are_none(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=torch.tensor([[True, False]]))


@raises(InstructionError, "instructions/pipeline.py:_checked_ids", "instruction_mask= must be")
def a_mask_in_a_list(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=torch.tensor([[5, 6]]), instruction_mask=[[1, 0]])


@raises(InstructionError, "instructions/pipeline.py:_checked_ids", "instruction_mask= must be")
def a_mask_of_another_shape(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=torch.tensor([[5, 6]]), instruction_mask=torch.ones(1, 3))


@raises(InstructionError, "instructions/pipeline.py:_check_vocabulary", "vocabulary ends at")
def token_ids_of_another_tokenizer(bench: Bench) -> None:
    bench.adapter().model(**question(), instruction=torch.tensor([[10**6]]))


@raises(InstructionError, "instructions/packed_samples.py:find_samples", "several samples are packed")
def packed_samples_without_positions(bench: Bench) -> None:
    inputs = {**question(), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    bench.adapter().model(**inputs)


# ----------------------------------------------------------------------------- an instruction in the prompt


@raises(InstructionError, "instructions/reader.py:InstructionReader._need_tokenizer", "a tokenizer is needed")
def a_text_without_a_tokenizer(bench: Bench) -> None:
    bench.adapter(processor=None).model(**question(), instruction="is there a cat?")


@raises(InstructionError, "instructions/reader.py:InstructionReader._select_row", "a training step without labels")
def training_without_labels(bench: Bench) -> None:
    bench.adapter(processor=None).model.train()(**question())


@raises(InstructionError, "instructions/reader.py:InstructionReader._select_row", "_ALL_SUPERVISED")
def labels_on_everything(bench: Bench) -> None:
    bench.adapter(processor=None).model(**labelled())


@raises(InstructionError, "instructions/reader.py:InstructionReader._check_read_whole", "shows answers")
def a_conversation_by_another_template(bench: Bench) -> None:
    text = "<image>User: what? Assistant: a bird User: why? Assistant:"
    inputs = tiny.processor()(text=text, images=[tiny.picture(0)], return_tensors="pt")
    bench.adapter().model(**inputs)


@raises(InstructionError, "instructions/prompt.py:Prompt.answers", "differ in shape")
def labels_of_another_shape(bench: Bench) -> None:
    bench.adapter().model(**labelled(labels=torch.ones(1, 2, dtype=torch.long)))


@raises(InstructionError, "instructions/prompt.py:Prompt.answers", "differ in shape")
def labels_in_a_list(bench: Bench) -> None:
    bench.adapter().model(**labelled(labels=[[1, 2]]))


# ------------------------------------------------------------------------------------------- collating


def plain(rows):
    return {}


@raises(ConfigError, "data/collation.py:InstructionCollator.__init__", "takes the handle")
def a_collator_for_the_model(bench: Bench) -> None:
    InstructionCollator(plain, bench.adapter().model)


@raises(InstructionError, "data/collation.py:InstructionCollator.__init__", "needs the model's tokenizer")
def token_ids_without_a_tokenizer(bench: Bench) -> None:
    InstructionCollator(plain, bench.adapter(processor=None), as_tokens=True)


@raises(DataError, "data/collation.py:InstructionCollator.__call__", "empty question")
def a_row_with_an_empty_question(bench: Bench) -> None:
    row = {"messages": [tiny.user(" "), tiny.assistant("a cat")], "images": [tiny.picture(0)]}
    InstructionCollator(plain, bench.adapter())([row])


@raises(InstructionError, "data/collation.py:InstructionCollator._turns", "reads rows with a list of messages")
def a_row_with_other_columns(bench: Bench) -> None:
    InstructionCollator(plain, bench.adapter())([{"question": "is there a cat?"}])


@raises(InstructionError, "data/collation.py:InstructionCollator._turns", "reads rows with a list of messages")
def a_row_that_is_a_text(bench: Bench) -> None:
    InstructionCollator(plain, bench.adapter())(["is there a cat?"])


@raises(InstructionError, "data/collation.py:InstructionCollator._turns", "a message needs a")
def a_message_without_a_role(bench: Bench) -> None:
    InstructionCollator(plain, bench.adapter())([{"messages": [{"content": "is there a cat?"}]}])


@raises(InstructionError, "data/collation.py:InstructionCollator._turns", "without a message of the user")
def a_row_in_which_the_user_says_nothing(bench: Bench) -> None:
    InstructionCollator(plain, bench.adapter())([{"messages": [tiny.assistant("a cat")]}])
