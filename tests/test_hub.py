"""Checkpoint directories in and out."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import jaxpeft as jp
from jaxpeft import interchange, tree
from jaxpeft.data import pipeline
from jaxpeft.models import loading
from jaxpeft.runtime import files as runtime_files


@pytest.fixture
def saved(tmp_path):
    return tiny.saved(tmp_path / "base", tiny.model(), 1, note="hello")


def test_round_trip_shares_what_the_aliases_say(saved):
    directory, params = saved
    model, loaded, report = loading.read(directory)
    assert model == tiny.model() and report["digest"]
    half = jax.tree.map(lambda x: np.float16(x).astype(np.float32), params)
    assert tree.digest(loaded) == tree.digest(half)
    from safetensors.numpy import load_file

    stored = load_file(directory / "model.safetensors")
    assert sum(x.size for x in stored.values()) < tree.count(params)
    assert not any(name.startswith("text_encoder/embed") for name in stored)


def test_a_leaf_that_is_stored_is_not_that_of_its_alias(saved):
    from safetensors.numpy import load_file, save_file

    path = saved[0] / "model.safetensors"
    stored = load_file(path)
    own = -stored["text_decoder/embed/word"]
    save_file(stored | {"text_encoder/embed/word": own}, path)
    embeddings = {
        name: one["embed"]["word"] for name, one in loading.load(saved[0], task="vqa")[1].items() if "embed" in one
    }
    np.testing.assert_array_equal(embeddings["text_encoder"], own)
    np.testing.assert_array_equal(embeddings["text_decoder"], -own)


def test_captioning_leaves_the_question_encoder_out(saved):
    model, params = loading.load(saved[0], task="captioning")
    assert not model.config.question_encoder and set(params) == {"vision", "text_decoder"}


def test_image_size_resizes_positions(saved):
    model, params = loading.load(saved[0], image_size=32)
    assert model.config.image_size == 32 and params["vision"]["position"].shape == (1 + 16, 12)


def test_alias_that_does_not_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text_encoder/embed/.* differs from that of text_decoder"):
        loading.save(tmp_path / "x", tiny.model(), tiny.params(), aliases=tiny.ALIASES)


def test_missing_and_extra_leaves_are_listed(saved):
    from safetensors.numpy import load_file, save_file

    file = saved[0] / "model.safetensors"
    leaves = load_file(file)
    leaves["vision/extra"] = leaves.pop("vision/norm/bias")
    save_file(leaves, file)
    with pytest.raises(ValueError, match=r"(?s)missing \(1\): vision/norm/bias.*unexpected \(1\): vision/extra"):
        loading.load(saved[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: loading.load("no/such/place"), "no checkpoint at 'no/such/place'.*shipped names: tiny"),
        (lambda: loading.load("tiny", batch=3), r"unknown model options \['batch'\]"),
        (lambda: loading.abstract("tiny", batch=3), r"unknown model options \['batch'\]"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_extended_vocabulary_keeps_old_rows_and_answers(saved):
    model, params = loading.load(saved[0])
    wider, more, new = loading.extend_vocabulary(model, params, ["zebra", "w3", "yak"], seed=0)
    assert new == ["zebra", "yak"] and wider.config.vocab_size == model.config.vocab_size + 2
    batch, n = tiny.batch(), model.config.vocab_size
    before = model.apply({"params": params}, batch)
    after = wider.apply({"params": more}, batch)
    np.testing.assert_allclose(after[..., :n], before, atol=1e-6)
    assert more["text_decoder"]["embed"]["new_word"].shape == (2, 12)
    assert 0 < float(jnp.std(more["text_decoder"]["embed"]["new_word"])) < 0.05
    whole, joined = loading.joined(wider, more)
    assert whole.config.new_words == 0 and joined["text_decoder"]["embed"]["word"].shape[0] == n + 2
    assert jnp.array_equal(whole.apply({"params": joined}, batch), after)
    same, same_params, none = loading.extend_vocabulary(model, params, ["w3"], seed=0)
    assert not none and same is model and same_params is params


def test_the_shipped_checkpoint_is_what_its_manifest_says():
    directory = loading.ASSETS / "tiny"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (directory / "model.safetensors").stat().st_size <= 8 << 20
    model, params, report = loading.read("tiny")
    from safetensors.numpy import load_file

    stored = {name: x.astype(np.float32) for name, x in load_file(directory / "model.safetensors").items()}
    assert tree.digest(stored) == manifest["digest"] == report["digest"]
    assert model.config.question_encoder and manifest["scores"]["web"]["n"] >= 500
    from jaxpeft.data import scenes

    assert all(word in model.tokenizer.ids for word in scenes.WORDS)
    assert "command" in manifest and manifest["total_s"] > 0


# ---------------------------------------------------------------- Hugging Face directories: tokenizer and processor


CAPTION = pathlib.Path(__file__).parent / "golden" / "blip_caption_tiny"
WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "[MASK]",
    *(f"w{i}" for i in range(90)),
    "[DEC]",
    "[ENC]",
]  # the ids of its config


def hf(path, words=tuple(WORDS), changes=None, **files):
    """A copy of the tiny captioning BLIP with a vocabulary and other files by name; `changes` of its text_config."""
    shutil.copytree(CAPTION, path)
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= changes or {}
    (path / "config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_a_base_loaded_twice_is_one_to_jit(tmp_path):
    """The library's tokenizer compares by identity: as a field of the model it would have every program compiled again."""
    one, other = (loading.load(hf(tmp_path / name))[0] for name in "ab")
    assert one == other and hash(one) == hash(other) and one.tokenizer is not other.tokenizer
    traced = []
    function = jax.jit(lambda model, x: traced.append(1) or x, static_argnums=0)
    function(one, 1.0), function(other, 1.0)
    assert traced == [1]


