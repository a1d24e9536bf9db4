"""The scenes data set: specs, pictures, captions, questions and splits."""

import collections
import dataclasses
import hashlib
import itertools
import json
import re

import numpy as np
import pytest

from jaxpeft import tasks
from jaxpeft.data import Split, scenes
from jaxpeft.data.scenes import COLORS, HELD_PAIRS, SHAPES, SIZES, Scene, Thing, texts, world

PLAIN = {synonym: word for word, synonym in texts.SYNONYMS.items()}
PICTURED = scenes.SPLITS


def plain(sentence):
    """The words of a sentence with synonyms undone."""
    return [PLAIN.get(word, word) for word in sentence.split()]


def parse_thing(words):
    """(size or None, colour, shape) of ['large', 'red', 'circle'] or ['red', 'circle']; raises on anything else."""
    size = words[0] if words[0] in SIZES else None
    color, shape = words[1:] if size else words
    assert color in COLORS and shape in SHAPES, words
    return size, color, shape


def named_pairs(sentence):
    words = plain(sentence)
    return {(b, a) for a, b in itertools.pairwise(words) if a in COLORS and b in SHAPES}


# ---------------------------------------------------------------- specs


def digest(split, size, seed=0):
    """SHA-256 (hex) of the specs and texts of the first `size` items; independent of how Pillow draws them."""
    total = hashlib.sha256()
    for index in range(size):
        spec = [dataclasses.astuple(thing) for thing in scenes.scene(split, index, seed).objects]
        total.update(json.dumps([spec, scenes.record(split, index, seed)], sort_keys=True).encode())
    return total.hexdigest()


def test_content_is_pinned():
    # Specs and text only, so that this holds under any pillow. A change here means: every result made before is void.
    assert {split: digest(split, 40)[:16] for split in PICTURED} == {
        "pretrain": "f7fb536cddeb701a",
        "train": "e39c2667345fa8c8",
        "val": "638227dc83145024",
        "test": "14b21b28965201dc",
        "test_comp": "6a8182cf9f889836",
    }
    assert scenes.text(0, 3) == "the small green heart is in the bottom right"
    assert digest("train", 40, seed=1) != digest("train", 40, seed=0)


def test_an_item_depends_on_nothing_but_its_index():
    backwards = [scenes.record("train", index) for index in reversed(range(30))]
    assert backwards[::-1] == list(scenes.load({"n_train": 30}, ["train"])["train"].rows)
    assert backwards[:-11:-1] == list(scenes.load({"n_train": 10}, ["train"])["train"].rows)
    one, again = (scenes.render(scenes.scene("val", 7)) for _ in range(2))
    np.testing.assert_array_equal(one, again)


def test_every_item_and_purpose_has_its_own_stream():
    keys = itertools.product(world.SPLIT_IDS, (0, 1, 2**48 - 1), (0, 1, 2**64 - 1), world.STREAM_IDS)
    first = [world.stream(*key).random() for key in keys]
    assert len(set(first)) == len(first) == 7 * 3 * 3 * 8


def test_splits_share_no_scene():
    specs = [scenes.scene(split, index).objects for split in world.SPLIT_IDS for index in range(1500)]
    assert len(set(specs)) == len(specs)


