"""What `jaxpeft.export` writes, used as its card says: the card's own code, run by transformers and PEFT."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import config_of

import jaxpeft as jp
from jaxpeft import tasks, tree
from jaxpeft.apps import export
from jaxpeft.data import scenes
from jaxpeft.models import loading
from jaxpeft.training import run

torch = pytest.importorskip("torch", reason="runs the card's code: pip install -e .[golden]")
transformers = pytest.importorskip("transformers", reason="as above")
peft = pytest.importorskip("peft", reason="as above")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(task, method) -> directory of a short run from the shipped base; two of them added words."""
    home, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        plain = scenes.load
        for task, method, words in (
            ("captioning", "lora", True), ("vqa", "lora", True), ("captioning", "prompt", False),
        ):  # fmt: skip
            c = config_of("tiny", task, method, **{"optim.lr": 0.01, "data.n_train": 4, "data.n_test": 3, "steps": 4})
            c.eval.base = c.eval.gallery = False
            if method == "prompt":
                c.method.targets, c.method.positions, c.method.length = "^text_decoder$", "shift", 3
            patch.setattr(scenes, "load", tiny.with_new_words(plain) if words else plain)
            run.run(c, home / f"{task}-{method}", lambda *_: None)
            found[task, method] = home / f"{task}-{method}"
    return found


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """picture.jpg in the working directory, stored on its side with the tag that says so."""
    monkeypatch.chdir(tmp_path)
    split = scenes.load({"n_test": 9}, ["test"])["test"]
    upright = Image.fromarray(np.asarray(split.images[4])).resize((96, 64))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to the right
    turned.save("picture.jpg", quality=95, exif=exif)
    turned.save("untagged.jpg", quality=95)
    return Path("picture.jpg")


def pasted(directory, capsys, question=None, picture="picture.jpg") -> str:
    """What the code of a card prints; `question` and `picture` in place of the card's."""
    (code,) = re.findall(r"```python\n(.*?)```", (Path(directory) / "README.md").read_text(), re.DOTALL)
    code = code.replace("picture.jpg", picture)
    code = re.sub(r'text="[^"]*"', f'text="{question}"', code) if question else code
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.strip()


def exported(run, *more) -> str:
    export.main(["--workdir", str(run), "--out", "out", *more])
    return "out"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "format"), [("lora", "merged"), ("lora", "peft"), ("prompt", "peft")])
def test_the_cards_code_writes_the_caption(runs, picture, capsys, method, format):
    run = runs["captioning", method]
    out = exported(run, "--format", format)
    model, variables, _, task = jp.load_run(run)
    (expected,) = jp.generate(model, variables, picture, beams=1, task=task)
    (on_its_side,) = jp.generate(model, variables, "untagged.jpg", beams=1, task=task)
    assert pasted(out, capsys) == expected != on_its_side
    assert pasted(out, capsys, picture="untagged.jpg") == on_its_side


@pytest.mark.slow
@pytest.mark.parametrize("format", ["merged", "peft"])
def test_the_cards_code_answers(runs, picture, capsys, format):
    run = runs["vqa", "lora"]
    out = exported(run, "--format", format)
    model, variables, _, task = jp.load_run(run)
    for question in ("what color is the circle", "how many squares are there", "is there a zebra"):
        (expected,) = jp.generate(model, variables, picture, question, beams=1, task=task)
        assert pasted(out, capsys, question) == expected


@pytest.mark.slow
def test_a_plain_generate_knows_prompt_and_length(runs, picture):
    """transformers takes both from config.json where the inputs hold a picture alone."""
    out = exported(runs["captioning", "lora"])
    model, variables, _, task = jp.load_run(runs["captioning", "lora"])
    said = json.loads((Path(out) / "generation_config.json").read_text())
    template = task.template(model)
    n_prompt, prompt = len(template.start), template.start_text
    assert (n_prompt, prompt) == (4, "a picture of")
    assert (said["max_new_tokens"], said["min_new_tokens"]) == (task.max_new_tokens, 1)
    assert said["num_beams"] == 1
    there = transformers.BlipForConditionalGeneration.from_pretrained(out).eval()
    processor = transformers.BlipProcessor.from_pretrained(out)
    assert there.text_decoder.generation_config.max_new_tokens == n_prompt + task.max_new_tokens - 1
    prompted = processor(images=Image.open("untagged.jpg"), text=prompt, return_tensors="pt")
    plain = processor(images=Image.open("untagged.jpg"), return_tensors="pt")
    assert "input_ids" not in plain
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if version >= (5, 23):  # earlier ones do not bias a second token
        assert torch.equal(there.generate(**plain), there.generate(**prompted))
    (expected,) = jp.generate(model, variables, "untagged.jpg", beams=1, task=task)
    text = processor.decode(there.generate(**prompted)[0], skip_special_tokens=True)
    assert text.removeprefix(prompt).strip() == expected


