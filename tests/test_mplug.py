"""mPLUG beyond its numbers: files in every layout, what each method reaches, and which stages are computed once."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

import jaxpeft as jp
from configs.studies import paper
from jaxpeft import config as defaults
from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.data import scenes
from jaxpeft.data.base import Split
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.methods import METHODS
from jaxpeft.models import convert, loading, mplug
from jaxpeft.tasks import build as task_of
from jaxpeft.training import evaluate, frozen_cache, loop, optim, sharding

GOLDEN = pathlib.Path(__file__).parent / "golden" / "mplug_base_tiny"
WORDS = Tokenizer.from_words(f"w{i}" for i in range(20))
CONFIG = mplug.MplugConfig(
    image_size=16, patch_size=8, vision_width=12, vision_layers=2, vision_heads=3, vision_mlp=20, vocab_size=len(WORDS),
    text_width=12, text_layers=2, text_heads=2, text_mlp=20, max_positions=16, encoder_layers=1, fusion_layers=4, stride=2,
    fusion=True, pad_id=0, cls_id=2, sep_id=3,
)  # fmt: skip
MODEL = mplug.Mplug.build(CONFIG, WORDS)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(0, 0.4, x.shape).astype(np.float32) for name, x in loading.shapes(MODEL).items()}
    return convert.nested({name: x + (name.endswith("scale")) for name, x in drawn.items()})


# Without the last of its three runs of fusion layers, each of which takes time to compile
SHORT = MODEL.replaced(fusion_layers=3)


@functools.cache
def short_params():
    fusion = {name: x for name, x in params()["text_fusion"].items() if name != "cross2"}
    return params() | {"text_fusion": fusion}


# ------------------------------------------------------------------------------------------- files
@pytest.fixture
def stored():
    """The golden checkpoint's tensors by name."""
    return {name: x[...] for name, x in convert.opened(GOLDEN).items()}


def directory(path, tensors, **said):
    """A base in the release's format."""
    path.mkdir()
    for name in ("config_bert.json", "config.yaml"):
        shutil.copy(GOLDEN / name, path)
    with (path / "config.yaml").open("a") as file:
        file.writelines(f"{key}: {value}\n" for key, value in said.items())
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path / "model.safetensors")
    return path


def in_pretraining(name):
    """A name of the release's fine-tuning in its pre-training."""
    name = name.replace("text_encoder.", "text_encoder.bert.")
    return name.replace("fusion_encoder.", "fusion_encoder.fusion.bert.")


def same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)


def test_both_layouts_of_the_release_and_modelscopes_are_one_model(tmp_path, stored):
    model, expected = loading.load(GOLDEN)
    assert model.config.fusion and model.tasks == ("vqa",)
    extra = {"visual_encoder_m.visual.proj": np.zeros(3), "text_encoder.cls.predictions.bias": np.zeros(2),
             "itm_head.weight": np.zeros(2), "temp": np.zeros(1), "image_queue": np.zeros((2, 2))}  # fmt: skip
    layouts = {
        "pretrained": {in_pretraining(name): x for name, x in (stored | extra).items()},
        "modelscope": {f"model.{name}": x for name, x in stored.items()},
    }
    for name, tensors in layouts.items():
        same(loading.load(directory(tmp_path / name, tensors))[1], expected)


def test_captioning_reads_its_part_only(tmp_path, stored):
    model, found = loading.load(GOLDEN, task="captioning")
    assert set(found) == {"vision", "text_decoder"} and model.tasks == ("captioning",)
    own = {name: x for name, x in stored.items() if not name.startswith(("text_encoder", "fusion"))}
    path = directory(tmp_path / "caption", own, task="image-captioning")
    same(loading.load(path)[1], found)
    with pytest.raises(ValueError, match="has no text encoder and no fusion stack, which task 'vqa' needs"):
        loading.load(path, task="vqa")


