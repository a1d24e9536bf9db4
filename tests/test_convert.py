"""The converter: every tensor and leaf accounted for, leaves made one at a time, and only as much of them as is asked for."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm
from safetensors.numpy import save_file

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.models import convert, loading, mplug
from jaxpeft.models.base import MODELS
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.models.convert import Rule, Table
from jaxpeft.models.paligemma import PaliGemma, PaliGemmaConfig
from jaxpeft.models.smolvlm import SmolVLM, SmolVLMConfig
from jaxpeft.training import sharding

RULES = (  # every kind of transform, with layers that do not begin at 0
    Rule("a.{}.qkv", ("block/q", "block/k", "block/v"), (12, 5), axes=(1, 0), layers=range(3, 6)),
    Rule("a.{}.b", ("block/bias",), (7,), layers=(1, 4)),
    Rule("conv", ("patch",), (8, 3, 2, 4), axes=(2, 3, 1, 0)),
    Rule("cls", ("cls",), (1, 1, 6), leaf_shape=(6,)),
    Rule("heads", ("heads",), (6, 5), axes=(1, 0), leaf_shape=(5, 2, 3)),
    Rule("plain", ("plain",), (9, 4)),
    Rule("scalar", ("scalar",), ()),
)


def drawn(rules=RULES, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=rule.shape).astype(np.float32) for rule in rules for name in rule.names()}


class Watched:
    """A tensor that counts the elements it gave."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.given = x, x.shape, x.dtype, 0

    def __getitem__(self, index):
        self.given += self.x[index].size
        return self.x[index]


def read(tensors, table, **options):
    return convert.read(tensors, table, "file", **{"place": convert.in_memory} | options)


def test_written_is_the_inverse_of_read():
    tensors = drawn()
    flat = read(tensors, Table(RULES))
    assert flat["block/k"].shape == (3, 5, 4) and flat["heads"].shape == (5, 2, 3)
    np.testing.assert_array_equal(flat["block/k"][1], tensors["a.4.qkv"][4:8].T)
    np.testing.assert_array_equal(flat["block/bias"][1], tensors["a.4.b"])
    np.testing.assert_array_equal(flat["patch"][1, 3, 2, 6], tensors["conv"][6, 2, 1, 3])
    again = convert.written(flat, Table(RULES))
    assert again.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)


def test_a_part_of_a_leaf_is_that_part_of_the_whole_and_reads_no_more():
    rng = np.random.default_rng(1)
    watched = {name: Watched(x) for name, x in drawn().items()}
    for name, leaf in convert.leaves(watched, Table(RULES), "file").items():
        whole = leaf[...]
        for _ in range(20):
            bounds = [sorted(rng.integers(0, n + 1, 2)) for n in leaf.shape]
            index = tuple(slice(*bound) for bound in bounds)
            before = sum(x.given for x in watched.values())
            part = leaf[index]
            np.testing.assert_array_equal(part, whole[index], err_msg=name)
            if leaf.rule.leaf_shape is None:
                assert sum(x.given for x in watched.values()) - before == part.size, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", lambda name: "bfloat16" if "block" in name else "float32"])
def test_leaves_get_the_type_that_is_wanted(dtype):
    flat, tensors = read(drawn(), Table(RULES), dtype=dtype), drawn()
    kind = dtype if isinstance(dtype, str) else "bfloat16"
    assert flat["block/q"].dtype == np.dtype(kind)
    assert flat["plain"].dtype == np.dtype("bfloat16" if dtype == "bfloat16" else "float32")
    np.testing.assert_array_equal(flat["block/q"][0], tensors["a.3.qkv"][:4].T.astype(kind))


def test_every_tensor_is_read_or_dropped_by_a_rule_or_named():
    table = Table(RULES, dropped=((r"^text_model\.", "the text side, which nothing reads"),), tied={"head": "plain"})
    tensors = drawn() | {"text_model.a": np.zeros(3)}
    tensors["head"] = tensors["plain"]
    assert read(tensors, table).keys() == {leaf for rule in RULES for leaf in rule.leaves}
    with pytest.raises(ValueError, match=r"(?s)file .*unexpected \(1\): extra"):
        read(tensors | {"extra": np.zeros(2)}, table)
    with pytest.raises(ValueError, match="file: head differs from plain"):
        read(tensors | {"head": tensors["plain"] + 1}, table)
    del tensors["a.4.qkv"]
    with pytest.raises(ValueError, match=r"(?s)file .*missing \(1\): a\.4\.qkv"):
        read(tensors, table)
    with pytest.raises(ValueError, match=r"wrong shape \(1\): conv: expected \(8, 3, 2, 4\), got \(2,\)"):
        read(drawn() | {"conv": np.zeros(2)}, Table(RULES))