def test_things_are_apart_inside_and_in_one_quadrant():
    for index in range(2000):
        things = scenes.scene("train", index).objects
        for thing in things:
            assert min(abs(thing.x - 32), abs(thing.y - 32)) >= 4
            reach = world.REACH * thing.radius
            assert reach <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 64 - reach
            assert thing.quadrant == f"{'top' if thing.y < 32 else 'bottom'} {'left' if thing.x < 32 else 'right'}"
        for a, b in itertools.combinations(things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > world.REACH * (a.radius + b.radius)


def test_fallback_layout_fits_four_large_things():
    rng = world.stream("train", 0, 0, "objects")
    centres = world._centres(rng, [SIZES["large"]] * 4, tries=0)
    assert sorted(centres) == [(18.0, 18.0), (18.0, 46.0), (46.0, 18.0), (46.0, 46.0)]
    assert 46 - 18 > 2 * world.REACH * SIZES["large"]


def test_composition_of_scenes():
    drawn = [scenes.scene("train", index).objects for index in range(4000)]
    shares = np.bincount([len(things) for things in drawn], minlength=5) / len(drawn)
    np.testing.assert_allclose(shares, [0, 0.15, 0.3, 0.3, 0.25], atol=0.025)
    several = [things for things in drawn if len(things) > 1]
    repeats = np.mean(
        [
            len({t.color for t in things}) < len(things) or len({t.shape for t in things}) < len(things)
            for things in several
        ]
    )
    copies = np.mean([len({t.pair for t in things}) < len(things) for things in several])
    assert repeats > 0.6 and 0.05 < copies < 0.25
    seen = collections.Counter(thing.pair for things in drawn for thing in things)
    assert len(seen) == 64 - len(HELD_PAIRS) and min(seen.values()) > 100


@pytest.mark.slow
def test_held_pairs_are_a_permutation_and_stay_out_of_everything_but_test_comp():
    assert {shape for shape, _ in HELD_PAIRS} == set(SHAPES) and {color for _, color in HELD_PAIRS} == set(COLORS)
    for split in world.SPLIT_IDS:
        shown = [{thing.pair for thing in scenes.scene(split, index).objects} & HELD_PAIRS for index in range(1500)]
        assert all(shown) if split == "test_comp" else not any(shown), split
    told = [scenes.text(0, index) for index in range(5000)]
    for split in ("pretrain", "train", "val", "test"):
        for index in range(500):
            told += scenes.web_captions(split, index) + scenes.human_captions(split, index)
            told += [asked["question"] for asked in scenes.questions(split, index)]
    assert sum(len(named_pairs(sentence)) for sentence in told) > 10000
    assert not any(named_pairs(sentence) & HELD_PAIRS for sentence in told)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'trian'.*train"):
        scenes.scene("trian", 0)
    with pytest.raises(ValueError, match="-1"):
        scenes.scene("train", -1)


# ---------------------------------------------------------------- pictures


def test_pixels_show_the_spec():
    for index in range(150):
        spec = scenes.scene("test_comp", index)
        image_YXC = scenes.render(spec).astype(int)
        assert image_YXC.shape == (64, 64, 3)
        for thing in spec.objects:
            aside = {"moon": -0.65, "ring": -0.8}.get(thing.shape, 0) * thing.radius  # their middle may show the ground
            pixel = image_YXC[int(thing.y), int(thing.x + aside)]
            wanted = np.minimum(np.array(COLORS[thing.color]) * thing.shade, 255)
            assert np.abs(pixel - wanted).max() <= 8, (index, thing, pixel)
            if thing.shape == "ring":
                assert np.ptp(image_YXC[int(thing.y), int(thing.x)]) < 40  # grey


def test_nothing_is_clipped_or_drawn_outside_its_reach():
    for shape, size in itertools.product(SHAPES, SIZES):
        at = world.REACH * SIZES[size] + 0.5
        thing = Thing(shape, "red", size, at, at, 12.0, 1.0)
        with_YXC, without_YXC = (scenes.render(Scene("train", 0, 0, things)).astype(int) for things in ((thing,), ()))
        y, x = np.nonzero(np.abs(with_YXC - without_YXC).max(-1))
        assert np.hypot(y + 0.5 - at, x + 0.5 - at).max() <= world.REACH * SIZES[size] + 1
        width = 0.75 if shape == "moon" else 0.85
        assert np.ptp(x) + 1 >= 2 * width * SIZES[size] and np.ptp(y) + 1 >= 1.5 * SIZES[size]


def test_shapes_and_colors_are_told_apart():
    masks = {}
    for shape in SHAPES:
        drawn_YXC = scenes.render(Scene("train", 0, 0, (Thing(shape, "red", "small", 18.0, 18.0, 0.0, 1.0),))).astype(
            int
        )
        masks[shape] = drawn_YXC[..., 0] - drawn_YXC[..., 1] > 90
    for a, b in itertools.combinations(SHAPES, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.85, (a, b, overlap)
    for a, b in itertools.combinations(COLORS.values(), 2):
        for shade_a, shade_b in itertools.product((0.84, 1.0), repeat=2):
            assert np.linalg.norm(np.array(a) * shade_a - np.array(b) * shade_b) > 85


# ---------------------------------------------------------------- captions


def parse_human(caption, things):
    """What a human caption says: [(size or None, colour, shape, quadrant)]; asserts that its count is right."""
    words = plain(caption)
    number = texts.NUMBERS[len(things)]
    opening = re.match(r"(there (is|are) )?(the picture shows )?(\w+)( shapes?)? (a )?", " ".join(words))
    assert opening[4] == number, caption
    assert (opening[5] or " shape").endswith("s") == (len(things) > 1)
    listing = " ".join(words)[opening.end() :].split(" and a ")
    said = []
    for phrase in listing:
        thing, quadrant = re.fullmatch(r"(.+) (?:at|in) the (\w+ \w+)", phrase).groups()
        said.append((*parse_thing(thing.split()), quadrant))
    return said


def test_human_captions_say_everything_and_nothing_wrong():
    sized, longest = [], 0
    for index in range(1000):
        things = scenes.scene("train", index).objects
        captions = scenes.human_captions("train", index)
        assert len(captions) == 5
        for caption in captions:
            said = parse_human(caption, things)
            with_size = said[0][0] is not None
            truth = [(thing.size if with_size else None, thing.color, thing.shape, thing.quadrant) for thing in things]
            assert collections.Counter(said) == collections.Counter(truth), caption
            sized.append(with_size)
            longest = max(longest, len(caption.split()))
    assert 0.75 < np.mean(sized) < 0.85
    assert longest == 40


def test_clean_captions_name_every_thing_of_the_right_scene_in_the_words_of_web_captions():
    synonyms = {synonym: word for word, synonym in scenes.texts.SYNONYMS.items()}
    for index in range(300):
        things = sorted(thing.pair for thing in scenes.scene("train", index).objects)
        for caption in scenes.clean_captions("train", index):
            words = [synonyms.get(word, word) for word in caption.split()]
            named = [
                (b, a) for a, b in zip(words, words[1:], strict=False) if a in scenes.COLORS and b in scenes.SHAPES
            ]
            assert sorted(named) == things and words[:2] != ["a", "picture"]


def test_noisy_questions_are_of_another_scene_as_often_as_web_captions():
    others = [
        scenes.noisy_questions("pretrain", i) != scenes.questions("pretrain", i)
        and scenes.noisy_questions("pretrain", i) == scenes.questions("swap", i)
        for i in range(1000)
    ]
    assert abs(np.mean(others) - scenes.texts.SWAPPED) < 0.025


def test_texts_limits_what_is_kept_of_each_training_image():
    data = scenes.load(
        {"n_train": 20, "n_test": 4, "texts": 2, "captions": "clean", "types": ("color", "shape")}, ["train", "test"]
    )
    assert all(len(row["captions"]) == 2 and len(row["questions"]) <= 2 for row in data["train"].rows)
    assert {q["type"] for row in data["train"].rows for q in row["questions"]} == {"color", "shape"}
    assert all(len(row["captions"]) == 5 for row in data["test"].rows)
    assert data["train"].rows[3]["captions"] == scenes.clean_captions("train", 3)[:2]


def test_web_captions_list_things_and_sometimes_the_wrong_scene():
    swapped, located, left_first, dropped, total = [], [], [], 0, 0
    for index in range(2000):
        things = scenes.scene("pretrain", index).objects
        for caption in scenes.web_captions("pretrain", index):
            words = plain(caption)
            assert words[:3] == ["a", "picture", "of"] and len(words) <= 24
            phrases = [
                re.fullmatch(r"(.+?)(?: (?:on|at) the (left|right|top|bottom))?", phrase).groups()
                for phrase in " ".join(words[3:]).split(" and ")
            ]
            said = [parse_thing(phrase.split()[1:]) for phrase, _ in phrases]
            truth = [(thing.size if said[0][0] else None, thing.color, thing.shape) for thing in things]
            right = not collections.Counter(said) - collections.Counter(truth)
            swapped.append(not right)
            sides = [side for _, side in phrases]
            located.append(any(sides))
            if located[-1]:  # the first two things, and no others
                assert all(sides[:2]) and not any(sides[2:]) and not said[0][0]
            if right:
                dropped, total = dropped + len(things) - len(said), total + len(things)
                for (_, color, shape), side in zip(said, sides, strict=True):
                    assert not side or any(t.pair == (shape, color) and side in t.quadrant for t in things)
                if len(things) == len(said) == 2:
                    one, other = sorted(things, key=lambda t: t.x)
                    if one.radius < other.radius:  # is the left one named first, or the largest?
                        left_first.append(said[0][1:] == (one.color, one.shape))
    assert 0.06 < np.mean(swapped) < 0.10
    assert 0.47 < np.mean(located) < 0.53
    assert 0.42 < np.mean(left_first) < 0.58  # .4 from the left, and half of the .2 in no order
    assert 0.08 < dropped / total < 0.12  # a bit under or over .1: never all of them; a right-looking swap


# ---------------------------------------------------------------- questions


def answer_from_scene(question, things):
    """An answerer of its own, from the words of the question; it asserts that what the question points at is unique."""

    def matching(words):
        keep = [word for word in words if word not in ("shape", "shapes", "one", "anything")]
        singular = {plural: shape for shape, plural in texts.PLURALS.items()}
        keep = [singular.get(word, word) for word in keep]
        assert all(word in (*COLORS, *SHAPES, *SIZES) for word in keep), question
        return [thing for thing in things if set(keep) <= {thing.color, thing.shape, thing.size}]

    def only(found):
        assert len(found) == 1, question
        return found[0]

    def yes(value):
        return "yes" if value else "no"

    def at(place):
        return only([thing for thing in things if thing.quadrant == place])

    rules = {
        r"is there (?:a )?(.+)": lambda a: yes(matching(a.split())),
        r"how many (.+) are there": lambda a: texts.NUMBERS[len(matching(a.split()))],
        r"what color is the shape at the (.+)": lambda a: at(a).color,
        r"what color is the (.+)": lambda a: only(matching(a.split())).color,
        r"what is at the (.+)": lambda a: at(a).shape,
        r"what shape is the (.+)": lambda a: only(matching(a.split())).shape,
        r"is the (.+) on the left or on the right": lambda a: only(matching(a.split())).quadrant.split()[1],
        r"is the (.+) at the top or at the bottom": lambda a: only(matching(a.split())).quadrant.split()[0],
        r"are there more (.+) than (.+)": lambda a, b: yes(len(matching(a.split())) > len(matching(b.split()))),
        r"is the (.+) larger than the (.+)": lambda a, b: yes(
            only(matching(a.split())).radius > only(matching(b.split())).radius
        ),
    }
    for pattern, rule in rules.items():
        found = re.fullmatch(pattern, question)
        if found:
            return rule(*found.groups())
    raise AssertionError(f"no rule for {question!r}")


@pytest.mark.parametrize("split", ["train", "test_comp"])
def test_every_answer_follows_from_the_scene(split):
    kinds = collections.Counter()
    for index in range(1000):
        things, asked = scenes.scene(split, index).objects, scenes.questions(split, index)
        assert len({one["question"] for one in asked}) == 6
        for k, one in enumerate(asked):
            assert one["question_id"] == f"scenes-{split}-{index}-{k}"
            assert one["answers"] == [answer_from_scene(one["question"], things)] * 10, (one, things)
            assert one["answers"][0] in scenes.ANSWERS
            kinds[one["type"]] += 1
    assert set(kinds) == set(scenes.TYPES) and min(kinds.values()) > 900


@pytest.mark.slow
def test_answers_cannot_be_guessed_without_the_picture():
    vqa = tasks.build("vqa")
    train = [{"questions": scenes.questions("train", index)} for index in range(8000)]
    asked = [q for index in range(2000) for q in scenes.questions("test", index)]
    found = [vqa.score(asked, texts) for texts in vqa.guesses(Split("train", [], train), asked).values()]
    assert max(one["accuracy"] for one in found) < 0.4
    limits = {"exist": 0.55, "compare": 0.55, "position": 0.55, "count": 0.4, "color": 0.2, "shape": 0.2}
    assert all(one["by_type"].keys() == limits.keys() for one in found)
    best = {kind: max(one["by_type"][kind]["accuracy"] for one in found) for kind in limits}
    assert {kind: share for kind, share in best.items() if share >= limits[kind]} == {}


def test_held_out_does_not_mean_yes():
    answers = [
        one["answers"][0]
        for index in range(4000)
        for one in scenes.questions("test_comp", index)
        if one["type"] == "exist" and named_pairs(one["question"]) & HELD_PAIRS
    ]
    assert len(answers) > 500 and 0.4 < np.mean([answer == "yes" for answer in answers]) < 0.6


# ---------------------------------------------------------------- words


def test_words_are_exactly_those_that_occur():
    corpus = {word for index in range(6000) for word in scenes.text(0, index).split()}
    assert corpus == set(scenes.WORDS)  # the text-only corpus alone teaches every word
    assert set(scenes.ANSWERS) <= set(scenes.WORDS) and list(scenes.WORDS) == sorted(set(scenes.WORDS))
    told = [scenes.web_captions("pretrain", index) for index in range(1000)]
    for index in range(1000):
        told.append(scenes.human_captions("train", index))
        told.append([one["question"] for one in scenes.questions("test_comp", index)])
    assert {word for group in told for sentence in group for word in sentence.split()} <= set(scenes.WORDS)


def test_text_corpus_holds_no_human_caption():
    corpus = [scenes.text(0, index) for index in range(5000)]
    starts = r"there (is one|are \w+) shape|(one|two|three|four) |the picture shows"
    assert all(re.match(starts, caption) for caption in scenes.human_captions("train", 0, n=50))
    assert not any(re.match(starts, line) for line in corpus)
    assert len(set(corpus)) > 2500


# ---------------------------------------------------------------- splits


def test_load_gives_lazy_pictures_and_rows():
    config = {"n_train": 12, "n_val": 3, "n_test": 5, "n_pretrain": 4, "seed": 3}
    data = scenes.load(config, PICTURED)
    assert {name: (len(split.images), len(split.rows)) for name, split in data.items()} == {
        "pretrain": (4, 4),
        "train": (12, 12),
        "val": (3, 3),
        "test": (5, 5),
        "test_comp": (5, 5),
    }
    image_YXC = data["train"].images[11]
    np.testing.assert_array_equal(image_YXC, scenes.render(scenes.scene("train", 11, seed=3)))
    assert image_YXC is data["train"].images[-1] and not image_YXC.flags.writeable
    assert data["train"].rows[11] == scenes.record("train", 11, seed=3)
    assert data["pretrain"].rows[0] == {
        "image_id": "scenes-pretrain-0",
        "questions": [],
        "captions": scenes.web_captions("pretrain", 0, 2, seed=3),
    }
    uncached = scenes.load({"n_train": 2, "seed": 3, "cache": False}, ["train"])["train"].images
    assert uncached[0] is not uncached[0] and len(list(uncached)) == 2
    with pytest.raises(IndexError):
        uncached[2]
    with pytest.raises(ValueError, match="n_val"):
        scenes.load({"n_train": 2}, ["val"])
    with pytest.raises(ValueError, match="'valid'.*val"):
        scenes.load({"n_train": 2}, ["valid"])


def test_rows_are_drawn_when_they_are_read(monkeypatch):
    """A study checks its data and takes its subsets without drawing the rows that it does not use."""
    drawn = []
    monkeypatch.setattr(scenes, "record", lambda split, i, seed: drawn.append(i) or texts.record(split, i, seed))
    rows = scenes.load({"n_train": 100_000, "seed": 77}, ["train"])["train"].rows
    assert len(rows) == 100_000 and not drawn
    some = rows[90_000:90_003]
    assert [row["image_id"] for row in some] == [f"scenes-train-{i}" for i in (90_000, 90_001, 90_002)]
    assert rows[-1] == rows[99_999] == texts.record("train", 99_999, 77) and rows[90_001] == some[1]
    assert drawn == [90_000, 90_001, 90_002, 99_999]
    with pytest.raises(IndexError):
        rows[100_000]


def test_what_a_caller_does_to_rows_does_not_reach_the_next_one():
    rows = scenes.load({"n_train": 3}, ["train"])["train"].rows
    rows[0]["captions"][0] += " indeed"
    rows[0]["questions"][0]["question"] = "is there a zebra"
    again = scenes.load({"n_train": 3}, ["train"])["train"].rows
    assert "indeed" not in again[0]["captions"][0] and "zebra" not in again[0]["questions"][0]["question"]