@pytest.mark.parametrize("swap", [("[PAD]", "[UNK]"), ("[SEP]", "w3"), ("[DEC]", "[ENC]")])
def test_special_ids_of_tokenizer_and_config_must_agree(tmp_path, swap):
    words = [swap[1] if word == swap[0] else swap[0] if word == swap[1] else word for word in WORDS]
    with pytest.raises(
        ValueError, match=r"(pad|sep|bos)_id is \d+ in the configuration, but .* is \d+ in the tokenizer"
    ):
        loading.load(hf(tmp_path / "x", words))
    with pytest.raises(ValueError, match="in the tokenizer"):
        loading.abstract(tmp_path / "x")


def test_special_ids_that_no_configuration_has_are_the_tokenizers(tmp_path):
    path = hf(tmp_path / "x")
    config = json.loads((path / "config.json").read_text())
    for key in ("pad_token_id", "sep_token_id", "bos_token_id", "cls_token_id", "enc_token_id"):
        config["text_config"].pop(key, None)
    (path / "config.json").write_text(json.dumps(config))
    model, _ = loading.load(path)
    c = model.config
    assert (c.pad_id, c.cls_id, c.sep_id, c.bos_id, c.enc_id) == (0, 1, 2, 95, 96)


def test_captioning_needs_no_row_for_enc(tmp_path):
    """A vocabulary matrix of 96 rows: [ENC], the 97th token, is appended and never read."""
    path = hf(tmp_path / "x", WORDS[:-1], {"vocab_size": 96})
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    save_file({name: x[:96] if x.shape[:1] == (97,) else x for name, x in tensors.items()}, path / "model.safetensors")
    model, params = loading.load(path)
    assert (len(model.tokenizer), model.config.vocab_size) == (97, 96)
    assert len(jp.generate(model, {"params": params}, [np.zeros((40, 40, 3), np.uint8)], beams=2)) == 1


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_without_a_token_are_never_written(tmp_path, beams):
    """A matrix that was padded to 97 rows for 60 tokens: where a padded row wins, `generate` died on its id."""
    words = [*WORDS[:58], "[DEC]", "[ENC]"]
    path = hf(tmp_path / "x", words, {"bos_token_id": 58, "enc_token_id": 59})
    model, params = loading.load(path)
    bias = params["text_decoder"]["head"]["bias"].at[60:].add(100.0)
    decoder = params["text_decoder"] | {"head": params["text_decoder"]["head"] | {"bias": bias}}
    (texts,) = jp.generate(
        model, {"params": params | {"text_decoder": decoder}}, [np.zeros((40, 40, 3), np.uint8)], beams=beams, top=beams
    )
    assert all(set(one["text"].split()) <= set(words) for one in texts)


BLIP_PROCESSOR = {
    "image_processor_type": "BlipImageProcessor", "do_resize": True, "size": {"height": 40, "width": 40}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "do_convert_rgb": True, "do_pad": False,
}  # fmt: skip


