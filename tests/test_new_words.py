"""Words that a base lacks: only their rows are trained, counted, planned and stored, and one emoji changes nothing else."""

import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file

import jaxpeft as jp
from configs import folder
from jaxpeft import data, tasks, tree
from jaxpeft.adapt import budget, sites
from jaxpeft.methods import NewWords, Selective
from jaxpeft.models import blip, loading
from jaxpeft.study import config as studies
from jaxpeft.study import cost
from jaxpeft.training import preflight, setup

EMOJI = "\U0001f600"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve pictures; one of the captions holds an emoji and a word of nobody's."""
    path = tmp_path_factory.mktemp("own")
    with (path / "captions.csv").open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["image", "caption", "split"])
        for i in range(12):
            Image.fromarray(np.full((20, 20, 3), 20 * i, np.uint8)).save(path / f"{i}.png")
            text = f"a {EMOJI} snorkwobble" if i == 0 else "a red circle"
            rows.writerow([f"{i}.png", text, ("train", "train", "test")[i % 3]])
    return path


def config(root, base, tmp_path, **changes):
    c = folder.get_config(f"root={root},annotations=captions.csv,base={base},steps=2,size=2")
    c.data.data_dir, c.optim.schedule, c.eval.base, c.eval.text_only = str(tmp_path / "copy"), "cosine", False, False
    c.eval.gallery = False
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def ran(root, base, tmp_path_factory):
    """(result, what was said, directory) of a run."""
    home, said = tmp_path_factory.mktemp("ran"), []
    return jp.run(config(root, base, home), home / "run", said.append), said, home / "run"


@pytest.mark.slow
def test_counts_budgets_and_files_hold_the_new_rows_and_no_others(root, base, ran, tmp_path):
    result, said, workdir = ran
    c = config(root, base, tmp_path)
    assert result["model"]["new_words"] == ["snorkwobble", EMOJI]
    assert "vocabulary: 2 words are added to the base; their rows are initialised randomly and trained" in said
    width = tiny.CONFIG["text_width"]
    alone = budget.abstract_counts(setup.abstract_model(c), jp.LoRA(rank=2))
    expected = {key: alone[key] + 2 * (width + 1) for key in ("tuned", "stored")}  # a row and a bias each
    assert {key: result["counts"][key] for key in expected} == expected
    stored = load_file(workdir / "tuned" / "tuned.safetensors")
    assert sum(x.size for x in stored.values()) == expected["stored"]
    rows = {name: x.shape for name, x in stored.items() if name.startswith("params/")}
    assert rows == {"params/text_decoder/embed/new_word": (2, width), "params/text_decoder/head/new_bias": (2,)}
    # and before anything is trained
    assert f"{expected['tuned']:,} tuned, {expected['stored']:,} stored" in preflight.report(c)
    model, variables, methods, _ = jp.load_run(workdir)
    assert methods[1:] == sites.resolved(model, NewWords()) and model.config.new_words == 2
    original = loading.load(base, task="captioning")[1]
    assert jnp.array_equal(
        variables["params"]["text_decoder"]["embed"]["word"], original["text_decoder"]["embed"]["word"]
    )


def test_a_study_counts_them_before_it_runs(root, base, tmp_path):
    """In a dry run, and cell by cell: a subset of one picture may lack the words."""

    def make(task):
        return studies.until_plateau(config(root, base, tmp_path), 2)

    variants = {"lora": {"method": "lora", "head": "none", "sizes": (2,), "lr": 1e-3}}
    settings = {"captions": {"task": "captioning"}}
    c = studies.study("words", "", settings, variants, budgets=(), n_images=(1, 7), seeds=1, make_point=make)
    said = cost.dry_run(c, tmp_path / "study")
    alone = budget.abstract_counts(setup.abstract_model(make("captioning")), jp.LoRA(rank=2))["stored"]
    tables = {line.split()[0]: line.split()[2] for line in said.splitlines() if line.startswith("captions-")}
    assert tables["captions-lora2-n7"] == f"{alone + 2 * (tiny.CONFIG['text_width'] + 1):,}"
    assert set(tables) == {"captions-lora2-n1", "captions-lora2-n7"}


def test_one_emoji_changes_nothing_for_a_base_with_word_pieces(root, base, tmp_path):
    words = loading.load(base)[0].tokenizer
    pieces = dataclasses.replace(words, vocabulary=(*words.vocabulary[:-1], "##s"))
    assert pieces.has_pieces and not words.has_pieces
    model = setup.abstract_model(config(root, base, tmp_path))
    c = config(root, base, tmp_path)
    split = data.load(c.data, ["train"])["train"]
    chosen = setup.methods_of(c)
    with_pieces = blip.Blip.build(model.config, pieces)
    same, methods, unknown, new = setup.with_new_words(c, tasks.build("captioning"), with_pieces, chosen, split)
    assert (same, methods, new) == (with_pieces, chosen, []) and set(unknown) >= {EMOJI, "snorkwobble"}
    wider, methods, unknown, new = setup.with_new_words(c, tasks.build("captioning"), model, chosen, split)
    assert wider.config.new_words == 2 and NewWords() in methods and not unknown and new == ["snorkwobble", EMOJI]
    c.model.extend_vocabulary = False
    assert setup.with_new_words(c, tasks.build("captioning"), model, chosen, split)[3] == []


