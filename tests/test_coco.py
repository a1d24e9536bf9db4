import collections
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import mini_coco
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from configs import blip_caption_coco, blip_vqa_v2, mplug_caption_coco, mplug_vqa_v2, paligemma_coco, paligemma_vqa_v2
from jaxpeft import data, metrics, ops
from jaxpeft.data import base, coco, scenes
from jaxpeft.data.coco import prepare, prepared
from jaxpeft.inputs import images
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.metrics import coco_java
from jaxpeft.models import decode, loading, mplug
from jaxpeft.tasks import build
from jaxpeft.training import optim, preflight, results, setup
from jaxpeft.training import run as run_module


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return mini_coco.draw(tmp_path_factory.mktemp("coco") / "data", 12)


@pytest.fixture(scope="module")
def home(tree, tmp_path_factory):
    """Both data sets, prepared."""
    out = tmp_path_factory.mktemp("prepared")
    for name in ("coco_captions", "vqav2"):
        prepare.prepare(
            name, tree, out, visual_genome=name == "vqav2", workers=1, check_sizes=False, log=lambda _: None
        )
    return out


def load(home, name, splits, **options):
    return data.load(ConfigDict({"name": name, "data_dir": str(home), **options}), splits)


def originals(tree):
    """{id: what dataset_coco.json says of it}."""
    return {str(one["cocoid"]): one for one in json.loads((tree / "karpathy/dataset_coco.json").read_text())["images"]}


