"""The plan of a run, against the run itself, its arrays on eight devices, and counts made by hand."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import tiny
from jax.experimental import topologies
from test_sharding import SIZES
from tiny import config_of

from jaxpeft import tasks, tree
from jaxpeft.runtime import host
from jaxpeft.training import preflight, run, setup, sharding

ROOT = Path(__file__).resolve().parents[1]


class Reached(Exception):
    pass


def what_the_run_trains(c, tmp_path, monkeypatch):
    """(trainable, frozen, batch) as `run.run` hands them to the training loop."""
    seen = []

    def fit(config, workdir, job, *_):
        seen.append((job.trainable, job.frozen, next(job.batches(0))))
        raise Reached

    monkeypatch.setattr(run, "fit", fit)
    with pytest.raises(Reached):
        run.run(c, tmp_path, lambda *_: None)
    return seen[0]


def shapes_of(x):
    return {name: (leaf.shape, str(leaf.dtype)) for name, leaf in tree.flatten(x).items() if leaf is not None}


def planned(c):
    model = setup.abstract_model(c)
    return model, *preflight.step_in_shapes(c, model)


@pytest.mark.parametrize(
    ("task", "method", "changes"),
    [
        ("vqa", "lora", {}),
        ("captioning", "prefix", {"data.augment": "crop"}),
        ("vqa", "full", {"model.frozen_dtype": "bfloat16"}),
        ("captioning", "lora", {"model.frozen_dtype": "bfloat16", "model.dtype": "bfloat16"}),
    ],
)
def test_the_planned_shapes_are_those_of_the_run(base, tmp_path, monkeypatch, task, method, changes):
    c = config_of(base, task, method, **changes)
    _, _, (state, frozen, batch), n_bytes = planned(c)
    tuned_run, frozen_run, batch_run = what_the_run_trains(c, tmp_path, monkeypatch)
    row = batch_run.get("image_tokens", np.zeros((1, 0)))[0]  # computed once for every image that is read
    assert n_bytes == (c.data.n_train + c.data.n_val + c.data.n_test) * row.nbytes
    assert shapes_of(state.tuned) == shapes_of(tuned_run)
    assert shapes_of(frozen) == shapes_of(frozen_run)
    if "image_tokens" in batch:
        assert batch["image_tokens"].shape == batch_run["image_tokens"].shape
    # texts are as long as the longest of those read, and a plan reads a few of them
    assert {name: x.dtype for name, x in batch.items()} == {name: x.dtype for name, x in batch_run.items()}
    assert {x.shape[0] for x in batch.values()} == {c.batch_size}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose lengths eight devices divide: that of the other tests is never split."""
    return tiny.saved(tmp_path_factory.mktemp("wide") / "base", tiny.of_scenes(**SIZES))[0]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_planned_bytes_are_those_on_a_device(wide, axes):
    """The arguments that XLA plans are, to the byte, what the arrays take on the first device."""
    c = config_of(wide, **{"data.augment": "crop"})  # so that the image encoder runs, and is an argument
    model, step, (state, frozen, batch), n_bytes = planned(c)
    assert n_bytes == 0  # nothing is computed once
    mesh = sharding.mesh(axes)
    plan = preflight.compiled(step, (state, frozen, batch), model.sharding, mesh)
    assert plan.peak == plan.arguments + plan.temporary
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    taken = 0
    for one, where in (
        (state, sharding.shardings(state, model.sharding, mesh)),
        (frozen, sharding.shardings(frozen, model.sharding, mesh)),
        (batch, jax.tree.map(lambda _: rows, batch)),
    ):
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), one)
        for leaf in jax.tree.leaves(jax.device_put(zeros, where)):
            taken += leaf.addressable_shards[0].data.nbytes
    unused = plan.arguments - taken  # a step drops what it does not read, and aligns nothing on CPU
    assert -64 <= unused <= 0, (plan.arguments, taken)
    assert plan.temporary > 0
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, frozen)))
    assert plan.arguments < 0.6 * whole  # most weights are split; the vocabulary, which eight does not divide, is not