@pytest.mark.parametrize("rule", [Rule("other", ("plain",), (2,)), Rule("a.4.b", ("other",), (2,))])
def test_two_rules_for_one_tensor_or_leaf_are_refused(rule):
    with pytest.raises(ValueError, match="two rules for the (leaf plain|tensor a.4.b)"):
        Table((*RULES, rule))


def test_copies_share_an_array_and_unwanted_leaves_are_not_read():
    watched = {name: Watched(x) for name, x in drawn().items()}
    flat = read(watched, Table(RULES), copies={"again": "plain", "never": "conv"}, wanted={"again", "scalar"})
    assert flat.keys() == {"plain", "again", "scalar"} and flat["again"] is flat["plain"]
    assert watched["conv"].given == 0


def test_large_tied_tensors_are_compared_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(convert, "ELEMENTS", 10)
    x = drawn()["plain"]
    y = x.copy()
    y[8, 3] += 1
    assert convert.equal(Watched(x), Watched(x.copy())) and not convert.equal(Watched(x), Watched(y))
    assert not convert.equal(x, x[:8]) and convert.equal(x[0, 0], x[0, 0])


# ---------------------------------------------------------------- files and memory

BIG = tuple(Rule(f"w{i}", (f"w{i}",), (1000, 500), axes=(1, 0)) for i in range(20))  # 2 MB each


def big(directory, kind):
    """40 MB of weights in a directory, in one file or two."""
    tensors = drawn(BIG)
    if kind == "torch":
        torch = pytest.importorskip("torch", reason="writes a torch file: pip install -e .[golden]")
        torch.save({name: torch.tensor(x) for name, x in tensors.items()}, directory / "pytorch_model.bin")
    elif kind == "shards":
        names = [list(tensors)[i::2] for i in range(2)]
        for i, part in enumerate(names):
            save_file({name: tensors[name] for name in part}, directory / f"model-{i}.safetensors")
        where = {name: f"model-{i}.safetensors" for i, part in enumerate(names) for name in part}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        save_file(tensors, directory / "model.safetensors")
    return tensors


KINDS = pytest.mark.parametrize("kind", ["safetensors", "shards", "torch"])


@KINDS
def test_a_checkpoint_is_never_twice_in_memory(tmp_path, kind):
    expected = big(tmp_path, kind)
    tracemalloc.start()
    try:
        flat = convert.read(convert.opened(tmp_path), Table(BIG), "file", place=convert.in_memory)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 40e6 < kept < 41e6
    assert peak - kept < 3 * 2e6  # a tensor on its way, not forty megabytes
    for name, x in expected.items():
        np.testing.assert_array_equal(flat[name], x.T)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_page_of_a_file_stays_resident(tmp_path):
    """Counted by the kernel, as mapped files are invisible to Python."""
    kinds = ["safetensors", "shards", *(["torch"] if importlib.util.find_spec("torch") else [])]
    for kind in kinds:
        (tmp_path / kind).mkdir()
        big(tmp_path / kind, kind)
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(jp.__path__[0] + "/..")!r})
from jaxpeft.models import convert
from jaxpeft.models.convert import Rule, Table

def mapped():
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))

