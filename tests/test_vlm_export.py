"""PaliGemma and SmolVLM in transformers and PEFT: what an export computes there, for every tower, and the way back."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import tasks, tree
from jaxpeft.apps import pretrain_smolvlm
from jaxpeft.data import scenes
from jaxpeft.data.pipeline import Resized
from jaxpeft.interchange import hf_out
from jaxpeft.methods import Head, Scoped
from jaxpeft.models import loading

both = pytest.mark.parametrize("kind", tiny_vlm.KINDS)
TOWERS = {
    "vision": r"^vision.*(attention/(query|out)|mlp/up)$",
    "projector": "^projector$",
    "decoder": r"^decoder.*blocks/",
}
CASES = {
    **{name: jp.LoRA(targets=where, rank=2, alpha=3.0) for name, where in TOWERS.items()},
    "the tied head": jp.LoRA(targets="^decoder/head$", rank=2),
    "one layer": Scoped(method=jp.LoRA(rank=2), layers=(1,)),
    "head": (jp.LoRA(rank=2), Head()),
    "untied head": (jp.LoRA(rank=2), Head(matrix="untied")),
    "rslora": jp.LoRA(targets="^decoder.*attention/", rank=4, rank_stabilized=True),
    "dora": jp.DoRA(targets=r"attention/(query|value)$", rank=2),
    "ia3": jp.IA3(),
    "layer_norms": jp.LayerNorms(targets=""),
    "vera": jp.VeRA(rank=5),
    "oft": jp.OFT(targets=r"attention/out$", block=2),
}
FAST = ("decoder",)  # the other cases are marked as slow
UNMERGED = ("the tied head", "untied head")


@functools.cache
def base(kind):
    """Model and weights with every file of a checkpoint; the images of SmolVLM's are resized twice."""
    # transformers' Llama needs a width that the number of heads divides; no id is without a token
    sizes = {"text_width": 16, "vocab_size": len(tiny_vlm.tokenizer(kind))}
    net = tiny_vlm.model(kind, **sizes)
    return (net.replaced(image_longest_edge=40) if kind == "smolvlm" else net), tiny_vlm.params(kind, **sizes)


@functools.cache
def variables_of(kind, name):
    """The tuned variables of a case, no leaf of them zero."""
    model, params = base(kind)
    variables = jp.attach(model, params, CASES[name], jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x, on: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype) if on else x,
        variables,
        jp.trainable(variables),
    )


def picture():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 50, 3), np.uint8))


TASKS = {
    "vqa": tasks.build("vqa", max_new_tokens=6),
    "captioning": tasks.build("captioning", max_new_tokens=7, min_length=3),
}
QUESTION = "what is in the picture"


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, batch):
    return model.apply(variables, batch)


def first_logits(model, variables):
    """Those of the first token of an answer, which depend on every tower and on the whole prompt."""
    image = np.asarray(Resized.of([np.asarray(picture())], model)[0])[None]
    prompt = np.array(TASKS["vqa"].template(model).prompt(QUESTION)[:1], np.int32)
    batch = {"image": image, "prompt": prompt, "tokens": np.ones((1, 1, 2), np.int32)}
    return np.asarray(applied(model, variables, batch))[0, 0, 0]


@functools.cache
def plain_logits(kind):
    model, params = base(kind)
    return first_logits(model, {"params": params})


@pytest.fixture(scope="module")
def there():
    """(transformers, peft, torch) without their warnings."""
    names = ("transformers", "peft", "torch")
    found = [
        pytest.importorskip(name, reason="compares with the installed one: pip install -e .[golden]") for name in names
    ]
    found[0].utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield found


@pytest.fixture(scope="module")
def bases(there, tmp_path_factory):
    """kind -> a directory of `base` that transformers reads, exported without a method."""
    home = tmp_path_factory.mktemp("bases")
    return {kind: jp.export_hf(base(kind)[0], {"params": base(kind)[1]}, home / kind) for kind in tiny_vlm.KINDS}


def loaded(there, directory, form):
    """The model of transformers; no tensor may be missing or unexpected."""
    model, info = getattr(there[0], form.architecture).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def their_first_logits(there, module, directory, form):
    processor = getattr(there[0], form.processor).from_pretrained(directory)
    model = base(form.model.model_type)[0]
    ids = TASKS["vqa"].template(model).prompt(QUESTION)[0]
    text = form.text(model.tokenizer.library.decode(ids, skip_special_tokens=False))
    inputs = processor(images=picture(), text=text, return_tensors="pt")
    inputs.pop("labels", None)
    with there[2].inference_mode():
        return module(**inputs).logits[0, -1].float().numpy()


