"""Inputs of PaliGemma and SmolVLM equal transformers' processors: committed ids and pixels (golden/make_vlm_inputs.py) and,
where it is installed, live."""

import json
import pathlib
import pickle
import shutil
import types

import jax
import numpy as np
import pytest
from golden import make_vlm_inputs as make

from jaxpeft.data import pipeline
from jaxpeft.inputs import images
from jaxpeft.inputs.bpe import Bpe
from jaxpeft.inputs.processor import Processor
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models import paligemma_text, smolvlm_text, vit

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDER = GOLDEN / "vlm_inputs"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
PIXELS = np.load(GOLDEN / "vlm_inputs.npz")
KINDS = {"paligemma": (paligemma_text, images.SIGLIP), "smolvlm": (smolvlm_text, images.SMOLVLM)}
both = pytest.mark.parametrize("kind", KINDS)


TEXTS = make.QUESTIONS + make.TARGETS
PAIRS = [(text, make.TARGETS[0]) for text in make.QUESTIONS] + [(make.QUESTIONS[0], text) for text in make.TARGETS]
TOKENIZERS = {kind: Bpe.from_file(FOLDER / kind) for kind in KINDS}


def template(kind, task, **options):
    return KINDS[kind][0].TEMPLATES[task](TOKENIZERS[kind], **options)


def whole(kind, one, prompt):
    """A prompt as transformers has it, with placeholders for the image."""
    image = one.tokenizer.id_of("<image>")
    at = 0 if kind == "paligemma" else prompt.index(image)  # PaliGemma's prompts have none
    return [*prompt[:at], *[image] * make.N_IMAGE[kind], *prompt[at + (kind == "smolvlm") :]]


def check(kind, one, question, target, expected):
    prompt, cut = one.prompt(question)
    assert whole(kind, one, prompt) == expected["prompt"] and not cut
    ids, cut = one.target(target)
    assert not cut and one.start == ()
    if kind == "paligemma":
        assert ids == expected["target"]
    else:
        newline = TOKENIZERS[kind].pieces("\n")  # transformers writes one more behind each turn
        assert expected["prompt"] + ids + newline == expected["whole"]


# ---------------------------------------------------------------- texts


@both
def test_ids_and_texts_equal_golden(kind):
    ours, expected = TOKENIZERS[kind], EXPECTED[kind]
    assert [ours.pieces(text) for text in TEXTS] == expected["ids"]
    assert [ours.decode(ids) for ids in expected["ids"]] == expected["decoded"]
    assert [ours.decode(ids) for ids in expected["random"]] == expected["random_decoded"]


@both
def test_prompts_and_targets_equal_golden(kind):
    one = template(kind, "vqa")
    for (question, target), expected in zip(PAIRS, EXPECTED[kind]["vqa"], strict=True):
        check(kind, one, question, target, expected)
    one = template(kind, "captioning")
    for target, expected in zip(make.TARGETS, EXPECTED[kind]["captioning"], strict=True):
        check(kind, one, "", target, expected)


@both
def test_golden_covers_what_is_difficult(kind):
    """Pieces cross the borders of a prompt's parts in PaliGemma's toy, and its merges spell <eos>."""
    ours, one = TOKENIZERS[kind], template(kind, "vqa")
    apart = [
        [*one.before, *ours.pieces(one.around[0]), *ours.pieces(one.clean_question(q)), *ours.pieces(one.around[1]), *one.after]
        for q in make.QUESTIONS
    ]  # fmt: skip
    joined = [one.prompt(q)[0] for q in make.QUESTIONS]
    assert (apart != joined) == (kind == "paligemma")
    spelled = "<eos>" if kind == "paligemma" else "<end_of_utterance>"
    as_it_is = ours.library.encode(spelled, add_special_tokens=False).ids
    assert (as_it_is == [ours.eos_id]) == (kind == "paligemma")


@both
def test_special_tokens_in_a_users_text_stay_text(kind):
    ours, one = TOKENIZERS[kind], template(kind, "vqa")
    never = set(ours.special.values())
    for text in (
        *ours.special,
        "<image>",
        "<end_of_utterance>",
        "is <image> an <end_of_utterance>?<eos>",
        " <eos><eos> <pad>",
    ):
        ids = ours.pieces(text)
        assert not never & set(ids) and ours.decode(ids) == text, text
        framed, plain = one.prompt(text)[0], one.prompt("")[0]
        assert sorted(i for i in framed if i in never) == sorted(i for i in plain if i in never)
        assert one.target(text)[0][:-1] == ours.pieces(one.lead + text)
    if kind == "paligemma":  # added, but not special: a place in the image, as in transformers
        assert (
            ours.pieces("a<loc0001>")[-1] == ours.id_of("<loc0001>")
            and ours.decode(ours.pieces("<loc0001>")) == "<loc0001>"
        )