rules = [Rule(f"w{{i}}", (f"w{{i}}",), (1000, 500), axes=(1, 0)) for i in range(20)]
for kind in {kinds}:
    tensors = convert.opened(Path({str(tmp_path)!r}) / kind)
    before = mapped()
    convert.read(tensors, Table(rules), "file", place=lambda name, leaf: leaf[...].sum())
    print(mapped() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    stayed = dict(zip(kinds, map(int, run.stdout.split()), strict=True))
    assert max(stayed.values()) < 10_000, stayed  # KB, of 40,000 that were read of each


def test_on_cpu_a_leaf_becomes_the_device_s_array_without_a_copy():
    leaf = convert.leaves(drawn(), Table(RULES), "file")["block/q"]
    x = leaf[...]
    assert x.ctypes.data % convert.ALIGNED == 0 and x.flags.c_contiguous
    assert jax.device_put(x).unsafe_buffer_pointer() == x.ctypes.data
    before = x.copy()
    jax.jit(lambda y: y + 1, donate_argnums=0)(jax.device_put(x))  # a step of full tuning may donate it
    np.testing.assert_array_equal(x, before)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    big(tmp_path, "shards")
    save_file({"w0": np.zeros(1), "w1": np.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-1.safetensors: w0 is in another file"):
        convert.opened(tmp_path)


def test_a_type_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"model.safetensors: x has the unsupported type F8_E4M3"):
        convert.opened(tmp_path)


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_go_straight_to_their_place_in_a_mesh(base, dtype):
    on = sharding.mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model, expected, _ = loading.read(base)
    place = sharding.placing(model.sharding, on)
    params = loading.read(base, place=place, param_dtype=dtype)[1]
    wanted = sharding.shardings({"params": params}, model.sharding, on)["params"]
    for name, x in tree.flatten(params).items():
        assert x.sharding == tree.flatten(wanted)[name] and x.dtype == jnp.dtype(dtype), name
        np.testing.assert_array_equal(x, np.asarray(tree.flatten(expected)[name]).astype(x.dtype), err_msg=name)


def test_a_host_reads_the_parts_of_its_own_devices(monkeypatch):
    """With several hosts a sharding is not addressable: each part is then read once, though several devices hold it."""
    monkeypatch.setattr(jax.sharding.NamedSharding, "is_fully_addressable", property(lambda _: False))
    on = sharding.mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rule = Rule("w.{}", ("mlp/up/kernel",), (8, 4), axes=(1, 0), layers=range(2))
    watched = {name: Watched(x) for name, x in drawn((rule,)).items()}
    rules = ((r"mlp/up/kernel$", ("fsdp", None)),)
    (x,) = convert.read(watched, Table((rule,)), "file", place=sharding.placing(rules, on)).values()
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 2, 8)}
    assert [one.given for one in watched.values()] == [32, 32]
    whole = np.stack([watched[f"w.{i}"].x.T for i in range(2)])
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])


# ---------------------------------------------------------------- which model, which task


def test_an_unknown_model_type_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for call in (loading.read, loading.abstract):
        with pytest.raises(ValueError, match=r"config.json: model_type 'clip' is unsupported; choose one of blip"):
            call(tmp_path)


def test_a_task_that_no_model_does_is_named():
    for call in (loading.read, loading.abstract):
        with pytest.raises(ValueError, match="task is 'detection'; Blip supports 'captioning' and 'vqa'"):
            call("tiny", task="detection")


def test_the_old_argument_is_an_error_that_names_the_new_one():
    for value in (True, False, None):
        with pytest.raises(TypeError, match="question_encoder: use task='vqa'"):
            jp.load("tiny", question_encoder=value)


@pytest.mark.parametrize(("task", "asks"), [("vqa", True), ("captioning", False), (None, True)])
def test_the_plan_of_a_model_is_the_model_that_is_read(base, task, asks):
    model, params, _ = loading.read(base, task=task)
    assert model.config.question_encoder is asks and ("text_encoder" in params) is asks
    assert loading.abstract(base, task=task) == model
    tree.check_same(loading.shapes(model), tree.flatten(params), "params")


@pytest.mark.parametrize(
    "model",
    [
        *(Blip(BlipConfig(question_encoder=asks)) for asks in (True, False)),
        Blip(BlipConfig(untied_head=True)),
        *(mplug.Mplug(dataclasses.replace(one, fusion=asks)) for one in mplug.KINDS.values() for asks in (True, False)),
        *(tiny_vlm.model(kind, untied_head=untied) for kind in tiny_vlm.KINDS for untied in (True, False)),
    ],
    ids=lambda model: model.model_type,
)
def test_a_table_fills_every_leaf_once(model):
    """What the model asks for and what the table gives are two descriptions."""
    rules = MODELS[model.model_type]().table(model.config).rules
    given = {leaf: rule.shape_of_leaf for rule in rules for leaf in rule.leaves}
    assert given == {name: x.shape for name, x in loading.shapes(model).items()}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Blip(BlipConfig()), 223_971_644),
        (Blip(BlipConfig(question_encoder=True)), 361_230_140),
        *(
            (mplug.Mplug(dataclasses.replace(mplug.KINDS[kind], fusion=asks)), expected)
            for kind, asks, expected in (
                ("mplug-base", True, 344_683_578),
                ("mplug-base", False, 223_972_410),
                ("mplug-large", True, 565_252_410),
                ("mplug-large", False, 442_177_338),
            )
        ),
        (PaliGemma(PaliGemmaConfig()), 2_923_466_480),
        (SmolVLM(SmolVLMConfig()), 256_484_928),
        (SmolVLM(SmolVLMConfig(untied_head=False)), 228_099_648),
    ],
    ids=lambda x: getattr(x, "model_type", x),
)
def test_released_sizes(model, expected):
    """The parameters that a task uses, counted in transformers' classes and in mPLUG's release."""
    assert sum(np.prod(x.shape) for x in loading.shapes(model).values()) == expected
