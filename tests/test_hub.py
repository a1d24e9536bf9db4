"""Checkpoint directories in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import hub, tree
from jaxpeft.pretrain import ALIASES, init, shared


@pytest.fixture
def saved(tmp_path):
    params = init(tiny.model(), 1)
    del params["itm"]
    return hub.save(tmp_path / "base", tiny.model(), shared(params), aliases=ALIASES, note="hello"), shared(params)


def test_round_trip_shares_what_the_aliases_say(saved):
    directory, params = saved
    model, loaded, report = hub.read(directory)
    assert model == tiny.model() and report["digest"]
    half = jax.tree.map(lambda x: np.float16(x).astype(np.float32), params)
    assert tree.digest(loaded) == tree.digest(half)
    from safetensors.numpy import load_file

    stored = load_file(directory / "model.safetensors")
    assert sum(x.size for x in stored.values()) < tree.count(params)
    assert not any(name.startswith("text_encoder/embed") for name in stored)


def test_captioning_leaves_the_question_encoder_out(saved):
    model, params = hub.load(saved[0], question_encoder=False)
    assert not model.config.question_encoder and set(params) == {"vision", "text_decoder"}


def test_image_size_resizes_positions(saved):
    model, params = hub.load(saved[0], image_size=32)
    assert model.config.image_size == 32 and params["vision"]["position"].shape == (1 + 16, 12)


def test_alias_that_does_not_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text_encoder/embed/.* differs from text_decoder"):
        hub.save(tmp_path / "x", tiny.model(), tiny.params(), aliases=ALIASES)


def test_missing_and_extra_leaves_are_listed(saved):
    from safetensors.numpy import load_file, save_file

    file = saved[0] / "model.safetensors"
    leaves = load_file(file)
    leaves["vision/extra"] = leaves.pop("vision/norm/bias")
    save_file(leaves, file)
    with pytest.raises(ValueError, match=r"(?s)missing \(1\): vision/norm/bias.*unexpected \(1\): vision/extra"):
        hub.load(saved[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hub.load("no/such/place"), "no checkpoint at 'no/such/place'.*shipped names: tiny"),
        (lambda: hub.load("tiny", batch=3), r"unknown model options \['batch'\]"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_extended_vocabulary_keeps_old_rows_and_answers(saved):
    model, params = hub.load(saved[0])
    wider, more, new = hub.extend_vocabulary(model, params, ["zebra", "w3", "yak"], seed=0)
    assert new == ("zebra", "yak") and wider.config.vocab_size == model.config.vocab_size + 2
    batch, n = tiny.batch(), model.config.vocab_size
    before = model.apply({"params": params}, batch)
    after = wider.apply({"params": more}, batch)
    np.testing.assert_allclose(after[..., :n], before, atol=1e-6)
    assert 0 < float(jnp.std(more["text_decoder"]["embed"]["word"][n:])) < 0.05
    same, same_params, none = hub.extend_vocabulary(model, params, ["w3"], seed=0)
    assert not none and same is model and same_params is params


def test_the_shipped_checkpoint_is_what_its_manifest_says():
    directory = hub.ASSETS / "tiny"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (directory / "model.safetensors").stat().st_size <= 8 << 20
    model, params, report = hub.read("tiny")
    from safetensors.numpy import load_file

    stored = {name: x.astype(np.float32) for name, x in load_file(directory / "model.safetensors").items()}
    assert tree.digest(stored) == manifest["digest"] == report["digest"]
    assert model.config.question_encoder and manifest["scores"]["web"]["n"] >= 500
    from jaxpeft.datasets import scenes

    assert all(word in model.tokenizer.ids for word in scenes.WORDS)
    assert "command" in manifest and manifest["total_s"] > 0
