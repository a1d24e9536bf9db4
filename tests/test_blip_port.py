"""Checkpoints survive the way in and out bit for bit, and every key, shape and setting is accounted for."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxpeft import tree
from jaxpeft.adapt import budget
from jaxpeft.inputs import images
from jaxpeft.models import convert, loading
from jaxpeft.models.blip import Blip
from jaxpeft.models.blip_convert import CONVERTER, TIED, hf_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
CAPTION, VQA, MINIMAL = (GOLDEN / f"blip_{name}_tiny" for name in ("caption", "vqa", "bin"))
BOTH = pytest.mark.parametrize("directory", [CAPTION, VQA], ids=["caption", "vqa"])
WORD = "text_decoder.bert.embeddings.word_embeddings.weight"


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def read_directory(directory, **options):
    """(config, params, report)"""
    model, params, report = loading.read(directory, **options)
    return model.config, params, report


def config_of(directory):
    return read_directory(directory)[0]


def from_hf(tensors, config, source="checkpoint"):
    """Params of numpy arrays, with the dtypes of the tensors."""
    return convert.nested(convert.read(tensors, CONVERTER.table(config), source, place=convert.in_memory))


def to_hf(params, config):
    return convert.written(tree.flatten(params), CONVERTER.table(config))


def assert_same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert np.asarray(x).dtype == np.asarray(b[name]).dtype, name
        np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.fixture
def copy(tmp_path):
    """copy(directory, **changes of 'section.key') -> a copy whose config.json is changed; None removes a key."""

    def make(directory, changes=None):
        new = tmp_path / directory.name
        shutil.copytree(directory, new)
        config = json.loads((new / "config.json").read_text())
        for name, value in (changes or {}).items():
            *section, key = name.split(".")
            part = config[section[0]] if section else config
            part.pop(key, None)
            if value is not None:
                part[key] = value
        (new / "config.json").write_text(json.dumps(config))
        return new

    return make


# ------------------------------------------------------------------------------------------- both ways
@BOTH
def test_round_trip_is_bit_exact(directory):
    tensors, config = tensors_of(directory), config_of(directory)
    params = from_hf(tensors, config)
    assert_same(to_hf(params, config), tensors)
    assert_same(from_hf(to_hf(params, config), config), params)


def test_unequal_widths_of_a_vqa_model_fit_too():
    """transformers cannot express them: the encoder reads image tokens, the decoder reads question states."""
    config = dataclasses.replace(config_of(CAPTION), question_encoder=True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), budget.abstract_params(Blip.build(config))
    )
    assert params["text_encoder"]["blocks"]["cross_attention"]["key"]["kernel"].shape == (2, 48, 32)
    assert params["text_decoder"]["blocks"]["cross_attention"]["key"]["kernel"].shape == (2, 32, 32)
    assert_same(from_hf(to_hf(params, config), config), params)


# ------------------------------------------------------------------------------------------- keys and shapes
def test_long_lists_of_keys_are_cut_after_ten_with_their_count():
    config = dataclasses.replace(config_of(CAPTION), vision_layers=5)
    with pytest.raises(ValueError, match=r"missing \(24\): (vision_model\S+, ){10}\.\.\. \(\+14 more\)"):
        from_hf(tensors_of(CAPTION), config)


def test_a_question_encoder_is_neither_dropped_nor_invented():
    with pytest.raises(ValueError, match=r"unexpected \(56\): text_encoder"):
        from_hf(tensors_of(VQA), dataclasses.replace(config_of(VQA), question_encoder=False))
    with pytest.raises(ValueError, match=r"question states; use a captioning checkpoint"):
        read_directory(VQA, task="captioning")


def test_second_names_of_tied_tensors_must_agree():
    tensors, config = tensors_of(CAPTION), config_of(CAPTION)
    expected = from_hf(tensors, config)
    second = tensors | {name: tensors[first] for name, first in TIED.items()}
    assert_same(from_hf(second, config), expected)
    only = {name: x for name, x in second.items() if name not in TIED.values()}
    assert_same(from_hf(only, config), expected)
    second["text_decoder.cls.predictions.decoder.weight"] = tensors[WORD] + 1
    with pytest.raises(ValueError, match=f"decoder.weight differs from {WORD}"):
        from_hf(second, config)


def official(name):
    """A transformers name as Salesforce's code has it."""
    for pattern, new in (
        (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv", r"visual_encoder.blocks.\1.attn.qkv"),
        (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
        (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
        (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
        (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
        (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
        (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
        (r"^vision_model\.post_layernorm", "visual_encoder.norm"),
    ):
        name = re.sub(pattern, new, name)
    return name


@BOTH
def test_official_names_and_position_buffers_are_accepted(directory):
    tensors, config = tensors_of(directory), config_of(directory)
    renamed = {official(name): x for name, x in tensors.items()}
    assert not any(name.startswith("vision_model") for name in renamed)
    renamed["text_decoder.bert.embeddings.position_ids"] = np.arange(24)[None]
    assert_same(from_hf(renamed, config), from_hf(tensors, config))
    with pytest.raises(ValueError, match="two keys map to vision_model.post_layernorm.bias"):
        from_hf(tensors | {"visual_encoder.norm.bias": np.zeros(48)}, config)


# ------------------------------------------------------------------------------------------- directories
def test_torch_file_equals_safetensors(copy):
    directory = copy(MINIMAL)
    _, expected, report = read_directory(directory)
    assert report["files"] == ["model.safetensors"]
    (directory / "model.safetensors").unlink()
    _, params, report = read_directory(directory)
    assert report["files"] == ["pytorch_model.bin"]
    assert_same(params, expected)


def shard(directory, tensors, n=2):
    """Replace the weights of a directory by n files and their index."""
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n):
        part = dict(list(tensors.items())[i::n])
        save_file(part, directory / f"model-{i}.safetensors")
        weight_map |= {name: f"model-{i}.safetensors" for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_joined(copy):
    directory = copy(CAPTION)
    shard(directory, tensors_of(CAPTION))
    _, params, report = read_directory(directory)
    assert report["files"] == ["model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"]
    assert_same(params, read_directory(CAPTION)[1])
    save_file({"other": np.zeros(2)}, directory / "model-1.safetensors")
    with pytest.raises(
        ValueError, match=r"model-1.safetensors: tensor \S+ not found, although model.safetensors.index.json"
    ):
        read_directory(directory)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors is missing"):
        read_directory(directory)


def test_settings_come_from_the_file_and_absent_ones_are_reported(copy):
    changes = {"vision_config.layer_norm_eps": None, "text_config.num_attention_heads": None}
    config, _, report = read_directory(copy(CAPTION, changes | {"text_config.layer_norm_eps": 1e-7}))
    assert (config.vision_eps, config.text_heads, config.text_eps) == (1e-5, 8, 1e-7)
    assert report["defaults"] == {"vision_config.layer_norm_eps": 1e-5, "text_config.num_attention_heads": 8}
    config, _, report = read_directory(CAPTION)
    assert (config.vision_eps, config.text_heads, config.text_eps, config.image_size) == (1e-6, 4, 1e-12, 40)
    assert (config.pad_id, config.cls_id, config.sep_id, config.bos_id, config.enc_id) == (0, 1, 2, 95, 96)
    assert report["defaults"] == {} and "initialised" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "model_type 'clip'"),
        ({"architectures": ["BlipForImageTextRetrieval"]}, "BlipForImageTextRetrieval"),
        ({"text_config": None}, "text_config is None, expected an object"),
        ({"vision_config.hidden_act": "quick_gelu"}, "vision_config.hidden_act is 'quick_gelu'"),
        (
            {"text_config.num_attention_heads": 5},
            "text_config.hidden_size 32 is not divisible by text_config.num_attention_heads 5",
        ),
        ({"text_config.num_attention_heads": "4"}, "text_config.num_attention_heads is '4', expected an int"),
        ({"text_config.num_hidden_layers": 0}, "text_config.num_hidden_layers is 0"),
        ({"text_config.layer_norm_eps": -1e-12}, "text_config.layer_norm_eps is -1e-12; it must be at least 0"),
        ({"vision_config.image_size": [40, 48]}, r"vision_config.image_size is \[40, 48\]"),
        (
            {"vision_config.image_size": 44},
            "vision_config.image_size 44 is not divisible by vision_config.patch_size 8",
        ),
        ({"text_config.bos_token_id": 30522}, "text_config.bos_token_id 30522 is outside the vocabulary of 97"),
    ],
)
def test_wrong_settings_name_the_file_and_the_key(copy, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_directory(copy(CAPTION, changes))


def test_missing_and_damaged_files_are_named(copy):
    directory = copy(CAPTION)
    (directory / "model.safetensors").write_bytes((CAPTION / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read_directory(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights; expected one of model.safetensors"):
        read_directory(directory)
    save_file(tensors_of(CAPTION), directory / "model.safetensors")
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_directory(directory)


# ------------------------------------------------------------------------------------------- changes on load
def test_another_image_size_resizes_the_positions_only():
    config, params, report = read_directory(CAPTION, image_size=56)
    _, before, _ = read_directory(CAPTION)
    assert config.image_size == 56 and report["resized"] == "position embedding from 40 to 56 pixels"
    position_PD = before["vision"].pop("position")
    np.testing.assert_array_equal(params["vision"].pop("position"), images.resize_positions(position_PD, 7))
    assert_same(params, before)
    assert "resized" not in read_directory(CAPTION, image_size=40)[2]
    with pytest.raises(ValueError, match="image_size 50 is not divisible by patch_size 8"):
        read_directory(CAPTION, image_size=50)


def test_a_captioning_checkpoint_starts_a_vqa_model(copy):
    """With vision width = text width, as the VQA one has it, without its encoder."""
    directory = copy(VQA, {"architectures": ["BlipForConditionalGeneration"]})
    rest = {name: x for name, x in tensors_of(VQA).items() if not name.startswith("text_encoder.")}
    save_file(rest, directory / "model.safetensors")
    _, caption, _ = read_directory(directory)
    config, params, report = read_directory(directory, task="vqa")
    assert config.question_encoder and "text_encoder" not in caption
    encoder = params.pop("text_encoder")
    assert_same(params, caption)
    del caption["text_decoder"]["head"]
    assert_same(encoder, caption["text_decoder"])
    started = report["initialised"]
    assert started["text_encoder/blocks/cross_attention"] == "text_decoder/blocks/cross_attention"
    assert set(started) == {f"text_encoder/{group}" for group in ("embed", *(f"blocks/{n}" for n in encoder["blocks"]))}


def test_unequal_widths_cannot_start_a_vqa_model():
    with pytest.raises(ValueError, match=r"cross_attention/\{key,value\}/kernel .* width 48, .* width 32"):
        read_directory(CAPTION, task="vqa")


# ------------------------------------------------------------------------------------------- what real directories hold
def untied(copy, directory=CAPTION, seed=0):
    """A directory whose vocabulary matrix is another one than its word embedding, as a BLIP tuned whole leaves it."""
    new, rng = copy(directory), np.random.default_rng(seed)
    tensors = tensors_of(directory)
    second, first = next(iter(TIED.items()))
    tensors[second] = tensors[first] + rng.normal(0, 0.3, tensors[first].shape).astype(np.float32)
    tensors["text_decoder.cls.predictions.decoder.bias"] = tensors["text_decoder.cls.predictions.bias"]
    save_file(tensors, new / "model.safetensors")
    return new, tensors


@BOTH
def test_an_untied_head_is_a_leaf_of_its_own(copy, directory):
    path, tensors = untied(copy, directory)
    config, params, _ = read_directory(path)
    second, first = next(iter(TIED.items()))
    assert config.untied_head
    np.testing.assert_array_equal(params["text_decoder"]["head"]["vocabulary"]["kernel"], tensors[second].T)
    np.testing.assert_array_equal(params["text_decoder"]["embed"]["word"], tensors[first])
    kept = {name: x for name, x in tensors.items() if name != "text_decoder.cls.predictions.decoder.bias"}
    assert_same(to_hf(jax.tree.map(np.asarray, params), config), kept)
    assert hf_config(config)["tie_word_embeddings"] is False


def test_live_untied_heads_compute_what_transformers_computes(copy, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with the installed transformers: pip install -e .[golden]")
    transformers = pytest.importorskip("transformers", reason="as above")
    import jaxpeft as jp

    path, tensors = untied(copy)
    model, params = jp.load(path)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(5, 90, (2, 5)).astype(np.int32)
    image_BYXC = rng.normal(size=(2, 40, 40, 3)).astype(np.float32)
    ours = np.asarray(model.apply({"params": params}, {"image": image_BYXC, "tokens": tokens_BT[:, None]})[:, 0])
    # transformers 5.23 ties by config.json, and 4.40 wrote files without that key: both matrices are set by hand here
    there = transformers.BlipForConditionalGeneration.from_pretrained(CAPTION).eval()
    decoder = there.text_decoder.cls.predictions.decoder
    decoder.weight = torch.nn.Parameter(torch.tensor(tensors["text_decoder.cls.predictions.decoder.weight"]))

    def logits(there):
        with torch.no_grad():
            states = there.vision_model(torch.tensor(image_BYXC).permute(0, 3, 1, 2))[0]
            return there.text_decoder(torch.tensor(tokens_BT).long(), encoder_hidden_states=states).logits.numpy()

    np.testing.assert_allclose(logits(there), ours, atol=5e-5)
    jp.export_hf(model, {"params": params}, tmp_path / "out")
    again = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(logits(again), ours, atol=5e-5)


@pytest.mark.slow
def test_methods_on_an_untied_head(copy):
    """LoRA on the vocabulary merges there, as it is nobody else's; head='transform' leaves the matrix alone."""
    import jaxpeft as jp

    path, _ = untied(copy)
    model, params = jp.load(path)
    batch = {"image": np.zeros((1, 40, 40, 3), np.uint8), "tokens": np.full((1, 1, 3), 7, np.int32)}
    apply = jax.jit(model.apply)
    for method in (jp.LoRA(targets="head/vocabulary$", rank=2), jp.Head(matrix="untied")):
        variables = jp.attach(model, params, method, jax.random.key(0))
        mask = jp.trainable(variables)
        moved = jax.tree.map(lambda x, on: x + 0.1 * on, variables, mask)
        merged = jp.merge(model, moved)
        np.testing.assert_allclose(apply({"params": merged}, batch), apply(moved, batch), atol=1e-4, rtol=1e-4)
    mask = tree.flatten(jp.trainable(jp.attach(model, params, jp.Head(), jax.random.key(0))))
    assert not mask["params/text_decoder/head/vocabulary/kernel"] and mask["params/text_decoder/head/dense/kernel"]


@pytest.mark.slow
def test_words_are_added_to_an_untied_head_too():
    model, params = tiny.model(untied_head=True), dict(tiny.params())
    kernel = np.random.default_rng(0).normal(size=(12, len(tiny.TOKENIZER))).astype(np.float32)
    decoder = params["text_decoder"] | {"head": params["text_decoder"]["head"] | {"vocabulary": {"kernel": kernel}}}
    wider, more, new = loading.extend_vocabulary(model, params | {"text_decoder": decoder}, ["zebra"], seed=0)
    assert new == ["zebra"] and more["text_decoder"]["head"]["new_matrix"].shape == (1, 12)
    before, after = (
        jax.jit(one.apply)({"params": leaves}, tiny.batch())
        for one, leaves in ((model, params | {"text_decoder": decoder}), (wider, more))
    )
    np.testing.assert_allclose(after[..., :-1], before, atol=1e-6)
    whole, joined = loading.joined(wider, more)
    assert joined["text_decoder"]["head"]["vocabulary"]["kernel"].shape == (12, len(tiny.TOKENIZER) + 1)
    np.testing.assert_allclose(jax.jit(whole.apply)({"params": joined}, tiny.batch()), after, atol=1e-6)


@pytest.mark.parametrize("said", [None, 30523])
def test_a_small_vocabulary_needs_only_the_special_tokens_it_uses(copy, said):
    """transformers has no key for [ENC]; its class default is outside a small vocabulary, and captioning never reads it."""
    directory = copy(CAPTION, {"text_config.enc_token_id": said, "text_config.cls_token_id": None})
    config, _, _ = read_directory(directory)
    assert config.enc_id == 30523 and not config.question_encoder
    with pytest.raises(ValueError, match="text_config.enc_token_id 30523 is outside the vocabulary of 97"):
        read_directory(copy(VQA, {"text_config.enc_token_id": 30523}))