@both
def test_a_limit_cuts_the_question_and_nothing_else(kind):
    one, question = template(kind, "vqa"), "what is the color of the dog in front of the table? " * 8
    full, least = one.prompt(question)[0], one.prompt("a")[0]
    assert one.prompt(question, len(full)) == (full, 0)
    ids, cut = one.prompt(question, len(least) + 6)
    assert len(ids) == len(least) + 6 and cut >= len(full) - len(ids) - 6
    written = TOKENIZERS[kind].decode(ids)
    first, last = ("answer en what is", "\n") if kind == "paligemma" else ("User:what is", "\nAssistant:")
    assert written.startswith(first) and written.endswith(last) and question not in written
    assert ids.count(one.pad) == 0
    end = one.stop[0]
    assert one.target(question)[0][-1] == end and end not in one.target(question, 7)[0]


@both
def test_generated_ids_are_read_up_to_the_first_end_token_or_padding(kind):
    one, ours = template(kind, "vqa"), TOKENIZERS[kind]
    cat, dog = ours.pieces(" a cat"), ours.pieces(" dog")
    assert one.text([*cat, one.stop[0], *dog]) == one.text([*cat, one.pad, *dog]) == "a cat"
    assert one.text(np.array([*cat, *dog])) == "a cat dog" and one.text([]) == ""
    with pytest.raises(ValueError, match=f"id {len(ours)} is not in the vocabulary; ids are 0 to {len(ours) - 1}"):
        one.text([len(ours)])


def test_templates_take_the_options_of_tasks():
    one = template("paligemma", "captioning", prompt="caption de", max_words=2)
    assert one.tokenizer.decode(one.prompt("")[0]) == "caption de\n"
    assert one.text(one.target("a  red dog")[0]) == "a" and one.text(one.target("a red dog")[0]) == "a red"
    one = template("smolvlm", "captioning", prompt="Describe.", max_words=2)
    assert "Describe." in one.tokenizer.decode(one.prompt("")[0]) and one.text(one.target("a red dog")[0]) == "a red"
    image = {kind: TOKENIZERS[kind].id_of("<image>") for kind in KINDS}
    assert one.tokenizer.decode(one.prompt("")[0][: one.before.index(image["smolvlm"])]) == "User:"
    made = {
        kind: Processor(TOKENIZERS[kind], 32, templates={"vqa": lambda kind=kind: template(kind, "vqa")})
        for kind in KINDS
    }
    found = {kind: one.template("vqa").before.count(image[kind]) for kind, one in made.items()}
    assert found == {"paligemma": 0, "smolvlm": 1}


def test_padding_that_a_prompt_contains_is_refused(tmp_path):
    copy(tmp_path, "smolvlm", tokenizer_config={"bos_token": "<|im_start|>", "pad_token": "<end_of_utterance>"})
    with pytest.raises(ValueError, match="padding token '<end_of_utterance>' is part of every prompt"):
        smolvlm_text.vqa(Bpe.from_file(tmp_path))


# ---------------------------------------------------------------- the tokenizer as a value


def copy(folder, kind, **changed):
    """A directory of a golden tokenizer with other files; None deletes one."""
    shutil.copytree(FOLDER / kind, folder, dirs_exist_ok=True)
    for name, value in changed.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(value), encoding="utf-8") if value is not None else path.unlink()
    return folder


def spec(kind, **changed):
    """A golden tokenizer.json with other values; 'model.dropout' is written as model__dropout."""
    found = json.loads((FOLDER / kind / "tokenizer.json").read_text())
    for name, value in changed.items():
        *outer, last = name.split("__")
        (found[outer[0]] if outer else found)[last] = value
    return found


@both
def test_tokenizers_are_values(kind, tmp_path):
    ours, other = TOKENIZERS[kind], TOKENIZERS["smolvlm" if kind == "paligemma" else "paligemma"]
    same = Bpe.from_file(FOLDER / kind / "tokenizer.json")
    back = pickle.loads(pickle.dumps(ours))
    assert ours == same == back and hash(ours) == hash(same) == hash(back) and ours is not same and ours != other
    assert len(ours.digest) == 64 and ours != Tokenizer.from_words(["a"])
    assert back.pieces("a <image> dog") == ours.pieces("a <image> dog")
    for name, content in ours.files().items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    again = Bpe.from_file(tmp_path)
    assert again == ours and again.files() == ours.files()
    renamed = Bpe.from_file(copy(tmp_path / "x", kind, tokenizer_config={"pad_token": "<image>"}))
    assert renamed != ours and renamed.pad_id == ours.id_of("<image>")