@pytest.mark.slow
def test_rows_of_their_own_compute_what_one_matrix_computes():
    """Logits, and what methods read of the base: PiSSA of the tied head, a prompt that starts from words."""
    model, params = tiny.model(False), tiny.params(False)
    wider, more, _ = loading.extend_vocabulary(model, params, ["zebra", "yak"], seed=0)
    whole, joined = loading.joined(wider, more)
    n = len(tiny.TOKENIZER)
    batch = tiny.batch()
    batch["tokens"] = np.array(batch["tokens"])
    batch["tokens"][:, 0, 1] = n + 1  # yak
    np.testing.assert_array_equal(wider.apply({"params": more}, batch), whole.apply({"params": joined}, batch))
    for method in (
        jp.PiSSA(targets="head/vocabulary$", rank=2), jp.Head(matrix="untied"), jp.Prompt(targets="^text_decoder$", length=2),
        jp.LoRA(targets="head/vocabulary$", rank=2),
    ):  # fmt: skip
        ours = sites.attach(wider, more, method, jax.random.key(0))
        theirs = sites.attach(whole, joined, method, jax.random.key(0))
        assert tree.digest(ours["peft"]) == tree.digest(theirs["peft"])
        np.testing.assert_allclose(wider.apply(ours, batch), whole.apply(theirs, batch), atol=1e-6)


def test_spare_rows_of_a_matrix_are_no_rows_of_new_words():
    """A matrix may have more rows than its tokenizer has words; a new word's id must not fall on one, which is frozen."""
    size = len(tiny.TOKENIZER) + 3
    model, params = tiny.model(False, vocab_size=size), tiny.params(False, vocab_size=size)
    wider, more, _ = loading.extend_vocabulary(model, params, ["zebra"], seed=0)
    assert wider.config.vocab_size == len(tiny.TOKENIZER) + 1 and wider.config.new_words == 1
    assert more["text_decoder"]["embed"]["word"].shape[0] == len(tiny.TOKENIZER)
    assert wider.tokenizer.ids["zebra"] == len(tiny.TOKENIZER)


def test_full_tuning_trains_the_new_rows_with_the_rest(root, base, tmp_path):
    c = config(root, base, tmp_path, **{"head": "none"})
    c.method = {"name": "full"}
    train = data.load(c.data, ["train"])["train"]
    model, params, chosen, _ = setup.setup_model(c, tasks.build("captioning"), train, lambda *_: None)
    assert chosen == (jp.Full(),) and model.config.new_words == 2
    variables = sites.attach(model, params, chosen, jax.random.key(0))
    mask = tree.flatten(sites.trainable(variables))
    assert all(mask[f"params/text_decoder/{name}"] for name in ("embed/new_word", "head/new_bias"))
    jp.save_tuned(model, variables, tmp_path / "tuned")
    _, methods = jp.load_tuned(model, params, tmp_path / "tuned")
    assert [one.name for one in methods] == ["full"]


@pytest.mark.slow
def test_a_run_that_kept_the_whole_embedding_still_loads(ran, tmp_path):
    """As version 0.1 wrote it: one matrix, trained whole by 'selective'."""
    shutil.copytree(ran[2], tmp_path / "run")
    model, variables, _, task = jp.load_run(tmp_path / "run")
    whole, params = loading.joined(model, variables["params"])
    selective = Selective(leaves=r"^params/text_.*/(embed/word|head/bias|head/vocabulary/kernel)$")
    old = sites.resolved(whole, (jp.LoRA(rank=2), selective))
    shared = {str(i): sites.Bound(one, sites.NOWHERE, {}, True) for i, one in enumerate(old)}
    jp.save_tuned(
        whole, {"params": params, "peft": variables["peft"] | {sites.SHARED: shared}}, tmp_path / "run" / "tuned"
    )
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    del result["model"]["new_rows"], result["imports"], result["validation"]
    path.write_text(json.dumps(result))
    again, back, methods, _ = jp.load_run(tmp_path / "run")
    assert again.config.new_words == 0 and methods == old
    picture = np.full((20, 20, 3), 90, np.uint8)
    assert jp.generate(again, back, picture, task=task) == jp.generate(model, variables, picture, task=task)


def test_a_vocabulary_is_not_all_new():
    with pytest.raises(ValueError, match="new_words is 20; it must be below vocab_size 20"):
        tiny.model(False, vocab_size=20, new_words=20)