def test_a_bare_file_is_recognised_by_its_shapes(tmp_path, monkeypatch):
    path = shutil.copy(GOLDEN / "pytorch_model.bin", tmp_path / "mplug_tiny.pth")
    with pytest.raises(ValueError, match=r"shape \(24, 3, 16, 16\), which is none of mplug-base, mplug-large; put the"):
        loading.load(path)
    config = loading.load(GOLDEN)[0].config
    monkeypatch.setitem(mplug.KINDS, "mplug-tiny", dataclasses.replace(config, image_size=96))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS.vocabulary))
    model, found = loading.load(path, task="vqa")
    assert model.config == dataclasses.replace(config, cls_id=2, sep_id=3) and model.tokenizer == WORDS
    assert loading.abstract(path, task="vqa") == model
    same(found, loading.load(GOLDEN)[1])


def test_another_image_size_moves_the_positions():
    model, found = loading.load(GOLDEN, task="captioning", image_size=96)
    assert model.config.n_patches == 36 and found["vision"]["position"].shape == (37, 24)
    report = loading.read(GOLDEN, task="captioning", image_size=96)[2]
    assert report["resized"] == "position embedding from 48 to 96 pixels"
    with pytest.raises(ValueError, match="image_size 50 is not divisible by patch_size 16"):
        loading.load(GOLDEN, image_size=50)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t | {"text_decoder.more": np.zeros(3)}, "text_decoder.more"),
        (lambda t: t | {"fusion_encoder.encoder.layer.2.bonus": np.zeros(3)}, "fusion_encoder.encoder.layer.2.bonus"),
        (lambda t: {k: x for k, x in t.items() if "visual.ln_pre.bias" not in k}, "visual_encoder.visual.ln_pre.bias"),
        (
            lambda t: t | {"visual_encoder.visual.class_embedding": np.zeros(23)},
            "visual_encoder.visual.class_embedding",
        ),
        (lambda t: t | {"text_decoder.cls.predictions.decoder.bias": np.ones(107)}, "differs from"),
    ],
)
def test_other_tensors_are_named(tmp_path, stored, change, says):
    with pytest.raises(ValueError, match=says):
        loading.load(directory(tmp_path / "bad", change(stored)))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.yaml", None, r"config\.yaml is missing; it belongs beside config_bert\.json"),
        ("config.yaml", "[1, 2]", r"config\.yaml: expected keys and values"),
        ("config.yaml", "clip_name: ViT-H", r"clip_name is 'ViT-H'; choose one of ViT-B-16, ViT-L-14"),
        ("config.yaml", "a: [", r"config\.yaml is not a configuration of mPLUG"),
        ("config_bert.json", '{"hidden_act": "relu"}', "hidden_act is 'relu'; supported: 'gelu'"),
        ("config_bert.json", '{"hidden_size": "wide"}', "hidden_size is 'wide', expected an int"),
        ("config_bert.json", '{"stride_layer": 0}', "stride_layer is 0; it must be between 1 and"),
    ],
)
def test_bad_settings_are_named(tmp_path, stored, name, text, says):
    path = directory(tmp_path / "bad", {})
    (path / name).unlink()
    if text is not None:
        (path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        loading.abstract(path)


def test_a_vocabulary_larger_than_the_weights_is_refused(tmp_path, stored):
    path = directory(tmp_path / "base", stored)
    (path / "vocab.txt").write_text("\n".join([*WORDS.vocabulary, *(f"v{i}" for i in range(107))]))
    with pytest.raises(ValueError, match="tokens exceed vocab_size 107 of the weights"):
        loading.load(path)


def test_our_own_format_keeps_the_model(tmp_path):
    loading.save(tmp_path / "ours", MODEL, params(), aliases={}, dtype="float32")
    model, found = loading.load(tmp_path / "ours")
    assert model == MODEL and model.tokenizer == WORDS
    same(found, params())
    small = loading.load(tmp_path / "ours", task="captioning")[1]
    assert set(small) == {"vision", "text_decoder"}


# ------------------------------------------------------------------------------------------- texts
def test_templates_of_the_release():
    vqa, caption = MODEL.processor.template("vqa"), MODEL.processor.template("captioning")
    ids = [WORDS.ids[f"w{i}"] for i in (3, 1)]
    assert vqa.prompt("W3 w1") == ([2, *ids], 0)  # [CLS], no [SEP]
    assert vqa.prompt("w3 w1 w2", limit=3) == ([2, *ids], 1)
    assert vqa.target("w3") == ([2, ids[0], 3], 0)
    assert caption.target("W3 W1") == ([2, *ids, 3], 0)
    assert caption.target("w3 w1", limit=3) == ([2, *ids], 1)  # a caption that is too long loses its [SEP]
    prompted = MODEL.processor.template("captioning", prompt="w1", max_words=1)
    assert prompted.target("w3 w5")[0] == [2, ids[1], ids[0], 3]


# ------------------------------------------------------------------------------------------- methods
REACHES = {  # a method's default -> whether it acts in the fusion stack
    "prompt": False,  # at the input of stacks that read words
    "vpt": False,  # in the image tower
    "head": False,
}


@pytest.mark.parametrize("name", METHODS)
def test_the_default_of_every_method_reaches_the_fusion_stack_or_says_that_it_does_not(name):
    from jaxpeft.training import setup

    fields = {"selective": {"leaves": "text_"}, "oft": {"block": 4}}.get(name, {})
    chosen = jp.methods.build(name, **fields)
    tuned = jp.attach(MODEL, params(), chosen, jax.random.key(0))
    names = [leaf for leaf, on in tree.flatten(jp.trainable(tuned)).items() if on]
    reached = any(leaf.split("/")[1] == "text_fusion" for leaf in names)
    assert reached == REACHES.get(name, True)
    line = setup._towers(tuned, jp.trainable(tuned))
    adapted, rest = line.split(";")
    assert "text_fusion" in (adapted if reached else rest), line


def test_groups_of_sites():
    paths = {site.path for site in sites.sites(MODEL)}
    for kind in ("cross0", "joint1", "cross2"):
        assert f"text_fusion/{kind}/blocks/self_attention/query" in paths
    assert "text_fusion/cross0/blocks/cross_attention/query" in paths
    assert "text_fusion/joint1/blocks/cross_attention/query" not in paths
    lora = jp.attach(MODEL, params(), jp.LoRA(targets="fusion", rank=1), jax.random.key(0))
    assert all(leaf.startswith("peft/text_fusion") for leaf in tree.flatten(lora) if leaf.startswith("peft/text"))


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_fusion_layers_are_grouped_into_runs(stride):
    config = dataclasses.replace(CONFIG, fusion_layers=5, stride=stride)
    layers = [(kind, i) for kind, some in config.runs for i in some]
    assert layers == [("joint" if i and i % stride == 0 else "cross", i) for i in range(5)]
    assert all(len(some) == 1 for kind, some in config.runs if kind == "joint")
    assert all(a != b or a == "joint" for (a, _), (b, _) in zip(config.runs, config.runs[1:], strict=False))


# ------------------------------------------------------------------------------------------- what is computed once
def reasons(method, **config):
    model = mplug.Mplug.build(dataclasses.replace(CONFIG, **config), WORDS)
    tuned = jp.attach(model, params(), method, jax.random.key(0))
    found = frozen_cache.programs(model, tuned)
    rows = {"image": 10, "example": 10}
    return frozen_cache.cacheable(model, found, sites.trainable(tuned), "none", rows, 10**9)


@pytest.mark.parametrize(
    ("targets", "cached"),
    [
        ("^text_decoder.*query$", {"image_tokens", "text_states", "fused"}),
        ("^text_fusion.*query$", {"image_tokens", "text_states"}),
        ("^text_encoder.*query$", {"image_tokens"}),
        ("^vision.*query$", {"text_states"}),
    ],
)
def test_stages_are_cached_where_nothing_before_them_is_trained(targets, cached):
    why = reasons(jp.LoRA(targets=targets, rank=1))
    assert {name for name, reason in why.items() if not reason} == cached
    assert all(reason.endswith(("is trained", "is computed every step")) for reason in why.values() if reason)


def test_dropout_is_where_the_release_has_it():
    why = reasons(jp.LoRA(targets="^text_decoder.*query$", rank=1), dropout=0.1)
    assert set(why.values()) == {"it has dropout"} and len(why) == 3  # the image tower too, unlike BLIP's


SPLIT = Split(
    "train",
    [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(3)],
    [
        {"image_id": str(i), "captions": ["w1 w2"], "questions": [
            {"question_id": f"{i}{k}", "question": " ".join(f"w{j}" for j in range(k + 1)), "type": "",
             "answers": ["w1", f"w{i} w2"]} for k in range(2 + i)
        ]} for i in range(3)
    ],
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["^text_fusion.*query$", "^text_decoder.*query$", "^vision.*query$"])
def test_nothing_stale_is_served(targets):
    """A trained leaf is moved after the cache was filled: likelihoods and texts are those of a model without a cache."""
    task = task_of("vqa", max_new_tokens=4)
    template = task.template(SHORT)
    examples, cases = task.examples(SPLIT, template), task.eval_examples(SPLIT, template)
    tuned = jp.attach(SHORT, short_params(), jp.LoRA(targets=targets, rank=2), jax.random.key(0))
    found = frozen_cache.programs(SHORT, tuned, examples)
    why = frozen_cache.cacheable(SHORT, found, sites.trainable(tuned), "none", {"image": 3, "example": 9}, 10**9)
    cached = tuple(stage for stage in SHORT.stages if not why[stage.name])
    cache = frozen_cache.FrozenCache(SHORT, tuned, cached, found, {}, 10**9)
    filled = [cache.fill(SPLIT, examples), cache.fill(SPLIT, cases)]
    moved = tuned | {"peft": jax.tree.map(lambda x: x + 0.3, tuned["peft"])}
    before, after = (evaluate.nlls(SHORT, v, task, examples, batch_size=4) for v in (tuned, moved))
    assert np.abs(before - after).max() > 0.01  # the leaf matters
    np.testing.assert_allclose(evaluate.nlls(SHORT, moved, task, filled[0], batch_size=4), after, rtol=1e-5)
    if cached == SHORT.stages:  # texts are written from the same outputs as likelihoods
        texts = [evaluate.predict(SHORT, moved, task, one, batch_size=4, beams=3) for one in (cases, filled[1])]
        assert [one["text"] for one in texts[0]] == [one["text"] for one in texts[1]]


@pytest.mark.slow
def test_eight_devices_equal_one():
    """A step of LoRA in every tower, on one device and on a mesh of 2 x 2 x 2."""
    task = task_of("vqa", max_new_tokens=5)
    tuned = jp.attach(SHORT, short_params(), jp.LoRA(targets=r"(query|value|up)$", rank=2), jax.random.key(0))
    mask, batch = sites.trainable(tuned), tiny.batch(8, n_texts=2)
    batch |= {name: batch[name] % len(WORDS) for name in ("prompt", "tokens", "targets")}
    tx = optim.optimizer(defaults.get_config().optim, tree.split(tuned, mask)[0], 10)
    step = functools.partial(loop.train_step, loss=functools.partial(task.loss, SHORT), tx=tx, grad_accum=1)
    results = []
    for shape in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        on = sharding.mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
        where = sharding.shardings(tuned, SHORT.sharding, on)
        placed = sharding.put(tuned, where)
        trainable, frozen = tree.split(placed, mask)
        state = loop.TrainState(jax.numpy.int32(0), trainable, tx.init(trainable))
        with sharding.using(placed):
            state, metrics = jax.jit(step)(state, frozen, sharding.shard_batch(batch, on, 8))
        results.append((float(metrics["loss"]), tree.flatten(jax.tree.map(np.asarray, state.tuned))))
    assert not [name for name in sharding.whole(tuned, where, at_least=1) if name.endswith("kernel")]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, leaf in results[0][1].items():
        np.testing.assert_allclose(leaf, results[1][1][name], atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_merged_model_is_the_tuned_one():
    tuned = jp.attach(
        SHORT, short_params(), jp.LoRA(targets=r"text_.*attention/(query|value)$", rank=2), jax.random.key(0)
    )
    tuned = tuned | {"peft": jax.tree.map(lambda x: x + 0.1, tuned["peft"])}
    batch = {k: x for k, x in tiny.batch(2).items() if k in ("image", "prompt", "tokens")}
    batch["prompt"], batch["tokens"] = batch["prompt"] % len(WORDS), batch["tokens"] % len(WORDS)
    merged = {"params": jp.merge(SHORT, tuned)}
    apply = jax.jit(SHORT.apply)
    np.testing.assert_allclose(apply(tuned, batch), apply(merged, batch), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_the_shipped_tiny_mplug():
    """It is small, answers for both tasks, and its manifest says how it was made and what it scores."""
    directory = loading.ASSETS / "tiny_mplug"
    assert sum(path.stat().st_size for path in directory.iterdir()) < 4e6
    (model, found), captioner = loading.load("tiny_mplug", task="vqa"), loading.load("tiny_mplug", task="captioning")
    kinds = [kind for kind, _ in model.config.runs]
    assert set(kinds) == {"cross", "joint"} and sum(x.size for x in jax.tree.leaves(found)) == 1_479_434
    assert set(captioner[1]) == {"vision", "text_decoder"}
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["command"].startswith("python main.py --config=configs/pretrain.py:model=mplug")
    assert manifest["scores"]["web"]["cider_d"] > 1.5  # it describes held-out images
    things = [scenes.scene("test", i).objects for i in range(24)]
    images = [scenes.render(scenes.scene("test", i)) for i in range(24)]
    texts = jp.generate(captioner[0], {"params": captioner[1]}, images, beams=1)
    named = lambda text, objects: any(f"{one.pair[1]} {one.pair[0]}" in text for one in objects)  # noqa: E731
    own, other = (sum(map(named, texts, things[k:] + things[:k])) for k in (0, 7))
    assert own >= 8 and own > 2 * other, (own, other)  # captions name what is in the image, not in another one


def test_the_papers_grid_places_methods_as_it_says():
    study = paper.get_config("towers=all")
    paths = [
        site.path
        for site in sites.sites(mplug.Mplug.build(dataclasses.replace(mplug.KINDS["mplug-base"], fusion=True)))
    ]
    fields = {name: study.variants[name].fields.get("targets") for name in ("prefix", "lora", "serial_adapter")}
    hits = {name: {path for path in paths if re.search(pattern, path)} for name, pattern in fields.items()}
    for stack in ("vision", "text_encoder", "text_fusion/joint1", "text_decoder"):
        own = "attention" if stack == "vision" else "self_attention"
        assert f"{stack}/blocks/{own}" in hits["prefix"] and f"{stack}/blocks/{own}/query" in hits["lora"]
    assert not any("cross_attention" in path for path in hits["prefix"] | hits["lora"])
    assert hits["serial_adapter"] == set(paths)
    assert not re.search(paper.get_config("towers=text").variants.lora.fields.targets, "vision/blocks/attention/query")
    assert {study.variants[f"{name}_head"].head for name in fields} == {"transform"}
    for wrong in ("model=blop", "towers=some"):
        with pytest.raises(ValueError, match="choose one of"):
            paper.get_config(wrong)
