"""The report: what it says is what the model does and the analysis finds, and the page is sound whatever is in it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import html5lib
import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from emma_adapter import EmmaConfig, patch_model
from emma_adapter.analysis import (
    Asked,
    AttentionMass,
    Diagnosis,
    PairDistances,
    Probe,
    attention_mass,
    token_movement,
    weight_shares,
)
from emma_adapter.report import (
    Absent,
    Question,
    Reading,
    Report,
    figures,
    make_report,
    page_findings,
    pictures,
    questions,
    render,
)
from emma_adapter.report.questions import choose, entry_of, find_pairs, find_twins, normalised
from tests.support import tiny
from tests.support.budget import budget
from tests.support.zoo import ZOO

ASKED = {"colour": ("what colour is the bird?", ("red", "green")), "count": ("how many dogs?", ("one", "two"))}
HOSTILE = [
    "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>",
    "</svg></style></title><!-- {{ 7 * 7 }} {% raw %} ]]> &amp; \"quoted\" 'single'",
    "$\\frac{1}{ ^^ $ \\unknown",
    "\u202e\u05d0\u05d9\u05d6\u05d4 \u05e6\u05d1\u05e2? \u0645\u0627 \u0627\u0644 \U0001f426\u200d\U0001f525 \u9ce5",
    "w" * 3000,
    "half \ud83d, null \x00, bell \x07, escape \x1b[31m",
]


def adapter_of(fusion="modulation", *, trained=True, seed=0):
    adapter = patch_model(tiny.llava(seed=seed), EmmaConfig(fusion=fusion), processor=tiny.processor())
    if trained:
        tiny.train_randomly(adapter.alignment)
    # A tiny model never stops by itself.
    adapter.model.generation_config.eos_token_id = None
    return adapter


def make_questions(count=60, *, pairs=3):
    """Two about each picture; answers that depend on nothing."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        attribute = list(ASKED)[number % 2]
        text, answers = ASKED[attribute]
        pair = str(number // 2) if number < 2 * pairs else None
        # Of a pair, images differ and the words don't.
        picture = tiny.picture(number if pair else 100 + number // 2)
        text, attribute = ASKED["count"][0] if pair else text, "count" if pair else attribute
        answer = (ASKED["count"][1] if pair else answers)[rng.integers(2)]
        made.append(Question.about(picture, text, answer=answer, attribute=attribute, pair=pair))
    return made


def report_of(adapter, asked, **settings):
    return make_report(adapter, tiny.processor(), asked, **{"max_new_tokens": 8, "show": 2, **settings})


@pytest.fixture(scope="module")
def adapter():
    return adapter_of()


@pytest.fixture(scope="module")
def report(adapter):
    return report_of(adapter, make_questions(), model_name="tiny/llava", adapter_name="my adapter")


@pytest.fixture(scope="module")
def page(report):
    return render(report)


@pytest.fixture(scope="module")
def small(adapter):
    """Of one question."""
    return report_of(adapter, [Question.about(tiny.picture(0), "how many dogs?")])


@pytest.fixture(scope="module")
def linear():
    return report_of(adapter_of("linear"), make_questions(4, pairs=0))


def parsed(page):
    """The page's tree; what a browser would have to repair is an error."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def text_of(tree, name):
    return [" ".join("".join(element.itertext()).split()) for element in tree.iter(name)]


def check(page):
    """What every page must be, whatever is in it."""
    tree = parsed(page)
    elements = [element for element in tree.iter() if isinstance(element.tag, str)]
    tags = {element.tag.rpartition("}")[2] for element in elements}
    assert not tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "foreignObject",
        "use-credentials",
    }
    for element in elements:
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name.rpartition("}")[2].rpartition(":")[2] in ("src", "href", "srcset", "data", "action"):
                assert value.startswith(("data:image/", "#")), (name, value[:80])
            assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^'\")]+)", value))
    assert "url(" not in text_of(tree, "style")[0] and "@import" not in text_of(tree, "style")[0]
    ids = [element.attrib["id"] for element in elements if "id" in element.attrib]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    referred = {
        target
        for element in elements
        for name, value in element.attrib.items()
        for target in (
            [value[1:]] if name.endswith("href") and value[:1] == "#" else re.findall(r"url\(#(.+?)\)", value)
        )
    }
    assert referred <= set(ids)
    [policy] = [element for element in elements if element.attrib.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attrib["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert tree.find(".").attrib["lang"] == "en"
    assert len(text_of(tree, "title")) == 1 and text_of(tree, "title")[0]
    levels = [int(element.tag[1]) for element in elements if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(element.attrib["alt"].strip() for element in tree.iter("img"))
    for svg in (element for element in elements if element.tag.endswith("svg")):
        assert svg.attrib["role"] == "img" and svg.attrib["aria-label"].strip()
        assert "#808080" not in str([element.attrib for element in svg.iter()])
    for table in tree.iter("table"):
        assert text_of(table, "caption")[0]
        assert all(head.attrib["scope"] in ("row", "col") for head in table.iter("th"))
    return tree


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_is_sound(page):
    tree = check(page)
    assert len(page) < 1_000_000
    # Every figure has a caption, and every section says how to read it.
    assert all(text_of(figure, "figcaption")[0] for figure in tree.iter("figure"))
    for section in tree.iter("section"):
        figures_in, words = len(list(section.iter("figure"))), " ".join(section.itertext())
        assert not figures_in or "How to read this." in words, section.attrib["id"]


def test_it_says_what_was_found(report, page):
    tree = parsed(page)
    words = " ".join("".join(tree.itertext()).split())
    gain = report.information.gain
    assert f"{gain.before.nats:.2f} nats before, {gain.after.nats:.2f} after" in words
    assert f"{(report.pairs.after > report.pairs.before).sum()} of 3 pairs apart" in words
    assert f"{report.reading.mask.suppressed:.0%} are below 0.5" in words
    assert report.diagnosis.meaning in words
    assert [asked.name for asked in report.diagnosis.attributes] == ["count", "colour"]
    assert f"1. count {report.diagnosis.attributes[0].visual.samples}" in " ".join(
        " ".join(row.itertext()) for row in tree.iter("tr")
    )
    assert "my adapter" in text_of(tree, "title")[0] and "tiny/llava" in words
    assert f"{sum(p.numel() for p in adapter_of().parameters()):,}, " in words


def test_the_shares_of_linear(linear):
    words = " ".join(check(render(linear)).itertext())
    assert f"{weight_shares(adapter_of('linear')).image.mean():.1%} are of the image" in words


def test_answers_are_those_of_the_model(adapter, report):
    for example in report.examples:
        picture = make_questions()[example.number - 1].images[0]
        inputs = tiny.processor()(
            images=[picture], text=[f"<s>USER: <image>\n{example.question} ASSISTANT:"], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        said = []
        for on in (True, False):
            with torch.no_grad(), adapter.instruction(example.question) if on else adapter.disabled():
                ids = adapter.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            said.append(tiny.tokenizer().decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        assert [example.answers.with_adapter, example.answers.without] == [text.strip() for text in said]
        assert example.answers.expected in ("one", "two", "red", "green")
    assert any(example.answers.changed for example in report.examples)


def test_changed_answers_are_marked(report, page):
    tree = parsed(page)
    section = next(one for one in tree.iter("section") if one.attrib["id"] == "answers")
    marked = ["changed" in "".join(card.itertext()) for card in section.iter("article")]
    assert marked == [example.answers.changed for example in report.examples]
    assert f"It changes {sum(marked)} of the 2 answers" in " ".join(tree.itertext())


def test_maps_and_attention_are_those_of_the_analysis(adapter, report):
    example = report.examples[0]
    inputs = tiny.processor()(
        images=[make_questions()[example.number - 1].images[0]],
        text=[f"USER: <image>\n{example.question} ASSISTANT:"],
        return_tensors="pt",
    )
    [want] = token_movement(adapter, inputs)
    np.testing.assert_array_equal(example.views[0].maps[0].gain, want.gain)
    [twin, _] = report.twins
    assert twin.questions[0] != twin.questions[1]
    assert (twin.comparison.difference > 0).all()
    mass = attention_mass(adapter, [inputs])
    assert report.reading.attention.heads.shape[0] == mass.heads.shape[0]
    assert report.reading.attention.entries == 60


def test_hostile_text_is_text(small, report):
    """Wherever text of others is shown, all of it at once."""
    [example] = small.examples
    examples = tuple(
        replace(example, views=(), question=text, answers=replace(example.answers, with_adapter=text, expected=text))
        for text in HOSTILE
    )
    asked = report.diagnosis.attributes[0]
    page = render(
        replace(
            small,
            examples=examples,
            reading=Absent(HOSTILE[0]),
            diagnosis=replace(report.diagnosis, attributes=tuple(replace(asked, name=text) for text in HOSTILE)),
            model=HOSTILE[0],
            adapter=HOSTILE[1],
            facts={text: text for text in HOSTILE},
        )
    )
    shown = "".join(check(page).itertext())
    for text in HOSTILE:
        want = re.sub(r"[\x00\x07\x1b\ud83d]", "\ufffd", text)
        # Question, answer, expected answer, attribute, fact and its name.
        assert shown.count(want[:1400]) >= 6, text[:50]
    assert "{{ 7 * 7 }}" in shown


def test_hostile_questions_reach_no_figure(adapter):
    """From the data to the page, with what a figure's fonts and formulas can't draw."""
    asked = [Question.about(tiny.picture(0), text, answer=text, attribute=text, pair=text) for text in HOSTILE[:4]]
    page = render(report_of(adapter, asked, show=2))
    check(page)
    assert page.count("&lt;script&gt;") > 1


def test_the_same_questions_give_the_same_bytes(small):
    asked = make_questions(2, pairs=0)
    pages = []
    for size in (5.0, 20.0):
        # Whatever the user's settings of matplotlib are.
        with mpl.rc_context({"font.size": size, "axes.facecolor": "red", "svg.hashsalt": str(size)}):
            pages.append(render(report_of(adapter_of(), asked)))
    assert pages[0] == pages[1]
    assert pages[0] != render(small)


def test_figures_of_one_page_share_no_ids():
    from matplotlib.figure import Figure

    def draw():
        figure = Figure()
        figure.add_subplot().plot([0, 1], color="#808080", clip_on=True)
        return figure

    drawn = figures.Figures()
    one, other = (drawn.inline(draw, '"<a line>"') for _ in range(2))
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert "currentColor" in one and "<style" not in one and "<metadata" not in one
    assert 'aria-label="&quot;&lt;a line&gt;&quot;"' in one


# ---------------------------------------------------------------------------------------------- what isn't claimed

PROBE = Probe(0.8, 0.04, 0.5, 0.5, 0.6, 0.05, 100, 2, np.ones(100, bool))


def told(*lost, error=0.05, verdicts=None):
    """What is said of a diagnosis in which the projector loses so much of each attribute."""
    verdicts = verdicts or ["can help"] * len(lost)
    attributes = [
        Asked(f"asked {number}", PROBE, replace(PROBE, accuracy=0.8 - one), one, error, verdict)
        for number, (one, verdict) in enumerate(zip(lost, verdicts, strict=True))
    ]
    return page_findings.diagnosis(Diagnosis(tuple(attributes), None), lambda figure, words: words)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ([0.0, 0.0, 0.0], "Of none is less read behind the projector"),
        ([-0.2, 0.05, 0.09], "Of none is less read behind the projector"),
        ([0.0, 0.3, 0.0], "The projector loses something of number 2."),
        ([0.3, 0.0, 0.28], "The projector loses something of the numbers 1 and 3."),
        ([0.2, 0.6, 0.22], "The projector loses something of the numbers 1, 2 and 3, the most of number 2."),
    ],
)
def test_a_loss_is_named_if_there_is_one(lost, words):
    assert words in told(*lost)["caption"]


def test_verdicts_are_counted():
    said = told(
        0.3, 0.0, 0.0, 0.0, verdicts=["can help", "can't be told", "can't be told", "reaches the model already"]
    )
    assert "Of 4 things" in said["says"] and "“can't be told” of 2" in said["says"]
    assert "Of most rows of which something can be told: “can help”" in said["says"]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ([0.5, 0.5, 0.5], "leaves the distances of all 3 pairs as they are"),
        ([0.5 + 1e-9, 0.5, 0.5 - 1e-9], "leaves the distances of all 3 pairs as they are"),
        ([0.9, 0.5 + 1e-9, 0.2], "pulls 1 of 3 pairs apart"),
    ],
)
def test_rounding_pulls_no_pair_apart(after, words):
    found = page_findings.pairs(PairDistances(np.full(3, 0.5), np.array(after)), lambda figure, said: said)
    assert words in found["says"]


def test_of_even_attention_no_position_is_the_highest():
    even = AttentionMass(np.full(3, 1 / 3), np.full((2, 3), 1 / 3), np.full(3, 1 / 3), 1.0, 4)
    read = page_findings.reading(Reading(attention=even), lambda figure, words: words)["parts"][0]
    assert "attend to all positions of the instruction alike" in read.says and "none, all have 33.3%" in read.caption
    uneven = replace(even, positions=np.array([0.2, 0.5, 0.3]))
    read = page_findings.reading(Reading(attention=uneven), lambda figure, words: words)["parts"][0]
    assert "the most to position 1" in read.says and "50.0% at 1" in read.caption


# ---------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    ("change", "section", "words"),
    [
        ({"answer": None}, "information", "None of the 60 questions have an answer"),
        ({"attribute": None}, "diagnosis", "None of the 60 questions have both an answer and an attribute"),
        ({"pair": "a"}, "pairs", "1 are not those of exactly two questions"),
        pytest.param({"answer": str}, "information", "there are 30 images with 30 answers", marks=pytest.mark.nightly),
        pytest.param(
            {"answer": "yes"}, "information", "All answers in the data are the same", marks=pytest.mark.nightly
        ),
        pytest.param({"answer": "yes"}, "diagnosis", "Nothing is asked often enough", marks=pytest.mark.nightly),
    ],
)
def test_a_section_that_cant_be_computed_says_why(adapter, change, section, words):
    changes = [{name: str(n) if value is str else value for name, value in change.items()} for n in range(60)]
    asked = [replace_question(one, **own) for one, own in zip(make_questions(pairs=0), changes, strict=True)]
    made = report_of(adapter, asked, show=1)
    tree = check(render(made))
    [shown] = [one for one in tree.iter("section") if one.attrib["id"] == section]
    assert words in " ".join(shown.itertext())
    assert not list(shown.iter("figure"))


def replace_question(one, **change):
    labels = {"answer": one.answer, "attribute": one.attribute, "pair": one.pair, **change}
    return Question(one.messages, one.images, **labels)


def test_without_twins_pairs_and_enough_answers(small):
    tree = check(render(small))
    words = " ".join("".join(tree.itertext()).split())
    assert "No two of these questions with different words are about the same image" in words
    assert "needs at least 50" in words
    assert "pairs" not in {section.attrib["id"] for section in tree.iter("section")}
    assert small.pairs is None


def test_a_fusion_of_somebody_elses(monkeypatch):
    from emma_adapter import register_fusion
    from emma_adapter.alignment.fusion import registry

    monkeypatch.setattr(registry, "FUSIONS", dict(registry.FUSIONS))
    register_fusion("buffered")(tiny.BufferedFusion)
    made = report_of(adapter_of("buffered"), make_questions(2, pairs=0))
    assert "What the fusion “buffered” reads isn't known" in " ".join(check(render(made)).itertext())


def test_an_untrained_adapter_is_called_so():
    words = " ".join(check(render(report_of(adapter_of(trained=False), make_questions(2, pairs=0)))).itertext())
    assert "It moves no visual token at all" in words
    assert "It changes 0 of the 2 answers" in words


def test_questions_without_images_are_counted(adapter):
    text_only = Question([{"role": "user", "content": [{"type": "text", "text": "hello?"}]}], [])
    made = report_of(adapter, [text_only, *make_questions(2, pairs=0)])
    assert [example.number for example in made.examples] == [2, 3]
    assert "2 with an image; 1 without one were left out" in " ".join(parsed(render(made)).itertext())


def test_long_answers_are_encoded(adapter):
    asked = [Question.about(tiny.picture(n), "and then?", answer=f"a long story of {n} birds") for n in range(52)]
    made = report_of(adapter, [*asked, *asked[:5]], show=1)
    assert made.information.gain.before.samples == 52
    assert made.information.labels is None and made.information.gain.before.estimator == "ksg"
    assert "the mean embedding of its tokens" in " ".join(parsed(render(made)).itertext())


def test_the_model_is_left_as_it_was():
    adapter = adapter_of()
    adapter.model.model.language_model.train()
    before = {name: module.training for name, module in adapter.model.named_modules()}
    weights = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    report_of(adapter, make_questions(2, pairs=0))
    assert before == {name: module.training for name, module in adapter.model.named_modules()}
    assert all(torch.equal(value, weights[name]) for name, value in adapter.model.state_dict().items())


@pytest.mark.parametrize(
    "name", budget(["llava_next", "qwen2_5_vl"], ["llava_next", "qwen2_5_vl", "internvl", "idefics3", "gemma3"])
)
def test_other_families(name):
    entry = ZOO[name]
    model, processor = entry.model(), entry.processor()
    adapter = patch_model(model, processor=processor)
    tiny.train_randomly(adapter.alignment)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    asked = [Question.about(image, "how many dogs?"), Question.about(image, "is there a cat?")]
    made = make_report(adapter, processor, asked, max_new_tokens=2)
    check(render(made))
    assert isinstance(made, Report) and len(made.twins) == 1
    for view in made.examples[0].views:
        assert view.picture is not None, "where the map lies is known"


# ---------------------------------------------------------------------------------------------- its parts


def entries_of(asked):
    return [entry_of(one, place) for place, one in enumerate(asked)]


def test_which_questions_are_shown():
    entries = entries_of(make_questions(20, pairs=0))
    chosen = choose(entries, 6)
    assert Counter(entry.attribute for entry in chosen) == {"colour": 3, "count": 3}
    assert len({entry.images for entry in chosen}) == 6
    assert [entry.place for entry in chosen] == sorted(entry.place for entry in chosen)
    assert choose(entries, 20) == entries and len(choose(entries, 1)) == 1
    alike = [replace(entry, attribute=None) for entry in entries]
    assert [entry.place for entry in choose(alike, 3)] == [0, 10, 19]
    # One attribute has too few: the others fill up.
    rare = [replace(entry, attribute="rare" if not entry.place else "often") for entry in entries]
    assert Counter(entry.attribute for entry in choose(rare, 5)) == {"rare": 1, "often": 4}


def test_twins_and_pairs():
    asked = make_questions(8, pairs=1)
    found = find_twins(entries_of(asked), 9)
    assert [(one.place, other.place) for one, other in found] == [(2, 3), (4, 5), (6, 7)]
    assert len(find_twins(entries_of(asked), 1)) == 1
    same = [Question.about(tiny.picture(0), "what?"), Question.about(tiny.picture(0), "what?")]
    assert find_twins(entries_of(same), 9) == []
    pairs, odd = find_pairs(entries_of(asked))
    assert ([(one.place, other.place) for one, other in pairs], odd) == ([(0, 1)], 0)
    assert find_pairs(entries_of([Question.about(tiny.picture(0), "what?", pair="a")])) == ([], 1)


@pytest.mark.parametrize(("one", "other"), [("Two.", "two"), (" a\n b ", "A b"), ("No", "no.")])
def test_answers_are_compared_leniently(one, other):
    assert normalised(one) == normalised(other)
    assert normalised("two dogs") != normalised("two")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1, 2], [3, 4]], "from 1 to 4, highest at the bottom right"),
        ([[9, 2, 1]] * 2, "highest at the top left"),
        ([[0, 0, 0], [0, 5, 0], [0, 0, 0]], "highest at the centre"),
        ([[1, 1], [1, 1]], "the same everywhere, 1"),
        ([[1, 1.0001], [1, 1]], "the same everywhere, 1"),
        ([[0, 0], [0, 3e-8]], "the same everywhere, 3e-08"),
        ([1, 2, 3], "from 1 to 3"),
        ([[np.nan, 1], [2, np.nan]], "highest at the bottom left"),
        ([[np.nan]], "not finite anywhere"),
    ],
)
def test_a_map_in_words(values, words):
    assert figures.place_of(values).endswith(words)


def test_pictures_are_what_the_encoder_sees():
    processor = tiny.processor()
    exact, wide = tiny.picture(0), tiny.picture(1).resize((56, 28), Image.Resampling.NEAREST)
    inputs = processor(images=[exact, wide], text=["<image>", "<image>"], return_tensors="pt")
    same, resized = pictures.encoded_pictures(inputs, processor)
    assert np.array_equal(np.asarray(same), np.asarray(exact))
    want = np.asarray(wide.resize(resized.size, Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(resized, dtype=float) - want).max() <= 2
    assert pictures.encoded_pictures({"pixel_values": torch.zeros(4, 12)}, processor) == []


def test_data_uris():
    import base64
    import io

    def opened(image):
        return Image.open(io.BytesIO(base64.b64decode(pictures.data_uri(image).partition(",")[2])))

    assert np.array_equal(np.asarray(opened(tiny.picture(0))), np.asarray(tiny.picture(0)))
    large = Image.new("RGBA", (2000, 1000), (200, 100, 50, 255))
    small = opened(large)
    assert (small.format, small.size) == ("JPEG", (640, 320))
    assert abs(np.asarray(small).mean((0, 1)) - (200, 100, 50)).max() < 3
    assert opened(Image.new("L", (3000, 1))).size == (640, 1)


def test_a_question_has_words():
    asked = Question.about(tiny.picture(0), " how many? ")
    assert asked.text == "how many?"
    assert questions.entry_of(Question(asked.messages, []), 0) is None