@pytest.mark.slow
def test_beams_are_those_of_the_run(runs, picture):
    run = runs["captioning", "lora"]
    model, variables, _, task = jp.load_run(run)
    jp.export_hf(model, variables, "out", task=task, beams=3)
    assert json.loads(Path("out/generation_config.json").read_text())["num_beams"] == 3
    settings, unprompted = model.hf.generation(task, beams=3)
    assert "num_beams" not in unprompted and len(unprompted["sequence_bias"]) == 3  # a picture of
    assert [ids for ids, _ in unprompted["sequence_bias"]] == [list(task.template(model).start[:n]) for n in (2, 3, 4)]


@pytest.mark.slow
def test_an_adapter_brings_a_base_that_has_the_added_words(runs, picture):
    """PEFT's logits on adapter/base are ours, added words included; and our own reader takes both back."""
    run = runs["captioning", "lora"]
    out = Path(exported(run, "--format", "peft"))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "out/base" and config["peft_type"] == "LORA"
    model, variables, methods, _ = jp.load_run(run)
    assert [one.name for one in methods] == ["lora", "new_words"]
    assert model.tokenizer.vocabulary[-2:] == ("yak", "zebra")
    there = transformers.BlipForConditionalGeneration.from_pretrained(out / "base")
    there = peft.PeftModel.from_pretrained(there, out).eval()
    tokens = np.array([[*model.tokenizer.encode("a zebra beside a yak")[:-1]]])
    image = np.asarray(scenes.load({"n_test": 1}, ["test"])["test"].images[0])[None]
    size = model.config.image_size
    image = np.asarray(Image.fromarray(image[0]).resize((size, size)))[None]
    batch = {"image": image, "tokens": tokens[:, None]}
    ours = np.asarray(model.apply(variables, batch))[:, 0]
    pixels = (image / 255 - np.array(model.config.image_mean)) / np.array(model.config.image_std)
    with torch.inference_mode():
        theirs = there(
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32), input_ids=torch.tensor(tokens)
        ).logits
    assert ours.shape == tuple(theirs.shape) and ours.shape[-1] == len(model.tokenizer)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)
    again, params = loading.load(out / "base", task="captioning")
    back, many = jp.import_peft(again, params, out)
    np.testing.assert_allclose(np.asarray(again.apply(back, batch))[:, 0], ours, atol=2e-4)
    assert [one.name for one in many] == ["lora"] or many[0].name == "scoped"


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ['A "red" THING', "caf\u00e9 \U0001f600 of", "\\n of"])
def test_any_prompt_is_python_on_the_card_and_no_part_of_the_caption(runs, picture, capsys, prompt):
    model, variables, _, task = jp.load_run(runs["captioning", "lora"])
    task = dataclasses.replace(task, prompt=prompt)
    lines = model.hf.code(task, "out")
    jp.export_hf(model, variables, "out", card="\n".join(["```python", *lines, "```"]), task=task)
    (expected,) = jp.generate(model, variables, picture, beams=1, task=task)
    assert pasted("out", capsys) == expected


@pytest.mark.slow
def test_an_adapter_of_a_hugging_face_base_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = Path(__file__).parent / "golden" / "blip_caption_tiny"
    model, params = loading.load(base)
    variables = jp.attach(model, params, jp.LoRA(rank=2), jax.random.key(0))
    jp.export_peft(model, variables, "out", base="owner/name", revision="a" * 40)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "a" * 40)
    assert not Path("out/base").exists()
    words = tiny.model(False)  # that base has no tokenizer beside it
    lines = words.hf.code(tasks.build("captioning", max_new_tokens=5), "out", "owner/name", "a" * 40)
    assert f'model = BlipForConditionalGeneration.from_pretrained("owner/name", revision="{"a" * 40}")' in lines
    jp.export_peft(model, variables, "unknown")
    assert json.loads(Path("unknown/adapter_config.json").read_text())["base_model_name_or_path"] is None
    back, _ = jp.import_peft(model, params, "out")
    assert tree.digest(back) == tree.digest(variables)