@pytest.mark.slow
def test_flops_count_every_layer():
    """Layers add alike, although XLA counts the body of a loop once; and FLOPs are of the whole batch."""
    task, batch = tasks.build("vqa"), {n: tiny.batch(n) for n in (4, 8)}

    def flops(n_layers, n=8):
        model = tiny.model(vision_layers=n_layers, text_layers=n_layers)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))["params"]

        def step(params, batch, model):
            return jax.grad(lambda params: task.loss(model, {"params": params}, batch, None)[0])(params)

        return preflight.flops_of(step, (params, batch[n]), model)

    one, two, four = flops(1), flops(2), flops(4)
    assert two > 1.2 * one
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
    assert two == pytest.approx(2 * flops(2, 4), rel=0.02)  # a loss has a few terms that are not per row


def test_flops_are_those_of_the_products():
    model = tiny.model()  # says what is written out, and is not used
    a, b = jax.ShapeDtypeStruct((32, 64), np.float32), jax.ShapeDtypeStruct((64, 16), np.float32)
    assert preflight.flops_of(lambda a, b, model: a @ b, (a, b), model) == 2 * 32 * 64 * 16


# ---------------------------------------------------------------- what is printed


def number(text, row):
    return float(re.search(rf"^{row} +([\d.,e+]+)", text, re.M)[1].replace(",", ""))


@pytest.mark.slow
def test_the_largest_batch_fits_and_a_larger_one_does_not(base, monkeypatch):
    c, memory, plan = config_of(base), 3e5, preflight.compiled

    @functools.cache
    def peak_of(n_rows):
        step, shapes, _ = preflight.step_in_shapes(config_of(base, batch_size=n_rows), model)
        return plan(step, shapes, model.sharding, mesh)

    def compiled(step, shapes, rules, on):
        assert on == mesh
        (n_rows,) = {x.shape[0] for x in shapes[2].values()}
        return peak_of(n_rows)

    model, mesh = setup.abstract_model(c), sharding.mesh(c.mesh)
    monkeypatch.setattr(preflight, "compiled", compiled)  # each batch is planned once
    text = preflight.report(c, chip=preflight.Chip(1e12, 1e11, memory))
    n = int(number(text, "largest batch"))
    assert n % 8 == 0 and n > c.batch_size
    assert peak_of(n).peak <= memory < peak_of(2 * n).peak
    text = preflight.report(c, chip=preflight.Chip(1e12, 1e11, 1e4))
    assert "IT DOES NOT FIT" in text
    assert "none: 8 does not fit" in text


@pytest.mark.parametrize(
    ("bytes_of", "largest"),
    [
        (lambda n: 100 + 10 * n, 9_984),  # as most programs are
        (lambda n: 100 + 0.5 * max(n, 4_096), 199_800),  # small batches are padded, as on TPUs
        (lambda n: 100 + n**1.5 / 10, 9_996),
        (lambda n: 100 + 10 * n if n < 5_000 else np.inf, 4_999),  # the compiler gives up
        (lambda n: 99_000 + 10 * n, 100),
    ],
)
def test_the_largest_batch_is_nearly_the_largest_that_fits(monkeypatch, bytes_of, largest):
    mesh, n_plans = sharding.mesh(), []

    def compiled(step, shapes, *_):
        (n,) = shapes[2]["image"].shape
        n_plans.append(n)
        return preflight.Plan(0, bytes_of(n), 0.0)

    monkeypatch.setattr(preflight, "compiled", compiled)
    c = ml_collections.ConfigDict({"batch_size": 16, "grad_accum": 1})
    model = types.SimpleNamespace(sharding=())
    shapes = None, None, {"image": jax.ShapeDtypeStruct((16,), np.uint8)}
    said = preflight._largest(c, None, shapes, model, mesh, preflight.Chip(1, 1, 1e5), compiled(None, shapes))
    n = int(said.split()[0])
    assert n % 8 == 0 and 0.85 * largest < n <= largest and bytes_of(n) <= 1e5
    assert len(n_plans) <= preflight.MOST_PLANS


