"""Pre-training: its batches by hand, its sharing, and that the same command gives the same bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import pretrain as config_file
from jaxpeft import tree
from jaxpeft.apps import pretrain, pretrain_blip, pretrain_mplug, pretrain_smolvlm
from jaxpeft.data import scenes
from jaxpeft.models import loading

TOKENIZER = tiny.SCENES
PROCESSOR = tiny.model().replaced(TOKENIZER).processor


def test_masking_is_berts():
    rng = np.random.default_rng(0)
    batch = pretrain.text_batch(TOKENIZER, np.arange(400), rng)
    chosen = batch["weights"] > 0
    real = batch["targets"] != TOKENIZER.pad_id
    words = real & (batch["targets"] != TOKENIZER.cls_id) & (batch["targets"] != TOKENIZER.sep_id)
    assert not np.any(chosen & ~words)
    assert abs(chosen.sum() / words.sum() - 0.15) < 0.02
    assert abs((batch["tokens"] == TOKENIZER.mask_id)[chosen].mean() - 0.8) < 0.05
    np.testing.assert_array_equal(batch["tokens"][~chosen], batch["targets"][~chosen])


def test_hard_negatives_are_false_and_near():
    """One word changes: a colour or shape so that the pair is not there, or a side so that no such thing is there."""
    rng, moved, changed = np.random.default_rng(0), 0, 0
    for i in range(1200):
        things = scenes.scene("pretrain", i).objects
        caption = scenes.web_captions("pretrain", i, 1)[0]  # of another scene too: those may name what is not there
        wrong = pretrain.edited(caption, scenes.scene("pretrain", i), rng)
        if wrong is None:
            continue
        old, new = caption.split(), wrong.split()
        (k,) = [k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if new[k] in pretrain.OPPOSITE:
            assert new[k] == pretrain.OPPOSITE[old[k]]
            pair = (new[k - 3], new[k - 4])
            assert not any(thing.pair == pair and new[k] in thing.quadrant for thing in things)
            moved += 1
        else:
            k -= new[k] in scenes.SHAPES
            pair = (new[k + 1], new[k])
            assert pair not in {thing.pair for thing in things} and pair not in scenes.HELD_PAIRS
            changed += 1
    assert moved > 120 and changed > 600


def test_nearest_other_shares_words_and_is_another_text():
    captions = [
        "a red circle and a blue square",
        "a blue square and a red circle",
        "a red circle and a blue star",
        "a moon",
    ]
    assert pretrain.nearest_other(captions)[0] == captions[2]  # not its own bag of words in another order


def test_caption_batch_has_one_shape_and_its_own_text_first():
    batches = [
        pretrain.caption_batch(PROCESSOR, "lm_itm", 2, range(s, s + 5), np.random.default_rng(0)) for s in (0, 100)
    ]
    assert [{k: v.shape for k, v in b.items()} for b in batches][0] == {k: v.shape for k, v in batches[1].items()}
    pairs = batches[0]["pairs"]
    assert np.all(pairs[:, :, 0] == TOKENIZER.enc_id)
    own = [TOKENIZER.decode(row[1:]) for row in pairs[:, 0].tolist()]
    assert own == [scenes.web_captions("pretrain", i, 2)[0] for i in range(5)]
    target = batches[0]["targets"][0, 0][batches[0]["weights"][0, 0] > 0]
    assert "a picture of " + TOKENIZER.decode(target.tolist()) == own[0]


@pytest.mark.slow
def test_sharing_ties_all_but_self_attention():
    """A gradient through the encoder reaches the decoder's cross-attention, not the decoder's self-attention."""
    params = pretrain_blip.init(tiny.model(), 0)

    def loss(params):
        batch = tiny.batch()
        variables = {"params": pretrain_blip.shared(params)}
        image_BPD = tiny.model().apply(variables, batch["image"], method="encode_image")
        return jnp.sum(tiny.model().apply(variables, image_BPD, batch["prompt"], method="encode_question") ** 3)

    grads = {name: bool(np.any(g != 0)) for name, g in tree.flatten(jax.jit(jax.grad(loss))(params)).items()}
    assert grads["text_decoder/blocks/cross_attention/value/kernel"] and grads["text_decoder/embed/word"]
    assert not grads["text_decoder/blocks/self_attention/value/kernel"] and not grads["text_decoder/head/dense/kernel"]
    assert grads["text_encoder/blocks/self_attention/value/kernel"]


@pytest.mark.slow
def test_the_same_command_gives_the_same_checkpoint(tmp_path, monkeypatch):
    """Two runs of all three stages, a few steps each, from the config file; also loads as a base."""
    digests = []
    for name in ("one", "two"):
        c = config_file.get_config("steps=3")
        c.batch_size, c.n_heldout, c.log_every = 8, 4, 1
        c.architecture.vision_layers = c.architecture.text_layers = 1
        facts = pretrain.run(c, tmp_path / name, lambda *_: None)
        assert set(facts["scores"]) == ({"human", "web", "clean"} if name == "one" else set())
        monkeypatch.setattr(pretrain, "zero_shot", lambda *_: {})  # once is enough
        _, params, report = loading.read(tmp_path / name / "checkpoint")
        digests.append((report["digest"], tree.digest(params)))
    assert digests[0] == digests[1]


NARROW = {"image_size": 64, "patch_size": 16, "vision_width": 12, "vision_layers": 1, "vision_heads": 2, "vision_mlp": 8,
          "text_width": 12, "text_layers": 2, "text_heads": 2, "text_mlp": 8, "max_positions": 64}  # fmt: skip
OTHERS = {
    "mplug": (pretrain_mplug, {"encoder_layers": 1, "fusion_layers": 3, "stride": 2}),
    "smolvlm": (
        pretrain_smolvlm,
        {"shuffle": 2, "kv_heads": 1, "head_size": 6, "untied_head": False, "max_positions": 128},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_last_stage_of_each_model_trains_every_part(name):
    objectives, more = OTHERS[name]
    model = objectives.model(objectives.tokenizer(), **NARROW | more)
    params, stage = objectives.init(model, 0), list(config_file.STAGES[name])[-1]
    make = lambda seed: pretrain.caption_batch(model.processor, stage, 2, range(4), np.random.default_rng(seed))  # noqa: E731
    batch, again = make(0), make(1)
    assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in again.items()}
    loss = lambda p: objectives.loss(stage, model, {"params": p}, batch, {})[0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert 2 < value < 20
    still = {leaf for leaf, g in tree.flatten(grads).items() if not np.any(g != 0)}
    known = {leaf for leaf in tree.flatten(params) if leaf.endswith("key/bias") or "position" in leaf}
    assert still <= known | {"itm/bias"}, still - known  # both classes weigh the same


@pytest.mark.slow
def test_the_stage_of_questions_trains_encoder_and_decoder_on_answers():
    """The answers to the questions of the batch, and no caption."""
    model = pretrain_blip.model(TOKENIZER, **NARROW)
    params = pretrain_blip.init(model, 0)
    batch = pretrain.caption_batch(model.processor, "qa", 2, range(6), np.random.default_rng(0))
    template = model.for_task("vqa").processor.template("vqa")
    answers = [
        template.text(row[w > 0].tolist())
        for row, w in zip(batch["answer_targets"][:, 0], batch["answer_weights"][:, 0], strict=True)
    ]
    asked = {
        q["answers"][0] for i in range(6) for q in scenes.noisy_questions("pretrain", i) if q["type"] in pretrain.STATED
    }
    assert len(answers) == 12 and set(answers) <= asked
    loss = lambda p, batch: pretrain_blip.loss("qa", model, {"params": p}, batch, {})[0]  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss))
    value, grads = run(params, batch)
    assert run(params, batch | {"targets": batch["targets"] + 1})[0] == value
    still = {leaf for leaf, g in tree.flatten(grads).items() if not np.any(g != 0)}
    assert still <= {
        leaf for leaf in tree.flatten(params) if leaf.endswith("key/bias") or "position" in leaf or "itm" in leaf
    }


def test_bases_of_the_crossed_design_differ_in_their_image_stage_only():
    c, q = (config_file.get_config(f"mixture={name},seed=2") for name in ("captions", "questions"))
    assert (c.order, q.order, c.seed) == (("text", "lm"), ("text", "qa"), 2)
    assert c.stages.text == q.stages.text and c.stages.lm == q.stages.qa and c.architecture == q.architecture
    with pytest.raises(
        ValueError, match="mixture is 'both' with model=blip; choose captions or questions with model=blip"
    ):
        config_file.get_config("mixture=both")


@pytest.mark.slow
def test_mplugs_text_stacks_begin_as_layers_of_the_decoder():
    model = pretrain_mplug.model(pretrain_mplug.tokenizer(), **NARROW | OTHERS["mplug"][1])
    params = pretrain_mplug.init(model, 0)
    after, decoder = pretrain_mplug.after_text(params), params["text_decoder"]
    # one layer of the text encoder, then fusion layers 0, 1 (cross) and 2 (joint); the decoder has two layers
    kernel = lambda blocks: np.asarray(blocks["mlp"]["up"]["kernel"])  # noqa: E731
    np.testing.assert_array_equal(kernel(after["text_encoder"]["blocks"]), kernel(decoder["blocks"])[[0]])
    np.testing.assert_array_equal(kernel(after["text_fusion"]["cross0"]["blocks"]), kernel(decoder["blocks"])[[1, 0]])
    np.testing.assert_array_equal(kernel(after["text_fusion"]["joint1"]["blocks"]), kernel(decoder["blocks"])[[1]])
    np.testing.assert_array_equal(after["text_encoder"]["embed"]["word"], decoder["embed"]["word"])
    for part in ("query", "value"):  # cross-attention keeps its own initialisation
        own = params["text_fusion"]["cross0"]["blocks"]["cross_attention"][part]["kernel"]
        np.testing.assert_array_equal(after["text_fusion"]["cross0"]["blocks"]["cross_attention"][part]["kernel"], own)


def test_the_decoder_only_tokenizer_has_a_token_for_every_word_of_the_scenes():
    tokenizer = pretrain_smolvlm.tokenizer()
    assert tokenizer == pretrain_smolvlm.tokenizer()  # the same on every machine
    assert all(len(tokenizer.pieces(f" {word}")) == 1 for word in scenes.WORDS)
    assert set(pretrain_smolvlm.SPECIAL) <= set(tokenizer.ids)