@both
def test_what_tasks_and_loading_ask_of_a_tokenizer(kind):
    ours = TOKENIZERS[kind]
    assert ours.has_pieces and all(ours.covers(text) and ours.unknown_words(text) == [] for text in TEXTS)
    assert ours.words("a  red\ndog") == ["a", "red", "dog"]
    assert len(ours) == len(ours.ids) == 1 + max(ours.ids.values())
    assert ours.extended([]) == (ours, ())
    with pytest.raises(ValueError, match="'zebra' cannot be added to a byte-pair tokenizer"):
        ours.extended(["zebra"])
    with pytest.raises(ValueError, match="no token '<nothing>'"):
        ours.id_of("<nothing>")
    with pytest.raises(ValueError, match="lone.* cannot be tokenised"):
        ours.pieces("lone \ud83d surrogate")


def test_special_ids_are_those_that_the_files_name(tmp_path):
    pali, smol = TOKENIZERS["paligemma"], TOKENIZERS["smolvlm"]
    assert (pali.pad_id, pali.eos_id, pali.bos_id) == (0, 1, 2)
    assert [smol.ids["<|im_start|>"], smol.ids["<end_of_utterance>"], smol.ids["<|im_end|>"]] == [
        smol.bos_id, smol.eos_id, smol.pad_id
    ]  # fmt: skip
    said = {"pad_token": {"content": "<image>"}, "eos_token": "<|endoftext|>"}
    folder = copy(tmp_path, "smolvlm", tokenizer_config={"eos_token": "<|im_end|>"}, special_tokens_map=said)
    found = Bpe.from_file(folder)  # tokenizer_config.json has the last word
    assert found.roles == {"pad_token": "<image>", "eos_token": "<|im_end|>"}
    with pytest.raises(ValueError, match="has no bos_token; name it in tokenizer_config.json"):
        found.bos_id  # noqa: B018