@pytest.mark.slow
def test_the_report_adds_up(base, monkeypatch):
    monkeypatch.setattr(preflight, "_largest", lambda *_: "not planned")
    c = config_of(base)
    one, eight = (preflight.report(with_mesh(c, n), chip=preflight.CHIPS["h100"]) for n in (1, 8))
    assert number(one, "FLOPs per step") == number(eight, "FLOPs per step")
    assert "instead" not in one  # it is on data=8
    assert "of products at 989 TFLOP/s" in one
    assert number(eight, "with data=8 instead *peak") == number(one, "peak per device")
    per_device = re.search(r"in all, (\S+) per device", eight)[1]
    assert float(per_device) == pytest.approx(number(eight, "FLOPs per step") / 8, rel=0.01)


def with_mesh(c, n):
    changed = c.copy_and_resolve_references()
    changed.mesh.fsdp = n
    changed.mesh.data = 8 // n
    return changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 6, "batch_size 6 .* 8 parts"),
        ("data.augment", "flip", "data.augment is 'flip'"),
        ("grad_accum", 0, "grad_accum is 0; it must be at least 1"),
    ],
)
def test_what_the_run_would_refuse_is_refused(base, key, value, message):
    with pytest.raises(ValueError, match=message):
        preflight.report(config_of(base, **{key: value}))


def test_what_xla_cannot_compile_is_said_in_one_line(base, monkeypatch):
    def refused(*_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such device\nand a long list")

    monkeypatch.setattr(preflight, "compiled", refused)
    with pytest.raises(ValueError, match="cannot compile the step for cpu: UNIMPLEMENTED: no such device$"):
        preflight.report(config_of(base))


def test_chips():
    assert preflight.chip_of("h100", None) is preflight.CHIPS["h100"]
    assert preflight.chip_of(None, "v5e:2x4") is preflight.CHIPS["v5e"]
    assert preflight.chip_of("1,2,3", None) == preflight.Chip(1e12, 2e9, 3e9)
    assert preflight.chip_of(None, None) is None
    for bad in ("h1000", "1,2", "1,2,x"):
        with pytest.raises(ValueError, match="TFLOP/s,GB/s,GB"):
            preflight.chip_of(bad, None)


def test_a_topology_that_cannot_be_had_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no_such:2x2.*GPUs are named"):
        preflight.devices_of("no_such:2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="v5e:2x2.*pip install libtpu"):
        preflight.devices_of("v5e:2x2")


def test_an_error_of_an_installed_compiler_is_its_own(monkeypatch):
    """Such as a lock that another process holds: the message does not tell to install what is there."""

    def locked(*_, **__):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", locked)
    monkeypatch.setitem(sys.modules, "jax_cuda13_plugin", sys)
    for topology in ("v5e:2x2", "h100:8"):
        with pytest.raises(ValueError, match=f"{topology}.*cannot be loaded: .*lockfile") as caught:
            preflight.devices_of(topology)
        assert "pip install" not in str(caught.value)


def test_two_plans_may_load_libtpu_at_once(monkeypatch):
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    host.plan_for(0, "v5e:2x4")
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1" and "XLA_FLAGS" not in os.environ
    host.plan_for(0, "h100")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "triton_gemm=false" in os.environ["XLA_FLAGS"]


def test_flags_that_are_set_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    host.add_xla_flags(*host.DETERMINISTIC)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_gpu_autotune_level=2", host.DETERMINISTIC[0], host.DETERMINISTIC[2]]


@pytest.mark.slow
def test_the_command_plans_for_devices_that_are_not_here(base, tmp_path):
    command = [
        sys.executable, "main.py", "--config=configs/quickstart.py:task=captioning", f"--workdir={tmp_path / 'run'}",
        "--preflight", "--devices=8", "--config.mesh.fsdp=8", "--chip=1,1,0.00001",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu, mesh data 1 x fsdp 8 x tensor 1" in done.stdout
    assert "does not fit" in done.stdout  # so no larger batch is planned
    assert not (tmp_path / "run").exists()