def test_the_image_processor_of_a_base_is_followed(tmp_path):
    plain = loading.load(hf(tmp_path / "plain"))[0]
    published = BLIP_PROCESSOR | {"do_pad": True, "size_divisor": 32, "processor_class": "BlipProcessor"}
    assert loading.load(hf(tmp_path / "published", preprocessor_config=published))[0] == plain
    assert loading.load(hf(tmp_path / "same", preprocessor_config=BLIP_PROCESSOR))[0] == plain
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    model, params = loading.load(hf(tmp_path / "half", preprocessor_config=BLIP_PROCESSOR | half))
    assert (model.config.image_mean, model.config.image_std, model.config.image_resample) == ((0.5,) * 3, (0.5,) * 3, 2)
    image_BYXC = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3)).astype(np.uint8)
    floats = (image_BYXC / np.float32(255) - 0.5) / np.float32(0.5)
    variables = {"params": params}
    ours, expected = (model.apply(variables, x, method="encode_image") for x in (image_BYXC, np.float32(floats)))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - plain.apply(variables, image_BYXC, method="encode_image")).max() > 0.1
    nested = {"processor_class": "BlipProcessor", "image_processor": BLIP_PROCESSOR | half}  # transformers 5
    both = hf(tmp_path / "nested", preprocessor_config=BLIP_PROCESSOR, processor_config=nested)
    assert loading.load(both)[0] == model
    raw = BLIP_PROCESSOR | {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3, "resample": 2}
    np.testing.assert_allclose(loading.load(hf(tmp_path / "raw", preprocessor_config=raw))[0].config.image_mean, 0.5)
    picture = np.random.default_rng(1).integers(0, 256, (60, 30, 3)).astype(np.uint8)
    bilinear = pipeline.Resized.of([picture], model)[0]
    expected = np.array(Image.fromarray(picture).resize((40, 40), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(bilinear, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"do_center_crop": True}, "do_center_crop is True, which is unsupported"),
        ({"do_resize": False}, "do_resize is False"),
        (
            {"do_pad": True, "pad_size": {"height": 48, "width": 48}},
            "pad_size is {'height': 48, 'width': 48}, which is unsup",
        ),
        ({"size": {"shortest_edge": 40}}, "size is {'shortest_edge': 40}; expected equal height and width"),
        ({"size": {"height": 40, "width": 48}}, "expected equal height and width"),
        (
            {"size": {"height": 56, "width": 56}},
            "has image size 56 and config.json 40; choose one with image_size=56",
        ),
        ({"resample": 17}, "resample is 17; expected a Pillow filter"),
        ({"image_std": [0.0, 1, 1]}, "image_std is .0.0, 1, 1.; expected three numbers, above 0"),
        ({"image_mean": [0.5]}, "image_mean is .0.5.; expected three numbers"),
        ({"rescale_factor": 0}, "rescale_factor is 0; expected a number"),
        ({"do_sharpen": True}, "do_sharpen is unsupported"),
    ],
)
def test_what_an_image_processor_does_otherwise_is_refused_by_name(tmp_path, changes, message):
    path = hf(tmp_path / "x", preprocessor_config=BLIP_PROCESSOR | changes)
    with pytest.raises(ValueError, match=message):
        loading.load(path)
    if "56" in message:
        assert loading.load(path, image_size=56)[0].config.image_size == 56


def test_an_export_carries_the_processor(tmp_path):
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 1}
    model, params = loading.load(hf(tmp_path / "half", preprocessor_config=BLIP_PROCESSOR | half))
    interchange.export_hf(model, {"params": params}, tmp_path / "out")
    assert loading.load(tmp_path / "out")[0] == model
    again = loading.save(tmp_path / "ours", model, params, aliases={}, dtype="float32")
    assert loading.load(again)[0] == model


def test_live_the_processor_of_transformers_makes_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with the installed transformers: pip install -e .[golden]")
    transformers = pytest.importorskip("transformers", reason="as above")
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path = hf(tmp_path / "half", preprocessor_config=BLIP_PROCESSOR | half)
    model, params = loading.load(path)
    image_BYXC = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    processor = transformers.BlipImageProcessor.from_pretrained(path)
    there = transformers.BlipForConditionalGeneration.from_pretrained(path).eval()
    with torch.no_grad():
        states = there.vision_model(processor(list(image_BYXC), return_tensors="pt")["pixel_values"])[0].numpy()
    np.testing.assert_allclose(model.apply({"params": params}, image_BYXC, method="encode_image"), states, atol=5e-5)


def test_weights_can_be_read_by_others_as_other_files_can(tmp_path):
    """safetensors 0.8 makes files for their owner alone, which others of a group could not load."""
    before = os.umask(0o027)
    try:
        runtime_files.write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