def test_a_vocabulary_without_some_bytes_says_what_it_cannot_write(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3}, "merges": [["a", "b"]]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": level, "decoder": level}))
    found = Bpe.from_file(tmp_path)
    assert found.covers("ab ba") and not found.covers("ab cab") and found.unknown_words("ab cab abc") == ["cab", "abc"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"tokenizer": {"model": {"type": "WordPiece", "vocab": {}}}}, "model.type is 'WordPiece'; expected 'BPE'"),
        ({"tokenizer": {"model": {"vocab": {}}}}, "model.type is 'WordPiece'"),
        ({"tokenizer": {}}, "tokenizer.json is not a valid tokenizer.json .KeyError"),
        ({"tokenizer": spec("smolvlm", model__dropout=0.1)}, "model.dropout is 0.1, which is unsupported"),
        ({"tokenizer": spec("smolvlm", model__end_of_word_suffix="</w>")}, "model.end_of_word_suffix is '</w>'"),
        ({"tokenizer": spec("smolvlm", normalizer={"type": "Lowercase"})}, "normalizer has a step 'Lowercase'; supported are"),
        ({"tokenizer": spec("smolvlm", pre_tokenizer={"type": "Metaspace"})}, "pre_tokenizer has a step 'Metaspace'"),
        ({"tokenizer": spec("smolvlm", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})}, "space is true"),
        ({"tokenizer": spec("smolvlm", pre_tokenizer=None)}, "pre_tokenizer is not ByteLevel; expected one of the two"),
        ({"tokenizer": spec("smolvlm", model__merges=[["zz", "qq"]])}, "tokenizer.json: tokenizer.json cannot be used"),
        ({"tokenizer_config": {"pad_token": "<none>"}}, "tokenizer_config.json: pad_token is '<none>', which"),
        ({"special_tokens_map": {"eos_token": "<none>"}}, "special_tokens_map.json: eos_token is '<none>'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "<image>"}}}}, "'<image>', whose id in token"),
        ({"tokenizer_config": {"added_tokens_decoder": {"900": {"content": "<new>"}}}}, r"decoder\[900\] is '<new>'"),
        ({"tokenizer_config": {"pad_token": 3}}, "tokenizer_config.json does not contain valid tokens"),
        ({"tokenizer": None}, "tokenizer.json is missing; copy the base's tokenizer there"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        Bpe.from_file(copy(tmp_path, "smolvlm", **changed))


# ---------------------------------------------------------------- images


def settings(kind):
    return images.processor_settings(FOLDER / kind, KINDS[kind][1])


def resized(kind, image_YXC):
    said = settings(kind)
    return images.resize(image_YXC, said["image_size"], said["image_resample"], said.get("image_longest_edge", 0))


def normalised(image_YXC, said):
    """The pixels as the image tower reads them."""
    return np.asarray(vit.normalised(image_YXC[None], types.SimpleNamespace(**said)))[0]


@both
def test_pixels_equal_golden(kind):
    levels, said = PIXELS[f"{kind}/levels"], settings(kind)
    every_YXC = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    np.testing.assert_array_equal(normalised(every_YXC, said)[0].T, levels)
    names = [name.removeprefix("png/") for name in PIXELS if name.startswith("png/")]
    assert len(names) == 15
    for name in names:
        source = images.decode(PIXELS[f"png/{name}"].tobytes())
        found = resized(kind, source).reshape(-1, 3).T
        np.testing.assert_array_equal(found, PIXELS[f"{kind}/{name}"], name)


@both
def test_a_compiled_model_normalises_the_same_levels(kind):
    """Images stay uint8 on the host; what the device makes of them is within one rounding of the processor's float32."""
    mean_C, std_C = (np.float32(settings(kind)[key])[None, None] for key in ("image_mean", "image_std"))
    every_YXC = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    found = jax.jit(lambda x: (x.astype(np.float32) / 255 - mean_C) / std_C)(every_YXC)
    assert np.abs(np.asarray(found)[0].T - PIXELS[f"{kind}/levels"]).max() <= 1.2e-7


def test_settings_are_those_of_the_files(tmp_path):
    half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    assert settings("paligemma") == half | {"image_size": 28, "image_resample": images.BICUBIC}
    assert settings("smolvlm") == half | {"image_size": 32, "image_resample": 1, "image_longest_edge": 96}
    published = json.loads((FOLDER / "smolvlm" / "preprocessor_config.json").read_text())
    published |= {
        "do_image_splitting": True,
        "video_sampling": {"fps": 1},
        "image_processor_type": "Idefics3ImageProcessor",
    }
    for key in ("image_mean", "image_std", "resample"):
        del published[key]  # the class default
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert images.processor_settings(tmp_path, images.SMOLVLM) == settings("smolvlm")
    whole = {"image_processor": published, "image_seq_len": 64, "processor_class": "SmolVLMProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    assert images.processor_settings(tmp_path, images.SMOLVLM) == settings("smolvlm")
    assert images.image_tokens(tmp_path) == 64 and images.image_tokens(FOLDER / "paligemma") == 4
    assert images.image_tokens(tmp_path.parent) is None
    with pytest.raises(ValueError, match="max_image_size, video_sampling is unsupported"):
        images.processor_settings(tmp_path)  # BLIP's


@pytest.mark.parametrize(
    "kind, changed, message",
    [
        ("smolvlm", {"size": {"height": 512, "width": 512}}, "size is .*; expected {'longest_edge': 1 to 4096}"),
        ("smolvlm", {"size": {"longest_edge": 5000}}, "size is {'longest_edge': 5000}"),
        ("smolvlm", {"max_image_size": {"longest_edge": True}}, "max_image_size is {'longest_edge': True}"),
        ("smolvlm", {"max_image_size": None}, "max_image_size is None"),
        ("smolvlm", {"do_resize": False}, "do_resize is False"),
        ("smolvlm", {"resample": 9}, "resample is 9; expected a Pillow filter"),
        ("smolvlm", {"image_std": [0, 1, 1]}, "image_std is"),
        ("paligemma", {"max_image_size": {"longest_edge": 32}}, "max_image_size is unsupported"),
        ("paligemma", {"size": {"height": 28, "width": 30}}, "expected equal height and width"),
        ("paligemma", {"size": {"longest_edge": 28}}, "expected equal height and width"),
    ],
)
def test_other_image_processors_are_refused(tmp_path, kind, changed, message):
    said = json.loads((FOLDER / kind / "preprocessor_config.json").read_text()) | changed
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        images.processor_settings(tmp_path, KINDS[kind][1])


def test_a_wrong_number_of_image_tokens_is_refused(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_seq_len": "64"}')
    with pytest.raises(ValueError, match="processor_config.json: the number of image tokens is '64'"):
        images.image_tokens(tmp_path)


def test_the_pipeline_resizes_twice():
    picture = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    source = pipeline.Resized([picture], 32, 1, longest_edge=96)
    once, twice = images.resize(picture, 32, 1), images.resize(picture, 32, 1, 96)
    for one in (source, pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal(one[0], twice)
    assert (once != twice).any()
    rng = np.random.default_rng
    crop = images.cropped(picture, rng(1), flip=False)
    np.testing.assert_array_equal(source.augmented(0, "crop", rng(1)), images.resize(crop, 32, 1, 96))


# ---------------------------------------------------------------- live


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers", reason="live comparison with the processors of PaliGemma and SmolVLM")
    pytest.importorskip("torch", reason="transformers' processors need it")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield {"paligemma": make.paligemma(extra=None), "smolvlm": make.idefics3()}


@both
@pytest.mark.filterwarnings("ignore")
def test_live_texts_equal_transformers(kind, theirs, tmp_path):
    """Tokenizers trained anew, all 1,152 of PaliGemma's tokens of places, and the files that transformers writes."""
    processor = theirs[kind]
    processor.save_pretrained(tmp_path)
    ours = Bpe.from_file(tmp_path)
    assert len(ours) == len(processor.tokenizer)
    assert images.processor_settings(tmp_path, KINDS[kind][1]) == settings(kind)
    assert kind == "paligemma" or images.image_tokens(tmp_path) == make.N_IMAGE[kind]
    rng = np.random.default_rng(5)
    characters = "ab the\n?<>1 \u00e9\u65e5\U0001f600eo\u2581s"
    texts = ["".join(rng.choice(list(characters), rng.integers(0, 40))) for _ in range(300)]
    their_ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ours.pieces(text) for text in texts] == their_ids
    assert [ours.decode(ids) for ids in their_ids] == [
        processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in their_ids
    ]
    one = KINDS[kind][0].vqa(ours)
    for question, target in PAIRS[::4]:
        prompt = one.prompt(question)[0]
        full = whole(kind, one, prompt)
        if kind == "paligemma":
            expected = make.paligemma_ids(processor, f"answer en {question}", target)
            assert (full, one.target(target)[0]) == (expected["prompt"], expected["target"])
        else:
            expected = make.smolvlm_ids(processor, question, target)
            assert full == expected["prompt"]
            assert full + one.target(target)[0] + ours.pieces("\n") == expected["whole"]


@pytest.mark.filterwarnings("ignore")
def test_live_texts_of_idefics3_equal_transformers(theirs, tmp_path):
    """With a tokenizer of Llama 3's kind, in which <global-img> is several pieces."""
    processor = make.idefics3_llama()
    processor.save_pretrained(tmp_path)
    ours = Bpe.from_file(tmp_path)
    assert "<global-img>" not in ours.ids and ours.bos_id == ours.id_of("<|begin_of_text|>")
    one, caption = smolvlm_text.vqa(ours), smolvlm_text.captioning(ours)
    for question, target in PAIRS[::2]:
        for chosen, asked in ((one, question), (caption, smolvlm_text.CAPTION)):
            full = whole("smolvlm", chosen, chosen.prompt(asked if chosen is one else "")[0])
            expected = make.smolvlm_ids(processor, asked, target)
            assert full == expected["prompt"]
            assert full + chosen.target(target)[0] + ours.pieces("\n") == expected["whole"]


@both
@pytest.mark.filterwarnings("ignore")
def test_live_pixels_equal_transformers(kind, theirs):
    from PIL import Image

    processor, said = theirs[kind].image_processor, settings(kind)
    rng = np.random.default_rng(6)
    pictures = [rng.integers(0, 256, (*rng.integers(1, 120, 2), 3), dtype=np.uint8) for _ in range(25)]
    pictures.append(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    for picture in pictures:
        expected = processor([[Image.fromarray(picture)]], return_tensors="np")["pixel_values"]
        found = normalised(resized(kind, picture), said)
        np.testing.assert_array_equal(np.asarray(expected).reshape(3, *found.shape[:2]), found.transpose(2, 0, 1))


@pytest.mark.filterwarnings("ignore")
def test_live_smolvlm_of_published_sizes_equals_transformers(theirs):
    from PIL import Image

    picture = np.random.default_rng(7).integers(0, 256, (333, 500, 3), dtype=np.uint8)
    processor = theirs["smolvlm"].image_processor
    sizes = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    expected = processor([[Image.fromarray(picture)]], return_tensors="np", **sizes)["pixel_values"][0, 0]
    half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    found = normalised(images.resize(picture, 512, 1, 2048), half)
    np.testing.assert_array_equal(np.asarray(expected), found.transpose(2, 0, 1))
