"""Tuned trees in and out: our own files exactly, PEFT's against logits that PEFT computed, and what is refused."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import test_mplug
import tiny
import tiny_vlm
from methods_table import ROWS, attached, every_row, perturbed
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import interchange, tree
from jaxpeft.adapt import sites
from jaxpeft.models import loading
from jaxpeft.models.blip import Blip

GOLDEN = Path(__file__).parent / "golden"
PEFT = sorted(path.name for path in (GOLDEN / "peft").iterdir())


@functools.cache
def base():
    return loading.load(GOLDEN / "blip_caption_tiny")


@functools.cache
def numbers():
    return dict(np.load(GOLDEN / "peft.npz"))


@jax.jit
def _logits(variables):
    batch = {"image": numbers()["image"], "tokens": numbers()["tokens"]}
    return base()[0].apply(variables, batch)[:, 0]


def logits(variables):
    return np.asarray(_logits(variables))


# ---------------------------------------------------------------- our own files


@every_row
def test_saved_and_loaded_is_bit_for_bit_what_was_tuned(row, tmp_path):
    variables, mask = attached(row)
    variables = jax.tree.map(lambda x, on: x + 0.25 if on else x, variables, mask)
    interchange.save_tuned(tiny.model(), variables, tmp_path / "tuned")
    back, methods = interchange.load_tuned(tiny.model(), tiny.params(), tmp_path / "tuned")
    expected = sites.fold(variables)
    assert tree.digest(back) == tree.digest(expected)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    assert methods == tuple(one.folded() for one in sites.resolved(tiny.model(), row.build()))
    stored = sum(x.size for x in load_file(tmp_path / "tuned" / "tuned.safetensors").values())
    assert stored == row.stored


@pytest.fixture
def saved(tmp_path):
    row = next(row for row in ROWS if row.name == "lora")
    variables = perturbed(attached(row)[0])
    interchange.save_tuned(tiny.model(), variables, tmp_path / "tuned")
    return tmp_path / "tuned"


def load(directory, params=None):
    return interchange.load_tuned(tiny.model(), params or tiny.params(), directory)


def rewrite(directory, change, metadata=None, name="tuned.safetensors"):
    arrays = load_file(directory / name)
    change(arrays)
    if metadata is None:
        import safetensors

        with safetensors.safe_open(directory / name, "numpy") as file:
            metadata = file.metadata()
    save_file(arrays, directory / name, metadata)


def test_another_base_is_refused(saved):
    with pytest.raises(ValueError, match="tuned on another base: its frozen part has digest"):
        load(saved, jax.tree.map(lambda x: x + 1e-3, tiny.params()))


def test_missing_extra_misshaped_and_damaged_leaves_are_listed(saved):
    name = sorted(load_file(saved / "tuned.safetensors"))[0]

    def spoil(arrays):
        arrays["stranger"] = arrays.pop(name)

    def damage(arrays):
        arrays[name] = arrays[name] + 1

    rewrite(saved, damage)
    with pytest.raises(ValueError, match=f"1 leaves differ from what was saved: {name}"):
        load(saved)
    rewrite(saved, lambda arrays: arrays.update({name: arrays[name][:1]}))
    with pytest.raises(ValueError, match=f"wrong shape.*{name}"):
        load(saved)
    rewrite(saved, spoil)
    with pytest.raises(ValueError, match=f"(?s)missing .1.: {name}.*unexpected .1.: stranger"):
        load(saved)


def test_a_changed_manifest_is_refused(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["methods"][0]["alpha"] = 64.0
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json was changed after it was written"):
        load(saved)


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    row = ROWS[-1]
    with pytest.raises(ValueError, match="holds other files"):
        interchange.save_tuned(tiny.model(), attached(row)[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("value", [{"name": "os.system"}, {"name": "LoRA", "ranks": 3}])
def test_a_manifest_names_known_methods_and_fields_only(value):
    with pytest.raises(ValueError, match="in a manifest"):
        interchange.from_json(value)


# ---------------------------------------------------------------- PEFT's files


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT)
def test_what_peft_wrote_computes_what_peft_computes(name):
    model, params = base()
    variables, _ = jp.import_peft(model, params, GOLDEN / "peft" / name)
    expected = numbers()[name]
    assert np.abs(expected - logits({"params": params})).max() > 0.05  # the adapter does something
    np.testing.assert_allclose(logits(variables), expected, atol=5e-5)


@pytest.mark.parametrize("name", PEFT)
def test_what_we_write_has_the_names_and_shapes_of_pefts_file(name, tmp_path):
    """Export what was imported: the same tensors, and the same function."""
    model, params = base()
    variables, methods = jp.import_peft(model, params, GOLDEN / "peft" / name)
    jp.export_peft(model, variables, tmp_path / "out")
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", GOLDEN / "peft" / name))
    if name in (
        "lora",
        "all_linear",
        "rslora",
        "dora",
    ):  # PEFT has one A for the fused query, key and value; we have one for each
        ours, theirs = ({k: x for k, x in one.items() if "vision" not in k} for one in (ours, theirs))
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    for key in ours:
        if "lora_B" not in key:  # modules of different rank and alpha: B may hold a part of the scale
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6)
    again, _ = jp.import_peft(model, params, tmp_path / "out")
    np.testing.assert_allclose(logits(again), numbers()[name], atol=5e-5)


@pytest.mark.slow
def test_layers_and_heads_survive_the_way_there_and_back(tmp_path):
    model, params = base()
    method = (jp.Scoped(method=jp.LoRA(rank=2), layers=(1,)), jp.Head(matrix="untied"))
    variables = jp.attach(model, params, method, jax.random.key(0))
    mask = jp.trainable(variables)
    variables = jax.tree.map(lambda x, on: x + 0.1 if on else x, variables, mask)
    jp.export_peft(model, variables, tmp_path / "out")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(".layer.0." in name for name in names) and any(".cls.predictions.decoder" in name for name in names)
    back, methods = jp.import_peft(model, params, tmp_path / "out")
    assert [type(one).__name__ for one in methods] == ["Scoped", "Head"] and methods[0].layers == (1,)
    np.testing.assert_allclose(logits(back), logits(variables), atol=1e-5)


@pytest.mark.parametrize(
    "method, names",
    [
        (jp.LoRA(targets="query$|mlp/up$", rank=2), ["LoRA"]),
        (jp.VeRA(targets="self_attention/query$|mlp/up$", rank=2), ["VeRA"]),
        (jp.OFT(targets="self_attention/query$|mlp/up$", block=2), ["OFT"]),
        (jp.Scoped(method=jp.LoRA(targets="attention/query$", rank=2), layers=(0, 1)), ["LoRA", "Scoped"]),
    ],
)
@pytest.mark.slow
def test_stacks_of_different_depth_share_a_method(method, names, tmp_path):
    """As those of BLIP-large (24 and 12 layers), SmolVLM and PaliGemma do."""
    model, params = tiny.model(False, vision_layers=3), tiny.params(False, vision_layers=3)
    variables = perturbed(jp.attach(model, params, method, jax.random.key(0)))
    jp.export_peft(model, variables, tmp_path / "out")
    back, methods = jp.import_peft(model, params, tmp_path / "out")
    assert [type(one).__name__ for one in methods] == names
    batch = tiny.batch()
    np.testing.assert_allclose(model.apply(back, batch), model.apply(variables, batch), atol=1e-5, rtol=1e-4)
    jp.export_peft(model, back, tmp_path / "again")


@pytest.mark.parametrize(
    "method, reason",
    [
        (jp.SerialAdapter(bottleneck=2), "serial_adapter has no PEFT type"),
        (jp.Prompt(length=2, init_weights="normal"), "positions='shift'"),
        (jp.Prefix(length=2, positions="shift"), "PEFT supports it at text_decoder/blocks/self_attention only"),
        (jp.VeRA(targets="vision.*query$", rank=2), "is fused in transformers"),
        (jp.OFT(targets="vision.*query$", block=2), "is fused in transformers"),
        (jp.Scoped(method=jp.OFT(block=4), layers=(0,)), "oft in some layers only is unsupported"),
        ((jp.LoRA(rank=2), jp.IA3()), "a PEFT directory holds one type"),
        (jp.IA3(targets="head/vocabulary$"), "PEFT also scales the bias"),
        (jp.LoRA(targets="vision/patch$", rank=2), "convolution"),
        (jp.BitFit(), "bitfit has no PEFT type"),
    ],
)
def test_what_has_no_place_over_there_is_refused_with_the_reason(method, reason, tmp_path):
    model, params = base()
    variables = jp.attach(model, params, method, jax.random.key(0))
    with pytest.raises(ValueError, match=reason):
        jp.export_peft(model, variables, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Unregistered(Blip):
    model_type = "mine"  # which MODELS does not have


@pytest.mark.parametrize(
    ("model", "params"),
    [(test_mplug.MODEL, test_mplug.params), (Unregistered.build(tiny.model().config, tiny.TOKENIZER), tiny.params)],
    ids=lambda x: type(x).__name__,
)
def test_a_model_that_transformers_does_not_have_is_refused(model, params, tmp_path):
    params, message = params(), f"{type(model).__name__} has no Hugging Face form; use save_tuned"
    variables = jp.attach(model, params, jp.LoRA(rank=2), jax.random.key(0))
    for export in (jp.export_hf, jp.export_peft):
        with pytest.raises(ValueError, match=message):
            export(model, variables, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        jp.import_peft(model, params, GOLDEN / "peft" / "lora")
    back, _ = jp.load_tuned(model, params, jp.save_tuned(model, variables, tmp_path / "tuned"))
    assert tree.digest(back) == tree.digest(variables)


def test_layers_of_a_fused_matrix_may_differ_in_rank(tmp_path):
    """LoRA on layer 0's query and on all values: PEFT's matrix over query, key and value has rank 5 there, 3 elsewhere."""
    model, params = base()
    methods = (
        jp.Scoped(method=jp.LoRA(targets="^vision.*attention/query$", rank=2), layers=(0,)),
        jp.LoRA(targets="^vision.*attention/value$", rank=3),
    )
    variables = perturbed(jp.attach(model, params, methods, jax.random.key(0)))
    jp.export_peft(model, variables, tmp_path / "out")
    assert len(set(json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"].values())) == 2
    back, _ = jp.import_peft(model, params, tmp_path / "out")
    np.testing.assert_allclose(logits(back), logits(variables), atol=1e-5, rtol=1e-4)


def test_the_vocabulary_matrix_that_peft_saves_beside_an_adapted_head_is_checked(tmp_path):
    model, params = base()
    variables = perturbed(
        jp.attach(model, params, jp.LoRA(targets="query$|head/vocabulary$", rank=2), jax.random.key(0))
    )
    jp.export_peft(model, variables, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    matrix = np.array(params["text_decoder"]["embed"]["word"])
    more = {"base_model.model.text_decoder.cls.predictions.decoder.base_layer.weight": matrix}
    save_file(load_file(weights) | more, weights)
    back, _ = jp.import_peft(model, params, tmp_path)
    np.testing.assert_allclose(logits(back), logits(variables), atol=1e-5, rtol=1e-4)
    matrix[0, 0] += 1
    save_file(load_file(weights) | more, weights)
    with pytest.raises(ValueError, match="decoder.base_layer.weight differs from text_decoder/embed/word"):
        jp.import_peft(model, params, tmp_path)


@pytest.mark.parametrize(
    "model", [*map(tiny.model, (True, False)), *map(tiny_vlm.model, tiny_vlm.KINDS)], ids=lambda model: model.model_type
)
def test_every_linear_and_norm_has_a_place(model):
    """The sites of a model are the places that its Hugging Face form knows."""
    found = {site.path for site in sites.sites(model) if site.kind in ("linear", "norm")}
    assert found == set(model.hf.places)


@pytest.fixture
def exported(tmp_path):
    model, params = base()
    method = jp.LoRA(rank=2)
    variables = jp.attach(model, params, method, jax.random.key(0))
    variables = jax.tree.map(lambda x, on: x + 0.1 if on else x, variables, jp.trainable(variables))
    return jp.export_peft(model, variables, tmp_path / "out")


def spoil_config(directory, **values):
    config = json.loads((directory / "adapter_config.json").read_text()) | values
    (directory / "adapter_config.json").write_text(json.dumps(config))


def strip(directory):
    """As PEFT writes it: no digests."""
    rewrite(directory, lambda arrays: None, {"format": "pt"}, "adapter_model.safetensors")


def test_a_wrong_alpha_is_refused(exported):
    spoil_config(exported, lora_alpha=64)
    with pytest.raises(ValueError, match="adapter_config.json was changed after it was written"):
        jp.import_peft(*base(), exported)


def test_peft_files_on_another_base_are_refused(exported):
    model, params = base()
    with pytest.raises(ValueError, match="tuned on another base"):
        jp.import_peft(model, jax.tree.map(lambda x: x + 1e-3, params), exported)


KEY = "base_model.model.text_decoder.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop(KEY.replace("lora_A", "lora_B")), "lora_B.weight is missing"),
        (lambda a: a.update({KEY: a[KEY][:1]}), r"query has A \(1, .*expected"),
        (lambda a: a.update({"stranger": a[KEY]}), "1 unexpected tensors: stranger"),
        (lambda a: a.update({KEY.replace("query", "qurey"): a[KEY]}), "modules that this model does not have: .*qurey"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(exported, change, message):
    strip(exported)
    rewrite(exported, change, {"format": "pt"}, "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        jp.import_peft(*base(), exported)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is unsupported; choose one of LORA, IA3"),
        (
            {
                "peft_type": "OFT",
                "use_cayley_neumann": True,
                "init_lora_weights": None,
                "lora_alpha": None,
                "lora_dropout": None,
            },
            "truncated series",
        ),
        ({"bias": "all"}, "bias='all' is unsupported"),
        ({"a_field_of_a_later_peft": 3}, "a_field_of_a_later_peft=3 is unsupported"),
        (
            {"velora_config": {"scale": 2}, "use_bdlora": {"n": 1}},
            "use_bdlora={'n': 1}, velora_config={'scale': 2} is unsupported",
        ),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights='{start}' changed the base weights")
            for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "what_comes_next")
        ),
        ({"modules_to_save": ["decoder"]}, "only .*cls.* the head"),
    ],
)
def test_configurations_that_would_be_read_wrongly_are_refused(exported, values, message):
    strip(exported)
    spoil_config(exported, **values)
    with pytest.raises(ValueError, match=message):
        jp.import_peft(*base(), exported)


@pytest.mark.parametrize(
    "values",
    [{"init_lora_weights": start} for start in (False, "gaussian", "eva", "orthogonal")]
    + [{"a_field_of_a_later_peft": off} for off in (None, False, {}, [])]
    + [
        {
            "exclude_modules": ["key"],
            "layers_to_transform": [0, 1],
            "task_type": "CAUSAL_LM",
            "eva_config": {"rho": 2.0},
        }
    ],
)
def test_what_changes_nothing_is_read(exported, values):
    strip(exported)
    before, _ = jp.import_peft(*base(), exported)
    spoil_config(exported, **values)
    after, _ = jp.import_peft(*base(), exported)
    assert tree.digest(before) == tree.digest(after)


def test_a_pickle_says_how_to_convert_it(exported):
    (exported / "adapter_model.safetensors").rename(exported / "adapter_model.bin")
    with pytest.raises(
        ValueError, match="holds adapter_model.bin, a pickle; save it as adapter_model.safetensors.*save_pretrained"
    ):
        jp.import_peft(*base(), exported)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # transformers 5.23 of itself
def test_live_inits_of_peft_are_exact_or_refused(tmp_path):
    """Adapters that the installed PEFT makes in each of its ways to begin: its logits, or an error that names the field."""
    peft = pytest.importorskip("peft", reason="compares with the installed PEFT: pip install -e .[golden]")
    torch = pytest.importorskip("torch", reason="as above")
    transformers = pytest.importorskip("transformers", reason="as above")
    model, params = base()
    tokens = torch.tensor(numbers()["tokens"][:, 0]).long()
    image = torch.tensor(numbers()["image"]).permute(0, 3, 1, 2)
    read = {}
    for start in (True, False, "gaussian", "orthogonal", "pissa", "olora"):
        whole = transformers.BlipForConditionalGeneration.from_pretrained(GOLDEN / "blip_caption_tiny").eval()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=start)
        there = peft.get_peft_model(whole, config).eval()
        for parameter in there.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        there.save_pretrained(tmp_path / str(start))
        with torch.no_grad():
            context = whole.vision_model(image)[0]
            mask = torch.ones_like(tokens)
            out = whole.text_decoder(input_ids=tokens, attention_mask=mask, encoder_hidden_states=context)
        try:
            variables, _ = jp.import_peft(model, params, tmp_path / str(start))
        except ValueError as error:
            assert f"init_lora_weights={start!r}" in str(error)
            continue
        read[start] = float(np.abs(logits(variables) - out.logits.numpy()).max())
    assert list(read) == [True, False, "gaussian", "orthogonal"] and max(read.values()) < 5e-5


@pytest.mark.slow
def test_live_against_peft(tmp_path):
    """The script that compares everything with the installed PEFT, on two of its cases."""
    pytest.importorskip("peft", reason="compares with the installed PEFT: pip install -e .[golden]")
    import subprocess
    import sys

    script = Path(__file__).parents[1] / "benchmarks" / "interchange.py"
    for case in ("LoRA, fused ViT qkv too", "LoRA, every linear, the tied one too", "Prefix"):
        done = subprocess.run([sys.executable, script, "--only", case], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