# ---------------------------------------------------------------- PEFT


@both
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CASES]
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_computes_the_same_in_peft_and_comes_back(there, bases, tmp_path, kind, name):
    model, params = base(kind)
    variables = variables_of(kind, name)
    jp.export_peft(model, variables, tmp_path / "out")
    tuned = there[1].PeftModel.from_pretrained(loaded(there, bases[kind], model.hf), tmp_path / "out")
    again = tuned.load_adapter(tmp_path / "out", "again")
    assert not [key for key in again.missing_keys if "again" in key] and not again.unexpected_keys
    tuned.set_adapter("default")
    expected = their_first_logits(there, tuned.eval(), bases[kind], model.hf)
    ours = first_logits(model, variables)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(ours - plain_logits(kind)).max() > 1e-2
    back, _ = jp.import_peft(model, params, tmp_path / "out")
    np.testing.assert_allclose(first_logits(model, back), ours, rtol=0, atol=2e-5 * np.abs(ours).max())
    if name not in UNMERGED:
        out = jp.export_hf(model, variables, tmp_path / "merged")
        merged = their_first_logits(there, loaded(there, out, model.hf), out, model.hf)
        np.testing.assert_allclose(merged, ours, rtol=0, atol=5e-5 * np.abs(ours).max())


@both
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_wrote_is_read(there, bases, tmp_path, kind):
    """Random leaves in all linears of all towers, also under the names of modules that older releases have."""
    model, params = base(kind)
    peft, torch = there[1:]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(loaded(there, bases[kind], model.hf), config).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "theirs")
    expected = their_first_logits(there, tuned, bases[kind], model.hf)
    variables, _ = jp.import_peft(model, params, tmp_path / "theirs")
    assert {name.split("/")[1] for name in tree.flatten(variables) if name.startswith("peft/")} == {
        "vision",
        "projector",
        "decoder",
    }
    np.testing.assert_allclose(first_logits(model, variables), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    old = {
        "paligemma": lambda name: name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.").replace(
            "model.model.language_model.", "model.language_model.model."
        ),
        "smolvlm": str,
    }[kind]
    save_file({old(name): x for name, x in load_file(file).items()}, file, {"format": "pt"})
    again, _ = jp.import_peft(model, params, tmp_path / "theirs")
    assert tree.digest(again) == tree.digest(variables)


@both
@pytest.mark.parametrize("method", [jp.Prompt(length=3, positions="shift"), jp.Prefix(length=3, positions="shift")])
def test_virtual_tokens_have_no_form_in_peft(kind, method, tmp_path):
    model, params = base(kind)
    variables = jp.attach(model, params, method, jax.random.key(0))
    with pytest.raises(ValueError, match=f"{method.name}: in .* PEFT's virtual tokens act elsewhere.*use save_tuned"):
        jp.export_peft(model, variables, tmp_path / "out")


# ---------------------------------------------------------------- merged directories


@pytest.mark.slow
@both
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_card_writes_our_text(there, tmp_path, monkeypatch, capsys, kind, task, beams):
    monkeypatch.chdir(tmp_path)
    picture().save("picture.png")
    model, variables = base(kind)[0], variables_of(kind, "decoder")
    out = jp.export_hf(model, variables, tmp_path / "out", task=TASKS[task], beams=beams)
    lines = "\n".join(model.hf.code(TASKS[task], str(out), beams=beams)).replace("picture.jpg", "picture.png")
    exec(compile(lines, "README.md", "exec"), {})
    asked = QUESTION if task == "vqa" else None
    (expected,) = jp.generate(model, variables, "picture.png", asked, beams=beams, task=TASKS[task])
    assert capsys.readouterr().out.strip() == expected != ""
    (other,) = jp.generate(model, {"params": base(kind)[1]}, "picture.png", asked, beams=beams, task=TASKS[task])
    assert other != expected


