"""Judges of the real classes, beside what those classes compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor, ViTModel

from emma_adapter.evaluation.distances import FeatureNetwork, distances
from emma_adapter.evaluation.judges import ColourClassifier, Detector, VisionLanguageJudge
from emma_adapter.evaluation.objects import Found
from emma_adapter.evaluation.tasks import COLOURS
from tests.support import tiny

from . import judging


def test_objects_are_found_in_pixels_under_their_names(tmp_path):
    picture = tiny.picture(0).resize((60, 40))
    found = Detector(judging.detector(tmp_path), "cpu")(picture, ["dog", "red bird"], 0.0)
    assert set(found) == {"dog", "red bird"} and all(len(own) == 4 for own in found.values())
    assert Detector(str(tmp_path), "cpu")(picture, ["dog"], 1.0) == {"dog": []}


def test_colours_are_clips(tmp_path):
    source = judging.clip(tmp_path)
    model, processor = CLIPModel.from_pretrained(source), CLIPProcessor.from_pretrained(source)
    classify, picture = ColourClassifier(source, "cpu"), tiny.picture(3).resize((60, 40))
    box = (5.0, 4.0, 31.0, 22.0)
    total = torch.zeros(10)
    for words in ("a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"):
        inputs = processor(
            text=[words.format(colour) for colour in COLOURS],
            images=picture.crop((5, 4, 31, 22)),
            return_tensors="pt",
            padding=True,
        )
        inputs.pop("token_type_ids", None)
        total += model(**inputs).logits_per_image.softmax(1)[0].detach()
    assert classify(picture, "dog", [Found(box, 1.0)]) == [COLOURS[int(total.argmax())]]
    assert len(classify(picture, "dog", [Found((5, 4, 5, 4), 1.0)])) == 1  # an empty box


def test_yes_and_no_are_those_of_the_models_logits(tmp_path):
    tiny.llava().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    judge = VisionLanguageJudge(str(tmp_path), "cpu")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    found = set()
    for number in range(8):
        picture, question = tiny.picture(number), "Is there a dog?"
        text = processor.apply_chat_template(
            [tiny.user(f"{question} Answer yes or no.")], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=[picture], text=[text], add_special_tokens="<s>" not in text, return_tensors="pt")
        probabilities = model(**inputs).logits[0, -1].softmax(0).detach()
        words = processor.tokenizer.get_vocab()
        ids = {
            word: {
                words[processor.tokenizer.tokenize(text)[0]]
                for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
            }
            for word in ("yes", "no")
        }
        yes, no = (probabilities[list(ids[word] - ids[other])].sum() for word, other in (("yes", "no"), ("no", "yes")))
        assert judge.says_yes(picture, question) == bool(yes > no)
        found.add(bool(yes > no))
    assert isinstance(judge.consistency([tiny.picture(1)], tiny.picture(2), "make it {blue}"), str)
    assert isinstance(judge.quality(tiny.picture(2)), str)


def pictures(folder, count, first):
    folder.mkdir()
    for number in range(count):
        tiny.picture(first + number).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


def test_distances_are_their_formulas(tmp_path):
    network = FeatureNetwork(judging.vit(tmp_path / "vit"), "cpu")
    drawn, real = pictures(tmp_path / "a", 24, 0), pictures(tmp_path / "b", 30, 100)
    model = ViTModel.from_pretrained(tmp_path / "vit").eval()
    from emma_adapter.evaluation.pictures import opened

    x, y = (model(network.pixels(opened(paths))).pooler_output.detach().double().numpy() for paths in (drawn, real))
    found = distances(network, drawn, real)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    fid = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert found["fid"] == pytest.approx(fid, rel=1e-5) and fid > 0
    # Every subset of 12 is unbiased: their mean is near the estimate of all.
    kernel = lambda one, other: (one @ other.T / x.shape[1] + 1) ** 3  # noqa: E731
    same = [(kernel(one, one).sum() - np.trace(kernel(one, one))) / len(one) / (len(one) - 1) for one in (x, y)]
    kid = sum(same) - 2 * kernel(x, y).mean()
    assert abs(found["kid"] - kid) < 5 * found["kid_deviation"] / 10
    assert (found["drawn"], found["real"], found["features"]) == (24, 30, 16)
    assert distances(network, drawn, real, ["kid"]) == {name: found[name] for name in found if name != "fid"}


def test_features_of_clip_are_its_image_embeddings(tmp_path):
    source = judging.clip(tmp_path)
    network, model = FeatureNetwork(source, "cpu"), CLIPModel.from_pretrained(source).eval()
    pixels = network.pixels([tiny.picture(0)])
    words = torch.ones(1, 3, dtype=torch.long)
    embedded = model(pixel_values=pixels, input_ids=words).image_embeds
    assert torch.allclose(torch.nn.functional.normalize(network(pixels).float(), dim=-1), embedded, atol=1e-5)
