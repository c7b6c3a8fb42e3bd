"""Rows and images as people have them: the forms that other tools use, photographs of phones, damaged files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from emma_adapter.data import images as images_module
from emma_adapter.data.conversations import read_conversation, trainable_turns
from emma_adapter.data.images import check_image, open_image, to_rgb
from emma_adapter.data.rows import open_rows
from emma_adapter.errors import DataError
from emma_adapter.report import Question
from emma_adapter.report.questions import entry_of
from tests.support import tiny

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).tolist()


def sideways(path, orientation=6):
    """A photograph as a phone saves it: the sensor's rows, and which side is up."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTO.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def rows_of(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return open_rows(str(path), "train", None)


def row(*, source="a.png", **change):
    talk = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    return {"images": [source], "messages": talk, **change}


# ---------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_a_photo_is_upright_wherever_it_comes_from(tmp_path, suffix, orientation):
    """As transformers and ``datasets`` open it."""
    import datasets

    path = sideways(tmp_path / f"photo{suffix}", orientation)
    want = pixels(load_image(str(path)))
    assert np.shape(want) == ((40, 24, 3) if orientation > 4 else (24, 40, 3))
    [found] = rows_of(tmp_path, row(source=path.name)).images(0)
    assert (found.mode, pixels(found)) == ("RGB", want)
    feature = datasets.Image()
    assert pixels(feature.decode_example(feature.encode_example(str(path))).convert("RGB")) == want
    # Whether a task, or a script, converted it already or not.
    with Image.open(path) as opened:
        assert pixels(to_rgb(opened)) == pixels(to_rgb(opened.convert("RGB"))) == want