@both
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_card_keeps_texts_from_ending_early(there, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    picture().save("picture.png")
    (model, params), task = base(kind), TASKS["captioning"]
    (long,) = jp.generate(model, {"params": params}, "picture.png", beams=1, task=task)
    # the logit of the end becomes twice that of the token that goes on
    last, stop = model.tokenizer.library.encode(long).ids[-1], task.template(model).stop[0]
    decoder = dict(params["decoder"])
    if "head" in decoder:
        head_DV = decoder["head"]["kernel"]
        decoder["head"] = {"kernel": head_DV.at[:, stop].set(2 * head_DV[:, last])}
    else:
        words_VD = decoder["embed"]["word"]
        decoder["embed"] = {"word": words_VD.at[stop].set(2 * words_VD[last])}
    variables = {"params": params | {"decoder": decoder}}
    out = jp.export_hf(model, variables, tmp_path / "out", task=task, beams=1)
    lines = "\n".join(model.hf.code(task, str(out))).replace("picture.jpg", "picture.png")
    exec(compile(lines, "README.md", "exec"), {})
    (expected,) = jp.generate(model, variables, "picture.png", beams=1, task=task)
    assert capsys.readouterr().out.strip() == expected != long
    task = tasks.build("captioning", max_new_tokens=7, min_length=0)
    assert jp.generate(model, variables, "picture.png", beams=1, task=task) != [expected]


@both
def test_a_large_model_is_split_into_files_with_an_index(there, tmp_path, monkeypatch, kind):
    model, params = base(kind)
    whole = load_file(jp.export_hf(model, {"params": params}, tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(hf_out, "SHARD", 9000)
    out = jp.export_hf(model, {"params": params}, tmp_path / "many")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    parts = [load_file(out / name) for name in shards]
    assert sum(map(len, parts)) == len(whole)
    largest = max(x.nbytes for x in whole.values())
    assert all(sum(x.nbytes for x in part.values()) <= max(9000, largest) for part in parts)
    assert tree.digest(loading.load(out)[1]) == tree.digest(params)
    loaded(there, out, model.hf)
    monkeypatch.undo()
    jp.export_hf(model, {"params": params}, out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


@both
def test_weights_are_rounded_to_the_type_that_is_asked_for(tmp_path, kind):
    model, params = base(kind)
    half = jp.export_hf(model, {"params": params}, tmp_path / "half", dtype="bfloat16")
    assert {str(x.dtype) for x in load_file(half / "model.safetensors").values()} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype is 'int8'; choose one of float32, bfloat16"):
        jp.export_hf(model, {"params": params}, tmp_path / "no", dtype="int8")


@both
def test_an_export_is_read_as_the_model_that_it_was(tmp_path, kind):
    model, params = base(kind)
    again, read = loading.load(jp.export_hf(model, {"params": params}, tmp_path / "out"))
    assert again.config == model.config and again.tokenizer == model.tokenizer
    assert tree.digest(read) == tree.digest(params)


# ---------------------------------------------------------------- the shipped base


@pytest.mark.slow
def test_the_shipped_tiny_decoder():
    """It is small, sees what is in an image, and its manifest says how it was made and what it scores."""
    directory = loading.ASSETS / "tiny_decoder"
    assert sum(path.stat().st_size for path in directory.iterdir()) < 5e6
    model, params = loading.load("tiny_decoder")
    assert sum(x.size for x in jax.tree.leaves(params)) == 1_690_240
    assert model.tokenizer.files() == pretrain_smolvlm.tokenizer().files()
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["command"].startswith("python main.py --config=configs/pretrain.py:model=smolvlm")
    assert set(manifest["timing"]) == {"lm", "lm_qa", "lm_qa_again"}
    scenes_24 = [scenes.scene("test", i) for i in range(24)]
    images = [scenes.render(one) for one in scenes_24]
    asked = [next(q for q in scenes.questions("test", i) if q["type"] == "color") for i in range(24)]
    answers = jp.generate(model, {"params": params}, images, [q["question"] for q in asked], beams=1)
    right = sum(text == q["answers"][0] for text, q in zip(answers, asked, strict=True))
    assert right >= 16, answers  # of eight colours
    texts = jp.generate(model, {"params": params}, images, beams=1)
    colours = [{thing.pair[1] for thing in one.objects} for one in scenes_24]
    own, other = (
        sum(len(set(text.split()) & one) for text, one in zip(texts, colours[k:] + colours[:k], strict=True))
        for k in (0, 7)
    )
    assert own > 1.5 * other, (own, other)
