"""What a run leaves for use: the tuned model again, texts from the command line, a plain BLIP for transformers."""

import dataclasses
import importlib.metadata
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_vlm
from flax import serialization
from PIL import Image
from safetensors.numpy import load_file
from test_demo import fetch, serving
from tiny import config_of, quiet

import jaxpeft as jp
from jaxpeft import cli, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.apps import demo, export, generate
from jaxpeft.data import scenes
from jaxpeft.inputs import images
from jaxpeft.methods import Head
from jaxpeft.models import blip_convert, decode, loading
from jaxpeft.training import evaluate
from jaxpeft.training import run as run_module


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """(directory, result) of a captioning run that added three words."""
    workdir = tmp_path_factory.mktemp("run")
    c = config_of(
        base, "captioning", "lora", "transform", **{"data.n_train": 4, "optim.lr": 0.05, "eval.gallery": False}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "load", tiny.with_new_words(scenes.load))
        return workdir, run_module.run(c, workdir, quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five test pictures of the run, in two directories, and a file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    split = scenes.load({"n_test": 5}, ["test"])["test"]
    for i in range(5):
        Image.fromarray(np.asarray(split.images[i])).save(root / ("more" if i > 2 else "") / f"{i}.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return root


@pytest.mark.slow
def test_a_run_is_loaded_as_it_was_evaluated(run, folder):
    workdir, result = run
    model, variables, methods, task = jp.load_run(workdir)
    assert result["model"]["new_words"] == ["beside", "yak", "zebra"] and model.tokenizer.vocabulary[-1] == "zebra"
    assert [one.name for one in methods][:2] == ["lora", "head"]
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    pictures = [images.decode(path) for path in sorted(folder.rglob("*.png"), key=lambda p: p.stem)]
    written = jp.generate(model, variables, pictures, beams=1, task=task)
    assert written == [row["tuned"] for row in rows] != [row["base"] for row in rows]


@pytest.mark.slow
def test_what_cannot_be_loaded_is_said(run, base, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no finished run"):
        jp.load_run(tmp_path)
    shutil.copy(run[0] / "config.json", tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="has no tuned/"):
        jp.load_run(tmp_path)
    moved = loading.read
    monkeypatch.setattr(
        loading, "read", lambda *a, **k: (moved(*a, **k)[0], jax.tree.map(lambda x: x + 1, moved(*a, **k)[1]), {})
    )
    with pytest.raises(ValueError, match="tuned on another base"):
        jp.load_run(run[0])


@pytest.mark.slow
def test_a_folder_from_the_command_line(run, folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    code = generate.main(["--workdir", str(run[0]), "--folder", str(folder), "--top", "2", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    assert [row["image"] for row in rows] == [str(folder / name) for name in names]
    assert code == 1 and "broken.jpg" in capsys.readouterr().err
    model, variables, _, task = jp.load_run(run[0])
    best = jp.generate(model, variables, [folder / name for name in names], task=task)
    assert [row["texts"][0]["text"] for row in rows] == best
    for row in rows:
        scores = [one["score"] for one in row["texts"]]
        assert len(scores) == len({one["text"] for one in row["texts"]}) <= 2 and scores == sorted(scores)[::-1]
    assert generate.main(["--workdir", str(run[0]), "--image", str(folder / "0.png"), "--beams", "1"]) == 0
    assert f"{folder / '0.png'}: " in capsys.readouterr().out


@pytest.mark.slow
def test_every_picture_is_captioned_or_said(run, folder, tmp_path, capsys):
    """Whatever ending a picture has that can be read, in any case; those that cannot are named, with status 1."""
    picture, names = Image.open(folder / "0.png"), ("a.JFIF", "b.jpe", "c.tga", "d.PPM", "e.ico")
    for name in names:
        picture.save(tmp_path / name, {".jfif": "JPEG", ".jpe": "JPEG"}.get((tmp_path / name).suffix.lower()))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "f.svg").write_text("<svg/>")
    (tmp_path / "g.heic").write_bytes(b"ftypheic")
    (tmp_path / "._a.JFIF").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._a.heic").write_bytes(b"\x00\x05\x16\x07")
    assert generate.main(["--workdir", str(run[0]), "--folder", str(tmp_path), "--beams", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [str(tmp_path / name) for name in names]
    remedy, phone = "convert them to JPEG or PNG first", " (a phone can be set to save 'Most Compatible' JPEGs)"
    assert err.splitlines() == [
        f"left out: {tmp_path / 'f.svg'}: SVG images are unsupported; {remedy}",
        f"left out: {tmp_path / 'g.heic'}: HEIC/HEIF images are unsupported; {remedy}{phone}",
    ]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "h.svg").write_text("<svg/>")
    with pytest.raises(SystemExit):
        generate.main(["--workdir", str(run[0]), "--folder", str(tmp_path / "only")])
    said = f"files in unsupported image formats: 1, such as {tmp_path / 'only' / 'h.svg'}: SVG images are unsupported; {remedy}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--folder", "nowhere"], "is not a directory"),
        ([], "no images found"),
        (["--image", "a.png", "--top", "0"], "at least 1"),
        (["--image", "a.png", "--out", "nowhere/out.jsonl"], "the directory does not exist"),
    ],
)
def test_mistakes_on_the_command_line_are_said(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--base", "tiny", *args])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_question_for_a_model_that_captions_is_said(run, folder):
    with pytest.raises(ValueError, match="this model captions: pass no prompts"):
        generate.main(["--workdir", str(run[0]), "--image", str(folder / "0.png"), "--question", "what is it"])


def tuned(task, method):
    model, params = tiny.model(task == "vqa"), tiny.params(task == "vqa")
    variables = sites.attach(model, params, method, jax.random.key(0))
    mask = sites.trainable(variables)
    drawn = np.random.default_rng(0)
    return model, jax.tree.map(lambda x, on: x + jnp.float32(drawn.normal(0, 0.1, x.shape)) * on, variables, mask)


@pytest.mark.parametrize("task", ["captioning", "vqa"])
def test_a_merged_directory_reads_back_exactly(tmp_path, task):
    model, variables = tuned(task, (jp.LoRA(rank=2), Head()))
    jp.export_hf(model, variables, tmp_path / "out", card="# a model\n")
    again, params = loading.load(tmp_path / "out")
    assert again.config == model.config and again.tokenizer == model.tokenizer
    expected = tree.flatten(jp.merge(model, variables))
    assert all(np.array_equal(leaf, expected[name]) for name, leaf in tree.flatten(params).items())
    # releases of transformers before 4.57 do not tie the two, and would leave the head's matrix random
    stored, (second, first) = load_file(tmp_path / "out" / "model.safetensors"), next(iter(blip_convert.TIED.items()))
    np.testing.assert_array_equal(stored[second], stored[first])
    assert (tmp_path / "out" / "README.md").read_text() == "# a model\n"
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        jp.export_hf(model, variables, tmp_path / "out")


@pytest.mark.slow
def test_a_run_is_exported_with_a_card_that_says_what_it_is(run, tmp_path, capsys):
    workdir, result = run
    export.main(["--workdir", str(workdir), "--out", str(tmp_path / "out")])
    assert "model.safetensors" in capsys.readouterr().out
    model, params = loading.load(tmp_path / "out")
    again, variables, _, _ = jp.load_run(workdir)
    expected = tree.flatten(loading.joined(again, jp.merge(again, variables))[1])
    assert all(np.array_equal(leaf, expected[name]) for name, leaf in tree.flatten(params).items())
    card = (tmp_path / "out/README.md").read_text()
    counts, test = result["counts"], result["metrics"]["test"]
    for fact in (
        "pipeline_tag: image-to-text", "base_model: tiny", "lora, size 2, with the decoder head (transform)",
        f"{counts['tuned']:,} of {counts['total']:,}", "| training images | 4, from scenes |", "| steps x batch | 6 x 8 |",
        "| learning rate | 0.05, cosine", f"test, n = {test['n']}", f"{test['tuned']['cider_d']:.4f}",
        f"{test['base']['cider_d']:.4f}", "| words added | 3 |", "BlipForConditionalGeneration",
    ):  # fmt: skip
        assert fact in card, fact
    assert str(workdir) not in card
    with pytest.raises(ValueError, match="is not an empty directory"):
        export.main(["--workdir", str(workdir), "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_an_adapter_is_exported_with_its_card(base, tmp_path):
    c = config_of(base, "vqa", "lora", **{"steps": 1, "eval.gallery": False})
    run_module.run(c, tmp_path / "run", quiet, command="python main.py --config=mine.py")
    arguments = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--format", "peft"]
    export.main(arguments)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "README.md"}
    card = (tmp_path / "adapter/README.md").read_text()
    assert "library_name: peft" in card and "BlipForQuestionAnswering" in card
    assert "transformers attends to the padding of questions" in card and "| perfect writer |" in card
    assert "| command | `python main.py --config=mine.py` |" in card
    with pytest.raises(ValueError, match="holds no finished run"):
        export.main(["--workdir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "method, reason", [(jp.Prefix(length=2), "cannot be merged"), (Head(matrix="untied"), "are one matrix in")]
)
def test_what_is_not_exact_is_refused_before_anything_is_written(tmp_path, method, reason):
    with pytest.raises(ValueError, match=reason):
        jp.export_hf(*tuned("captioning", method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["captioning", "vqa"])
def test_live_transformers_loads_it_and_computes_the_same(tmp_path, task):
    torch = pytest.importorskip("torch", reason="compares with the installed transformers: pip install -e .[golden]")
    transformers = pytest.importorskip("transformers", reason="as above")
    model, variables = tuned(task, (jp.LoRA(rank=2), Head()))
    jp.export_hf(model, variables, tmp_path)
    asks = task == "vqa"
    kind = transformers.BlipForQuestionAnswering if asks else transformers.BlipForConditionalGeneration
    there, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    there.eval()
    processor = transformers.BlipImageProcessor.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    first = [model.tokenizer.enc_id if asks else model.tokenizer.cls_id]
    assert tokenizer("w1 w19")["input_ids"] == first + model.tokenizer.encode("w1 w19")[1:]

    rng = np.random.default_rng(0)
    image_BYXC = rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    pixels = processor(list(image_BYXC), return_tensors="pt")["pixel_values"]
    tokens_BT = rng.integers(7, 20, (3, 5)).astype(np.int32)
    batch = {"image": image_BYXC, "tokens": tokens_BT[:, None]}
    question_BT = rng.integers(7, 20, (3, 4)).astype(np.int32)
    if asks:
        batch["prompt"] = question_BT
    here = np.asarray(model.apply(variables, batch))[:, 0]
    with torch.no_grad():
        states = there.vision_model(pixels)[0]
        if asks:
            states = there.text_encoder(torch.tensor(question_BT).long(), encoder_hidden_states=states)[0]
        logits = there.text_decoder(torch.tensor(tokens_BT).long(), encoder_hidden_states=states).logits
    np.testing.assert_allclose(logits.numpy(), here, atol=2e-5)

    context = evaluate.contexts(model, variables, {name: jnp.asarray(x) for name, x in batch.items()})
    search = tasks.build(task).search(model)
    search = dataclasses.replace(search, start=(model.config.bos_id,), length=8, min_length=0)
    ours = decode.greedy(model, variables, context, search)[0]
    with torch.no_grad():
        written = there.text_decoder.generate(
            input_ids=torch.full((3, 1), model.config.bos_id), encoder_hidden_states=states, max_length=8,
            do_sample=False, eos_token_id=model.config.sep_id, pad_token_id=model.config.pad_id,
        )  # fmt: skip
    assert np.array_equal(written.numpy(), np.asarray(ours)[:, : written.shape[1]])


@pytest.mark.slow
def test_the_page_writes_what_the_library_writes(run, folder):
    """A page with the captioning run, its base, and the frozen tiny base that answers."""
    picture = (folder / "0.png").read_bytes()
    model, variables, _, task = jp.load_run(run[0])
    (expected,) = jp.generate(model, variables, [folder / "0.png"], task=task, top=2, batch_size=1)
    with serving(demo.app(demo.load([str(run[0])], ["tiny"]))) as page:
        offered = fetch(f"{page}/writers")[1]["writers"]
        assert [one["asks"] for one in offered] == [False, False, True]
        status, found = fetch(f"{page}/write?top=2", picture)
        assert status == 200 and [one["name"] for one in found] == [one["name"] for one in offered[:2]]
        assert found[1]["texts"] == expected and found[0]["texts"] != expected
        status, found = fetch(f"{page}/write?question=how%20many", picture)
        assert status == 200 and [one["name"] for one in found] == ["tiny"]


@pytest.mark.slow
def test_one_picture_is_a_list_of_one(run, folder):
    model, variables, _, task = jp.load_run(run[0])
    path = folder / "0.png"
    written = jp.generate(model, variables, [path], task=task)
    for one in (path, str(path), images.decode(path), images.decode(path)[None], Image.open(path)):
        assert jp.generate(model, variables, one, task=task) == written


@pytest.mark.slow
def test_another_prompt_begins_the_text(run, folder, capsys):
    arguments = ["--workdir", str(run[0]), "--image", str(folder / "0.png"), "--beams", "1"]
    model, variables, _, task = jp.load_run(run[0])
    assert generate.main([*arguments, "--prompt", "a red"]) == 0
    said = capsys.readouterr().out
    other = generate.prompted(task, "a red", model.tokenizer)
    # as many words after it as after the old one
    room = [one.search(model).length - len(one.template(model).start) for one in (task, other)]
    assert other.prompt == "a red" and room == [task.max_new_tokens] * 2
    assert len(other.template(model).start) == len(task.template(model).start) - 1
    (expected,) = jp.generate(model, variables, folder / "0.png", beams=1, task=other)
    assert f": {expected} (" in said
    for prompt, message in (("a snorkwobble", "has words that are not in the model's vocabulary: snorkwobble"),):
        with pytest.raises(ValueError, match=message):
            generate.main([*arguments, "--prompt", prompt])
    with pytest.raises(ValueError, match="this one's task is vqa: use --question"):
        generate.main(["--base", "tiny", "--image", str(folder / "0.png"), "--question", "what", "--prompt", "a red"])


@pytest.mark.slow
def test_flax_serialises_tuned_trees(run):
    """to_bytes and back: the arrays of every method, in a tree of the same methods."""
    _, variables, _, _ = jp.load_run(run[0])
    blank = jax.tree.map(jnp.zeros_like, variables)
    back = serialization.from_bytes(blank, serialization.to_bytes(variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert tree.digest(back) == tree.digest(variables) != tree.digest(blank)
    state = serialization.to_state_dict(variables["peft"])
    with pytest.raises((KeyError, ValueError)):
        serialization.from_state_dict(variables["peft"], {name: {} for name in state})


def test_the_version_is_that_of_the_package():
    assert jp.__version__ == importlib.metadata.version("jaxpeft")


def test_a_file_name_that_is_not_utf8_costs_no_other_text(tmp_path, folder):
    """As from an old archive; its bytes cannot be written as JSON."""
    shutil.copy(folder / "0.png", tmp_path / "a.png")
    shutil.copy(folder / "0.png", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    ((found, decoded, errors),) = generate.pictures(sorted(tmp_path.iterdir()), 4)
    assert [path.name for path in found] == ["a.png"] and len(decoded) == 1
    (error,) = errors
    assert "caf" in error and error.endswith("the name is not in UTF-8; rename the file")


def test_a_model_of_both_tasks_does_that_of_the_run():
    """SmolVLM answers and captions; a run of it was tuned for one."""
    model = tiny_vlm.model("smolvlm")
    variables, picture = {"params": tiny_vlm.params("smolvlm")}, np.zeros((12, 12, 3), np.uint8)
    for task, prompts, message in (
        ("captioning", "what is it", "this task captions: pass no prompts"),
        ("vqa", None, "this task answers questions: pass prompts"),
    ):
        built = tasks.build(task)
        with pytest.raises(ValueError, match=message):
            jp.generate(model, variables, picture, prompts, task=built)
        assert demo.Writer("run", model, variables, built, 0).asks == (task == "vqa")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections loads config files with it
@pytest.mark.slow
def test_the_beginning_of_captions_is_set_on_the_command_line():
    c = cli.read_config("quickstart:task=captioning", ["--config.task_options.prompt=a picture of"])
    assert tasks.build("captioning", **c.task_options).prompt == "a picture of"
    assert tasks.build("captioning", **cli.read_config("quickstart:task=captioning", []).task_options).prompt is None