def test_a_report_sees_photos_upright(tmp_path):
    path = sideways(tmp_path / "photo.png")
    with Image.open(path) as opened:
        shown = Question.about(opened, "what?")
    assert [image.size for image in shown.images] == [(24, 40)]
    upright = Question.about(load_image(str(path)), "what?")
    assert entry_of(shown, 0) == entry_of(upright, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa"])
def test_every_mode_becomes_rgb(mode):
    image = (
        PHOTO.convert("RGBA").convert(mode) if mode in ("RGBa", "LA") else PHOTO.convert("L" if mode == "PA" else "RGB")
    )
    image = image.convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert pixels(to_rgb(image)) == pixels(image.convert("RGB"))


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_sixteen_bits_are_not_white(tmp_path, suffix):
    grey = np.asarray(PHOTO.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"a{suffix}")
    [found] = rows_of(tmp_path, row(source=f"a{suffix}")).images(0)
    assert pixels(found) == np.repeat(grey[..., None], 3, -1).tolist()


def test_of_an_animation_the_first_frame_is_seen(tmp_path):
    frames = [tiny.picture(0).convert("P"), tiny.picture(1).convert("P")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    [found] = rows_of(tmp_path, row(source="a.gif")).images(0)
    assert pixels(found) == pixels(frames[0].convert("RGB"))


def saved(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


DAMAGED = {
    "empty.png": (b"", "the file is empty"),
    "page.jpg": (b"<!DOCTYPE html><title>404</title>", "no format that Pillow knows"),
    "clip.mp4": (b"\x00\x00\x00\x20ftypisom" + bytes(100), "it is a video"),
    **{
        f"{kind.lower()}-{share}.{kind.lower()}": (
            saved(kind)[: int(share * len(saved(kind)))],
            "can't be read as an image",
        )
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
        for share in (0.1, 0.5, 0.98)
    },
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_named_before_it_is_trained_on(tmp_path, name):
    content, words = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    PHOTO.save(tmp_path / "a.png")
    rows = rows_of(tmp_path, row(), row(source=name))
    rows.check(0)
    for look in (rows.check, rows.images):
        with pytest.raises(DataError, match="line 2") as caught:
            look(1)
        assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)
        assert caught.value.__cause__ is not None
    # The same file within a row, which has no name.
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    with pytest.raises(DataError, match="line 1: its image can't be read"):
        rows_of(tmp_path, row(source=url)).check(0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_whole_image_passes(tmp_path, kind):
    (tmp_path / "image").write_bytes(saved(kind))
    rows_of(tmp_path, row(source="image")).check(0)


@pytest.mark.parametrize("behind", [b"\x00" * 40, b"\x00" * 400])
def test_what_stands_behind_the_end_of_a_jpeg_harms_nothing(tmp_path, behind):
    (tmp_path / "image").write_bytes(saved("JPEG") + behind)
    rows_of(tmp_path, row(source="image")).check(0)


def test_a_png_with_a_wrong_checksum_that_can_be_decoded_passes(tmp_path):
    whole = bytearray(saved("PNG"))
    whole[whole.rindex(b"IEND") - 5] ^= 1  # in the checksum of the pixels
    (tmp_path / "image").write_bytes(whole)
    rows = rows_of(tmp_path, row(source="image"))
    rows.check(0)
    assert rows.images(0)[0].size == (200, 200)


def test_whole_images_are_not_decoded_to_check_them(tmp_path, monkeypatch):
    """Of large data that would take as long as an epoch's reading."""
    for kind in ("JPEG", "PNG"):
        (tmp_path / kind).write_bytes(saved(kind))
    rows = rows_of(tmp_path, row(images=["JPEG", "PNG"]), row(source="JPEG"))
    monkeypatch.setattr(images_module, "to_rgb", lambda image: pytest.fail("decoded"))
    rows.check(0)
    # And each file once.
    (tmp_path / "JPEG").unlink()
    (tmp_path / "JPEG").symlink_to(tmp_path / "PNG")
    monkeypatch.setattr(images_module, "_is_whole", lambda image: pytest.fail("opened again"))
    rows.check(1)


def test_an_image_that_is_a_bomb(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.png can't be read.*make it smaller"):
        rows_of(tmp_path, row()).check(0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.png", "there is no image"),
        ("", "is a folder"),
        (".", "is a folder"),
        ("a" * 5000, "there is no image"),
        ("a\x00b", "there is no image"),
        ("https://example.com/a.png", "nothing is downloaded"),
        ("s3://bucket/a.png", "nothing is downloaded"),
        ("data:image/png;base64,####", "not valid base64"),
        ({"path": None, "bytes": None}, "file names"),
        (7, "file names"),
        (None, "file names"),
    ],
)
def test_an_image_that_isnt_there(tmp_path, source, words):
    with pytest.raises(DataError, match="line 1: ") as caught:
        rows_of(tmp_path, row(source=source)).check(0)
    assert words in str(caught.value) and len(str(caught.value)) < 600


def test_pixels_whose_range_nobody_knows(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff can't be used.*save it with 8 bits"):
        rows_of(tmp_path, row(source="a.tiff")).check(0)


@pytest.mark.parametrize("feature", ["bytes", "path", "name"])
def test_damaged_images_of_a_dataset_are_named(tmp_path, monkeypatch, feature):
    import datasets

    (tmp_path / "cut.jpg").write_bytes(saved("JPEG")[:500])
    sideways(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    values = [
        {"bytes": (tmp_path / name).read_bytes(), "path": None} if feature == "bytes" else str(tmp_path / name)
        for name in ("photo.jpg", "cut.jpg")
    ]
    talk = row()["messages"]
    table = datasets.Dataset.from_list([{"images": [value], "messages": talk} for value in values])
    if feature != "name":
        table = table.cast_column("images", datasets.List(datasets.Image()))
    # Written as it is: save_to_disk would look at the images.
    monkeypatch.setattr("emma_adapter.data.tables._load_dataset", lambda source, split: table)
    rows = open_rows("saved", "train", None)
    rows.check(0)
    assert pixels(rows.images(0)[0]) == pixels(load_image("photo.jpg"))
    for look in (rows.check, rows.images):
        with pytest.raises(DataError, match=r"saved, row 2: .*download or copy it again"):
            look(1)


# ---------------------------------------------------------------------------------------------- forms


def base64_of(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


def said(part):
    text = {"type": "text", "text": "how many dogs?"}
    return {"messages": [{"role": "user", "content": [part, text]}, {"role": "assistant", "content": "two"}]}


USER, ASSISTANT = {"role": "user", "content": "<image>how many dogs?"}, {"role": "assistant", "content": "two"}

#: The same row in the forms of other tools; $PATH is a file, $BASE64 what it holds.
FORMS = {
    "transformers, path": said({"type": "image", "path": "$PATH"}),
    "transformers, url": said({"type": "image", "url": "$PATH"}),
    "transformers, image": said({"type": "image", "image": "$PATH"}),
    "transformers, base64": said({"type": "image", "base64": "$BASE64"}),
    "transformers, data url": said({"type": "image", "url": "data:image/png;base64,$BASE64"}),
    "transformers, images apart": {"images": ["$PATH"], **said({"type": "image"})},
    "named twice alike": {"images": ["$PATH"], **said({"type": "image", "path": "$PATH"})},
    "file url": said({"type": "image", "image": "file://$PATH"}),
    "openai, data url": said(
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,$BASE64", "detail": "low"}}
    ),
    "openai, path": said({"type": "image_url", "image_url": {"url": "$PATH"}}),
    "openai, text": said({"type": "image_url", "image_url": "$PATH"}),
    "openai, responses": said({"type": "input_image", "image_url": "data:image/png;base64,$BASE64"}),
    "stored nulls": said({"type": "image", "path": "$PATH", "url": None, "text": None, "index": None}),
    "by number": {"images": ["$PATH"], **said({"type": "image", "index": 0, "text": None})},
    "ms-swift": {"messages": [USER, ASSISTANT], "images": ["$PATH"]},
    "ms-swift, untagged": {"messages": [{**USER, "content": "how many dogs?"}, ASSISTANT], "images": "$PATH"},
    "ms-swift, mapping": {"messages": [USER, ASSISTANT], "images": [{"bytes": None, "path": "$PATH"}]},
    "ms-swift, base64": {"messages": [USER, ASSISTANT], "images": ["data:image/png;base64,$BASE64"]},
    "ms-swift, query": {"query": "<image>how many dogs?", "response": "two", "images": ["$PATH"]},
    "llava": {
        "id": "7",
        "image": "$PATH",
        "conversations": [{"from": "human", "value": "<image>\nhow many dogs?"}, {"from": "gpt", "value": "two"}],
    },
    "trl": {"images": ["$PATH"], "prompt": [USER], "completion": [ASSISTANT]},
    "trl, texts": {"images": ["$PATH"], "prompt": "how many dogs?", "completion": "two"},
    "question": {"image": "$PATH", "question": "how many dogs?", "answer": "two"},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_other_tools_are_read(tmp_path, name):
    path = tmp_path / "a picture.png"
    tiny.picture(3).save(path)
    written = json.dumps(FORMS[name]).replace("$PATH", str(path)).replace("$BASE64", base64_of(path))
    rows = rows_of(tmp_path, json.loads(written))
    want = [tiny.user("how many dogs?"), tiny.assistant("two")]
    assert rows.check(0) == rows.messages(0) == want
    [image] = rows.images(0)
    assert pixels(image) == pixels(tiny.picture(3))


def test_what_transformers_reads_of_messages_it_reads_too(tmp_path):
    """The chat template's own loader, on the same messages."""
    path = sideways(tmp_path / "photo.png")
    for form in ("path", "url", "image", "base64", "data url"):
        written = (
            json.dumps(FORMS[f"transformers, {form}"]).replace("$PATH", str(path)).replace("$BASE64", base64_of(path))
        )
        messages = json.loads(written)["messages"]
        want = tiny.processor().apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="np", processor_kwargs={}
        )
        rows = rows_of(tmp_path, json.loads(written))
        found = tiny.processor()(images=rows.images(0), text=["<image>"], return_tensors="np")
        np.testing.assert_array_equal(found["pixel_values"], want["pixel_values"])


def test_images_in_the_order_in_which_they_are_shown(tmp_path):
    for number in range(3):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    parts = [{"type": "image", "index": 2}, {"type": "text", "text": "and"}, {"type": "image", "index": 0}]
    talk = [{"role": "user", "content": [*parts, {"type": "image", "index": 1}]}, ASSISTANT]
    rows = rows_of(tmp_path, {"images": ["0.png", "1.png", "2.png"], "messages": talk})
    assert [pixels(image) for image in rows.images(0)] == [pixels(tiny.picture(number)) for number in (2, 0, 1)]


def test_a_history_and_a_system_text():
    found = read_conversation(
        {"system": "be brief", "history": [["<image>a?", "b"]], "query": "c?", "response": "d", "images": ["x.png"]},
        "here",
    )
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert trainable_turns(found.messages) == [2, 4] and found.images == ["x.png"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}])
def test_an_answer_that_is_only_context_is_not_learned(mark):
    talk = [USER, {**ASSISTANT, **mark}, {"role": "user", "content": "sure?"}, {**ASSISTANT, "weight": 1}]
    assert trainable_turns(read_conversation({"images": ["a"], "messages": talk}, "here").messages) == [3]


def test_a_dataset_whose_messages_name_the_images(tmp_path):
    import datasets

    path = sideways(tmp_path / "photo.png")
    part = {"type": "image", "path": str(path), "text": None}
    talk = [
        {"role": "user", "content": [part, {"type": "text", "path": None, "text": "how many dogs?"}]},
        {"role": "assistant", "content": [{"type": "text", "path": None, "text": "two"}]},
    ]
    datasets.Dataset.from_list([{"messages": talk}]).save_to_disk(tmp_path / "saved")
    rows = open_rows(str(tmp_path / "saved"), "train", None)
    assert rows.check(0) == [tiny.user("how many dogs?"), tiny.assistant("two")]
    assert pixels(rows.images(0)[0]) == pixels(load_image(str(path)))


def test_messages_of_mixed_form_in_a_dataset(tmp_path):
    """Whose contents are texts and lists, which datasets keeps as JSON."""
    import datasets

    tiny.picture(0).save(tmp_path / "a.png")
    made = said({"type": "image", "path": str(tmp_path / "a.png")})
    table = datasets.Dataset.from_list([made], on_mixed_types="use_json")
    assert "Json" in str(table.features)
    table.save_to_disk(tmp_path / "saved")
    rows = open_rows(str(tmp_path / "saved"), "train", None)
    assert rows.check(0) == [tiny.user("how many dogs?"), tiny.assistant("two")]


def test_images_in_the_messages_of_a_dataset(tmp_path):
    import datasets

    sideways(tmp_path / "photo.png")
    contents = [(tmp_path / "photo.png").read_bytes(), b"damaged"]
    parts = [
        [{"type": "image", "image": {"bytes": content}}, {"type": "text", "text": "how many dogs?"}]
        for content in contents
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
    part = {"type": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
    features = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": [part]}]})
    rows = [{"messages": [{"role": "user", "content": one}, answer]} for one in parts]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    read = open_rows(str(tmp_path / "saved"), "train", None)
    assert read.check(0) == [tiny.user("how many dogs?"), tiny.assistant("two")]
    assert pixels(read.images(0)[0]) == pixels(load_image(str(tmp_path / "photo.png")))
    with pytest.raises(DataError, match="row 2: its image can't be read"):
        read.check(1)


def asked(*parts):
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}, ASSISTANT]}


A, B = ({"type": "image", "path": f"{name}.png"} for name in "ab")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (asked({"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}), "nothing is downloaded"),
        (asked({"type": "image", "url": "https://example.com/a.png"}), "nothing is downloaded"),
        (asked({"type": "image", "path": "a.png", "url": "b.png"}), "2 times, as path, url"),
        ({**asked(A), "images": ["b.png"]}, "leave one of them out"),
        ({**asked(A, {"type": "image"}), "images": ["b.png"]}, "2 image(s)"),
        (asked(A, {"type": "image"}), "2 image(s)"),
        (asked({"type": "image"}), "names 0"),
        ({**asked({"type": "image", "index": 1}), "images": ["b.png"]}, "1 image(s)"),
        ({**asked(), "images": ["b.png"], "image": "a.png"}, "different images"),
        ({**asked(), "videos": ["a.mp4"]}, "only images are read"),
        ({"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>"}]}, "only images are read"),
        (asked({"type": "video", "path": "a.mp4"}), "only images are read"),
        (asked({"type": "video_url", "video_url": {"url": "a.mp4"}}), "only images are read"),
        (asked({"type": "input_audio", "input_audio": {}}), "the row has a sound"),
        ({**asked(), "images": ["a.mp4"]}, "there is no image"),
        ({"query": "a?", "response": "b", "history": ["ab"]}, "list of pairs"),
        ({"images": ["a.png"], "question": " ", "answer": "b"}, "the question is empty"),
        (
            {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>"}, ASSISTANT]},
            "the question is empty",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_mean_several_things_is_refused(tmp_path, made, words):
    tiny.picture(0).save(tmp_path / "a.png")
    tiny.picture(1).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"data\.jsonl, line 2") as caught:
        rows_of(tmp_path, row(), made).check(1)
    assert words in str(caught.value)


def test_pil_images_are_checked_and_left_as_they_are():
    image = ImageOps.expand(PHOTO, 1)
    check_image(image, Path(), "here")
    assert pixels(open_image(image, Path(), "here")) == pixels(image)