def test_jpegs_are_read_at_less_than_their_size(home):
    for name in ("coco_captions", "vqav2"):
        whole, less = (load(home, name, ["val"], jpeg_edge=edge)["val"] for edge in (None, 8))
        assert whole.source == "coco" and less.source == "coco, jpeg_edge 8"
        (rows, columns, _), small = whole.images[0].shape, less.images[0].shape
        part = next(n for n in (8, 4, 2, 1) if min(rows, columns) >= 8 * n)
        assert part > 1 and small == (-(-rows // part), -(-columns // part), 3)


def test_captions_are_those_of_the_file_and_restval_is_trained_on(tree, home):
    said, seen = originals(tree), collections.Counter()
    for name, split in load(home, "coco_captions", ["train", "val", "test"]).items():
        for i, row in enumerate(split.rows):
            one = said[row["image_id"]]
            assert one["split"] in (("train", "restval") if name == "train" else (name,))
            assert row["captions"] == [sentence["raw"] for sentence in one["sentences"]]
            path = tree / "coco" / one["filepath"] / one["filename"]
            np.testing.assert_array_equal(split.images[i], images.decode(path))
            seen[one["split"]] += 1
    assert seen == {"train": 12, "restval": 2, "val": 2, "test": 2}


def test_pictures_are_stored_once_for_both_tasks(tree, home):
    rows = {}
    for features in home.glob("*/1.0.0/features.json"):
        info = json.loads((features.parent / "dataset_info.json").read_text())
        rows[features.parent.parent.name] = sum(sum(map(int, split["shardLengths"])) for split in info["splits"])
        assert ('"image"' in features.read_text()) == (features.parent.parent.name not in coco.TEXTS)
    pictures = sum(n for name, n in rows.items() if name not in coco.TEXTS)
    assert pictures == len(list(tree.rglob("*.jpg"))) == 12 + 6 + 6 + 6


def test_vqa_in_karpathys_splits_has_no_picture_twice(tree, home):
    said = originals(tree)
    found = load(home, "vqav2", ["train", "val", "test"], visual_genome=True)
    ids = [row["image_id"] for split in found.values() for row in split.rows]
    assert len(ids) == len(set(ids)) == 12 + 6 + 5  # one of six pictures of Visual Genome is COCO's, and in val
    for name, split in found.items():
        for row in split.rows:
            if row["image_id"].startswith("vg"):
                assert name == "train" and {q["weight"] for q in row["questions"]} == {0.2}
            else:
                assert said[row["image_id"]]["split"] in (("train", "restval") if name == "train" else (name,))
    assert found["train"].rows[-1]["questions"][0]["answers"][0].islower()
    alone = load(home, "vqav2", ["train"], visual_genome=True)["train"]
    assert [row["image_id"] for row in alone.rows] == [row["image_id"] for row in found["train"].rows]


def test_vqa_in_official_splits(tree, home):
    options = {"protocol": "official", "train_parts": ("train", "val")}
    found = load(home, "vqav2", ["train", "test", "test_dev"], **options)
    asked = {name: [q for row in split.rows for q in row["questions"]] for name, split in found.items()}
    annotations = json.loads((tree / "vqa/v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    answers = {q["question_id"]: q["answers"] for q in asked["train"]}
    for one in annotations:
        assert answers[str(one["question_id"])] == [a["answer"] for a in one["answers"]]
    assert len(asked["train"]) == 3 * 18 and len(asked["test"]) == 3 * 6 and len(asked["test_dev"]) == 9
    assert not any(q["answers"] for q in asked["test"]) and found["test"].images[5].ndim == 3
    with pytest.raises(ValueError, match="unknown splits .'val'. of vqav2"):
        load(home, "vqav2", ["val"], **options)


def test_what_is_missing_is_listed_with_its_address(tree, tmp_path):
    for part in ("coco/val2014", "vqa/v2_mscoco_train2014_annotations.json"):
        (tmp_path / "some" / part).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tree / "coco/train2014", tmp_path / "some/train2014")  # 'coco/' may be left out
    with pytest.raises(ValueError) as error:
        prepare.main(["vqav2", "--root", str(tmp_path / "some"), "--out", str(tmp_path / "out")])
    said = str(error.value)
    assert "coco/val2014" in said and "val2014.zip" in said and "v2_Annotations_Train_mscoco.zip" in said
    assert "coco/train2014" not in said and "dataset_coco" not in said and not (tmp_path / "out").exists()


def test_other_sizes_than_published_are_refused_unless_asked_for(tree, tmp_path):
    with pytest.raises(ValueError, match="train2014: found 12 images, expected 82,783") as error:
        prepare.prepare("coco_captions", tree, tmp_path / "out", workers=1, log=lambda _: None)
    assert "--any-size" in str(error.value) and not (tmp_path / "out").exists()


def small(tree, tmp_path):
    """A copy with one damaged, one empty picture, to be prepared in shards of four."""
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    pictures = sorted((root / "coco/train2014").iterdir())
    pictures[1].write_bytes(pictures[1].read_bytes()[:700])
    pictures[9].write_bytes(b"")
    return root, pictures


def test_damaged_pictures_are_listed_or_left_out_and_good_shards_are_kept(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_ROWS", 4)
    root, pictures = small(tree, tmp_path)
    options = {"workers": 1, "check_sizes": False}
    with pytest.raises(ValueError, match="2 images cannot be read") as error:
        prepare.prepare("coco_captions", root, tmp_path / "out", log=lambda _: None, **options)
    assert pictures[1].name in str(error.value) and pictures[9].name in str(error.value)
    kept = [path.name for path in (tmp_path / "out").rglob(".parts-*/*") if path.suffix != ".json"]
    assert len(kept) == 1  # two of three shards hold a damaged picture

    lines = []
    prepare.prepare("coco_captions", root, tmp_path / "out", on_error="skip", log=lines.append, **options)
    assert any("1 of 3 shards are already written" in line for line in lines)
    assert any("train2014: pictures 10 rows" in line and "2 left out" in line for line in lines)
    split = load(tmp_path / "out", "coco_captions", ["train"])["train"]
    assert len(split.rows) == 12 and split.report == {"without a picture": 2}
    for i, row in enumerate(split.rows):  # the rows after a gap still have their own pictures
        one = originals(tree)[row["image_id"]]
        np.testing.assert_array_equal(split.images[i], images.decode(root / "coco" / one["filepath"] / one["filename"]))


def test_texts_without_their_picture_are_counted(tree, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    gone = next(one for one in originals(root).values() if one["split"] == "train")
    (root / "coco" / gone["filepath"] / gone["filename"]).unlink()
    options = {"workers": 1, "check_sizes": False, "log": lambda _: None}
    with pytest.raises(ValueError, match="the images of 1 texts were not found") as error:
        prepare.prepare("coco_captions", root, tmp_path / "out", **options)
    assert f"id {gone['cocoid']} is not in train2014" in str(error.value) and not (tmp_path / "out").exists()
    prepare.prepare("coco_captions", root, tmp_path / "out", on_error="skip", **options)
    split = load(tmp_path / "out", "coco_captions", ["train"])["train"]
    assert len(split.rows) == 13 and split.report == {"without a picture": 1}


def test_a_killed_preparation_goes_on(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_ROWS", 4)
    written, true = [], prepared.write_shard

    def dies_at_the_third(shard, path, skip):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return true(shard, path, skip)

    monkeypatch.setattr(prepared, "write_shard", dies_at_the_third)
    options = {"workers": 1, "check_sizes": False, "log": lambda _: None}
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("coco_captions", tree, tmp_path / "out", **options)
    written[0].with_name(written[0].name + ".json").unlink()  # killed between the two files of a shard
    written.clear()
    (tmp_path / "out/coco_train2014/incomplete.AB12CD_1.0.0").mkdir(parents=True)  # as SIGKILL leaves it
    monkeypatch.setattr(prepared, "write_shard", lambda *args: (written.append(args[1]), true(*args))[1])
    prepare.prepare("coco_captions", tree, tmp_path / "out", **options)
    assert len([path for path in written if "train2014" in str(path)]) == 2  # of three
    assert not list((tmp_path / "out").rglob(".parts-*")) and not list((tmp_path / "out").rglob("incomplete.*"))
    written.clear()
    prepare.prepare("coco_captions", tree, tmp_path / "out", **options)
    assert not written


def test_a_tree_that_changed_is_not_taken_for_the_prepared_one(tree, home, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    picture = next((root / "coco/val2014").iterdir())
    Image.new("RGB", (30, 20)).save(picture)
    with pytest.raises(ValueError, match="coco_val2014.* was prepared from other files"):
        prepare.prepare("coco_captions", root, home, workers=1, check_sizes=False, log=lambda _: None)


def test_broken_official_files_are_named(tree, tmp_path):
    for name, text, says in (
        ("karpathy/dataset_coco.json", "{", "dataset_coco.json: invalid JSON"),
        ("karpathy/dataset_coco.json", '{"images": [{"cocoid": 1}]}', "has no 'split'"),
        ("karpathy/dataset_coco.json", "[1]", "expected a list of objects"),
    ):
        root = tmp_path / says[:4].strip()
        shutil.copytree(tree, root, dirs_exist_ok=True)
        (root / name).write_text(text)
        with pytest.raises(ValueError, match=says):
            prepare.prepare("coco_captions", root, tmp_path / "out", workers=1, check_sizes=False, log=lambda _: None)


def test_a_data_set_that_was_not_prepared_says_how(tmp_path):
    with pytest.raises(ValueError, match="prepare vqav2 --root"):
        load(tmp_path, "vqav2", ["train"])


@pytest.mark.slow
def test_two_processes_prepare_the_same(tree, home, tmp_path, monkeypatch):
    """The pictures of one folder, in three shards; the rest is there already."""
    monkeypatch.setattr(prepared, "SHARD_ROWS", 4)
    for workers in (1, 2):
        shutil.rmtree(tmp_path / "out" / "coco_train2014", ignore_errors=True)
        prepare.prepare("coco_captions", tree, tmp_path / "out", workers=workers, check_sizes=False, log=lambda _: None)
    one, two = (load(place, "coco_captions", ["train"])["train"] for place in (home, tmp_path / "out"))
    assert one.rows == two.rows
    assert all(np.array_equal(a, b) for a, b in zip(one.images, two.images, strict=True))


# recipes


def run(config, base, home, workdir):
    config.base, config.data.data_dir = str(base), str(home)
    config.eval.gallery = False
    return run_module.run(config, workdir, log=lambda _: None)


ARGS = "image_size=64,dtype=float32,steps=2,batch_size=8,method=lora,size=2"


@pytest.mark.slow
def test_the_captioning_recipe_and_its_upload(base, home, tree, tmp_path, monkeypatch):
    """What is scored is the upload and the references; what Java makes of them: test_ptb_tokens_and_meteor."""
    given = []

    def report(ours, theirs):
        given.append((ours, theirs))
        return metrics.captions_report(ours, theirs) | {"tokenizer": "ptb", "meteor": 0.5}

    monkeypatch.setattr(coco_java, "captions_report", report)
    result = run(blip_caption_coco.get_config(ARGS), base, home, tmp_path / "run")
    upload = json.loads((tmp_path / "run/upload_test.json").read_text())
    assert {row["image_id"] for row in upload} == {i for i, one in numbered(tree) if one["split"] == "test"}
    references = {i: [s["raw"] for s in one["sentences"]] for i, one in numbered(tree) if one["split"] == "test"}
    scores = result["metrics"]["test"]["tuned"]
    written = {str(row["image_id"]): row["caption"] for row in upload}
    assert (written, {str(i): texts for i, texts in references.items()}) in given
    again = metrics.captions_report({row["image_id"]: row["caption"] for row in upload}, references)
    for name in ("cider_d", "bleu_4", "rouge_l"):
        assert scores[name] == pytest.approx(again[name], abs=1e-9)
    assert (scores["tokenizer"], scores["meteor"]) == ("ptb", 0.5)


def numbered(tree):
    return [(int(i), one) for i, one in originals(tree).items()]


@pytest.mark.slow
def test_the_vqa_recipe_and_its_uploads(base, home, tree, tmp_path):
    config = blip_vqa_v2.get_config(ARGS)
    result = run(config, base, home, tmp_path / "run")
    upload = json.loads((tmp_path / "run/upload_test.json").read_text())
    annotations = json.loads((tree / "vqa/v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    answers = {one["question_id"]: [a["answer"] for a in one["answers"]] for one in annotations}
    scores = [metrics.vqa_accuracy(row["answer"], answers[row["question_id"]]) for row in upload]
    assert len(upload) == 6 and result["metrics"]["test"]["tuned"]["accuracy"] == pytest.approx(
        np.mean(scores), abs=1e-12
    )
    task = build("vqa", **config.task_options)
    train = load(home, "vqav2", ["train"], visual_genome=True)["train"]
    assert {row["answer"] for row in upload} <= set(task.candidates(train, None))


@pytest.mark.slow
def test_answers_for_the_server_are_written_and_not_scored(base, home, tree, tmp_path):
    result = run(blip_vqa_v2.get_config(ARGS + ",protocol=official"), base, home, tmp_path / "run")
    for name, count in (("test", 18), ("test_dev", 9)):
        upload = json.loads((tmp_path / f"run/upload_{name}.json").read_text())
        assert len(upload) == count and all(isinstance(row["answer"], str) for row in upload)
        assert result["metrics"][name]["scored"] is False and "tuned" not in result["metrics"][name]
    assert "no answers to score with" in results.table(result)


def test_recipes_are_the_published_ones():
    c = blip_caption_coco.get_config("")
    assert (c.batch_size, c.steps, c.optim.lr, c.optim.weight_decay, c.model.image_size) == (
        256,
        11063,
        1e-5,
        0.05,
        384,
    )
    c = blip_vqa_v2.get_config("protocol=official")
    assert (c.batch_size, c.optim.lr, c.model.image_size, c.task_options.smoothing) == (256, 2e-5, 480, 0.1)
    assert c.steps == 10 * (443_757 + 214_354 + 1_445_322) // 256
    for other in ("other", "visual_genome"):
        with pytest.raises(ValueError, match=f"protocol is '{other}'; choose 'karpathy' or 'official'"):
            blip_vqa_v2.get_config(f"protocol={other}")


def test_mplugs_recipes_are_those_of_the_release():
    c = mplug_caption_coco.get_config("")
    assert (c.batch_size, c.steps, c.data.augment) == (1024, 5 * 566_435 // 1024, "mplug")
    assert (c.task_options.max_tokens, c.task_options.min_length, c.eval.beams) == (25, 9, 5)
    c = mplug_vqa_v2.get_config("protocol=official")
    assert c.steps == 8 * (443_757 + 214_354 + 1_445_322) // 1024 and c.data.visual_genome_weight == 0.5
    assert (c.task_options.max_question, c.task_options.max_new_tokens, c.task_options.min_length) == (25, 10, 2)
    assert (c.optim.weight_decay, c.optim.clip_norm, c.task_options.smoothing) == (0.02, 1.0, 0.0)
    with pytest.raises(ValueError, match="protocol"):
        mplug_vqa_v2.get_config("protocol=other")


def test_mplugs_full_tuning_has_two_learning_rates_and_begins_at_both_from_one():
    """Text: 1e-5 -> 3e-5 over 400 iterations, then a cosine to 1e-6; the ViT's goes down from 1e-5 to 5e-6 meanwhile."""
    c = mplug_vqa_v2.get_config("protocol=official")
    tuned = {
        "params": {"vision": {"a": jnp.ones(2)}, "text_decoder": {"norm": {"scale": jnp.ones(2)}, "b": jnp.ones(2)}}
    }
    tx = optim.optimizer(c.optim, tuned, c.steps)
    rates = {}
    for step in (0, 200, 400, c.steps):
        state = tx.init(tuned)
        state = (*state[:-1], state[-1]._replace(step=jnp.int32(step)))
        updates, _ = tx.update(jax.tree.map(lambda x: x * 1e-2, tuned), state, jax.tree.map(jnp.zeros_like, tuned))
        rates[step] = [
            -float(updates["params"][name][key][0]) for name, key in (("vision", "a"), ("text_decoder", "b"))
        ]
    expected = {0: (1e-5, 1e-5), 200: (7.5e-6, 2e-5), 400: (5e-6, 3e-5), c.steps: (1e-6, 1e-6)}
    for step, pair in expected.items():  # the first update of Adam is the learning rate
        np.testing.assert_allclose(rates[step], pair, rtol=2e-3, err_msg=str(step))
    lora = mplug_vqa_v2.get_config("method=lora")
    assert not lora.optim.lr_groups and (lora.optim.start_lr, lora.optim.end_lr, lora.optim.warmup) == (0.0, 0.0, 0.0)


def test_paligemmas_recipes_are_the_published_ones():
    c = paligemma_coco.get_config("")
    assert c.eval.batch_size == 128
    assert (c.batch_size, c.steps, c.optim.lr, c.optim.b2) == (256, 5 * 566_435 // 256, 1e-4, 0.999)
    assert (c.optim.warmup, c.optim.clip_norm, c.task_options.max_tokens, c.eval.beams) == (0.05, 1.0, 32, 2)
    c = paligemma_vqa_v2.get_config("protocol=official")
    assert (c.steps, c.optim.lr, c.optim.weight_decay, c.eval.beams) == (10 * 658_111 // 256, 1e-5, 1e-6, 1)
    assert (c.model.remat, c.model.frozen_dtype) == ("full", "bfloat16")
    with pytest.raises(ValueError, match="protocol"):
        paligemma_vqa_v2.get_config("protocol=other")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [mplug_caption_coco, mplug_vqa_v2])
def test_mplugs_recipes_run(recipe, home, tmp_path):
    """Full tuning of a small mPLUG by every setting of the recipe."""
    tokenizer = Tokenizer.from_words(scenes.WORDS)
    sizes = {f"vision_{k}": n for k, n in (("width", 12), ("layers", 1), ("heads", 2), ("mlp", 16))}
    sizes |= {f"text_{k}": n for k, n in (("width", 12), ("layers", 1), ("heads", 2), ("mlp", 16))}
    model = mplug.Mplug.build(
        mplug.MplugConfig(
            **sizes, image_size=32, patch_size=8, encoder_layers=1, fusion_layers=3, stride=2, fusion=True,
            vocab_size=len(tokenizer), max_positions=64, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id,
        ),
        tokenizer,
    )  # fmt: skip
    loading.save(tmp_path / "base", model, loading.scratch(model, 0), aliases={})
    config = recipe.get_config("image_size=32,dtype=float32,steps=3,batch_size=8")
    if recipe is mplug_caption_coco:  # its step in shapes; runs of captions are those of BLIP's recipe
        config.base, config.data.data_dir = str(tmp_path / "base"), str(home)
        setup.check_config(config)
        step, shapes, _ = preflight.step_in_shapes(config, setup.abstract_model(config))
        jax.eval_shape(step, *shapes)
        return
    result = run(config, tmp_path / "base", home, tmp_path / "run")
    assert (
        np.isfinite(result["metrics"]["test"]["tuned"]["nll"])
        and result["counts"]["tuned"] == result["counts"]["total"]
    )
    assert (tmp_path / "run" / "upload_test.json").exists()


# ranking


@pytest.mark.slow
@pytest.mark.parametrize(("k", "chunk"), [(3, 2), (7, 16)])
def test_rank_is_two_stages_of_whole_losses(k, chunk):
    model, params, batch = tiny.model(), tiny.params(), tiny.batch(3)
    context = jax.jit(lambda *args: model.apply(*args, method="context"))({"params": params}, batch)
    words = range(7, 14)
    answers = np.zeros((7, 5), np.int32)
    for row, word in zip(answers, words, strict=True):
        n = 1 + word % 3
        row[: n + 2] = [model.config.bos_id, *[word] * n, model.config.sep_id]
    before = decode.rank._cache_size()
    moved = jax.tree.map(lambda x: x + 1, params)
    for some in (moved, params):
        which, score = decode.rank(
            model, {"params": some}, context, answers, pad=model.config.pad_id, k=k, smoothing=0.1, chunk=chunk
        )
    assert decode.rank._cache_size() == before + 1  # weights are no constants of the program

    start = jnp.full((3, 1), model.config.bos_id)
    first = model.apply({"params": params}, start, context, method="score")[:, 0]
    whole = jax.jit(lambda *args: model.apply({"params": params}, *args, method="score"))
    for i in range(3):
        allowed = np.argsort(-np.asarray(first[i, answers[:, 1]]), kind="stable")[:k]
        expected = {}
        for a in allowed:
            n = int((answers[a] != 0).sum())
            tokens = jnp.asarray(answers[a : a + 1, : n - 1])
            logits = whole(tokens, jax.tree.map(lambda x, i=i: x[i : i + 1], context))
            expected[int(a)] = -float(ops.token_nll(logits, jnp.asarray(answers[a : a + 1, 1:n]), 0.1).sum())
        order = sorted(expected, key=lambda a: -expected[a])
        assert np.asarray(which[i]).tolist() == order
        np.testing.assert_allclose(score[i], [expected[a] for a in order], atol=2e-5)


def test_the_closed_list_is_the_most_frequent_first(tmp_path):
    def split(*answers):
        questions = [{"question_id": str(i), "question": "q", "answers": a, "type": ""} for i, a in enumerate(answers)]
        return base.Split("train", [], [{"image_id": "1", "captions": [], "questions": questions}])

    train = split(["b"] * 10, ["b"] * 6 + ["c"] * 4, ["d"] * 10, ["a"] * 10)
    ranked = functools.partial(build, "vqa", inference="rank", variant="official2021")
    assert ranked().candidates(train, None) == ["b", "a", "d"]
    assert ranked(n_answers=1).candidates(train, None) == ["b"]
    assert build("vqa", variant="official2021").candidates(train, None) is None
    path = tmp_path / "answers.json"
    path.write_text('["yes", "no"]')
    assert ranked(answer_list=str(path)).candidates(train, None) == ["yes", "no"]
    with pytest.raises(ValueError, match="nowhere.json"):
        ranked(answer_list=str(tmp_path / "nowhere.json")).candidates(train, None)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON list"):
        ranked(answer_list=str(path)).candidates(train, None)
    with pytest.raises(ValueError, match="inference"):
        build("vqa", inference="guess")


def test_visual_genomes_answers_weigh_a_fifth():
    rows = [{"image_id": "vg1", "captions": [], "questions": [
        {"question_id": "vg1", "question": "w1", "answers": ["w2"], "type": "vg", "weight": 0.2}]}]  # fmt: skip
    examples = build("vqa").examples(base.Split("train", [None], rows), tiny.template("vqa"))
    assert examples.arrays["weights"].max() == np.float32(0.2)


# scores through Java


needs_java = pytest.mark.skipif(bool(coco_java.missing()), reason=coco_java.missing())


def test_without_java_the_report_says_so(monkeypatch):
    monkeypatch.setattr(coco_java.shutil, "which", lambda _: None)
    report = coco_java.captions_report({"a": "a dog.", "b": "x"}, {"a": ["a dog"], "b": ["y z"]})
    assert report["tokenizer"] == "approximate" and report["skipped"]["meteor"].endswith("is not installed")


@pytest.mark.slow
@needs_java
def test_ptb_tokens_and_meteor():
    ours = {"a": 'He said "10,000 dogs\rran"; fast.', "b": "a cat on a mat", "c": ""}
    theirs = {"a": ["he said 10,000 dogs ran fast"], "b": ["a cat on a mat", "the cat sat"], "c": ["nothing"]}
    report = coco_java.captions_report(ours, theirs)
    assert report["tokenizer"] == "ptb" and 0.3 < report["meteor"] < 1
    # two of three pictures are exact but for what PTB tokens leave out, and the third is empty
    assert report["bleu_1"] == pytest.approx(np.exp(1 - 12 / 11), abs=1e-6)
    from pycocoevalcap.cider.cider import Cider

    plain = {key: [" ".join(re.findall(r"[\w,]+", texts.lower()))] for key, texts in ours.items()}
    assert report["cider_d"] == pytest.approx(Cider().compute_score(theirs, plain)[0], abs=1e-9)
