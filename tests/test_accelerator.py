"""On a GPU or TPU: numbers of transformers, a step against the CPU, equal bits, all devices, fused attention.

    JAX_PLATFORMS=cuda,cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest tests/test_accelerator.py

Skipped on CPU. It has not run on an accelerator yet (docs/limits.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_blip_parity as parity
import tiny
from tiny import config_of

from jaxpeft import methods, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.interchange.tuned import TUNED
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.runtime import host
from jaxpeft.training import loop, optim, sharding

pytestmark = pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_logits_are_those_of_transformers(task):
    """At the highest precision (conftest.py) the tolerance is the one on CPU."""
    golden, mask = parity.loaded(task)[2], parity.valid(task)
    np.testing.assert_allclose(parity.outputs(task)[2][mask], golden["logits"][mask], atol=parity.LOGITS)


def one_step(model, devices, batch):
    """(loss, the tuned leaves after a step) of LoRA on some devices."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), shapes)
    variables = sites.attach(model, params, methods.build("lora"), jax.random.key(0))
    tuned, frozen = tree.split(variables, sites.trainable(variables))
    tx = optim.optimizer(config_of("tiny").optim, tuned, 10)
    state, mesh = loop.start(tuned, tx=tx, seed=0, best=False), sharding.mesh(None, devices)
    state, frozen = (sharding.put(x, sharding.shardings(x, model.sharding, mesh)) for x in (state, frozen))
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)

    @jax.jit
    def step(state, frozen, batch):
        def loss(*given):
            return tasks.build("vqa").loss(model, *given)

        return loop.train_step(state, frozen, batch, loss=loss, tx=tx, grad_accum=1)

    with sharding.using_mesh(mesh):
        state, metrics = step(state, frozen, {name: jax.device_put(x, rows) for name, x in batch.items()})
    return float(metrics["loss"]), {name: tree.fetch(x) for name, x in tree.flatten(state.tuned).items()}


def check_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][name], leaf, atol=1e-4 * np.abs(leaf).max(), err_msg=name)


def test_a_step_is_that_of_the_cpu():
    batch = tiny.batch(8)
    check_same(*(one_step(tiny.model(), some[:1], batch) for some in (jax.devices(), jax.devices("cpu"))))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_all_devices_give_what_one_gives():
    batch = tiny.batch(4 * len(jax.devices()))
    check_same(*(one_step(tiny.model(), some, batch) for some in (jax.devices(), jax.devices()[:1])))


def run(workdir, *changes):
    """The file of what a run of the tiny base tuned, by a process of its own."""
    command = [
        sys.executable, "main.py", "--config=configs/quickstart.py:task=captioning", f"--workdir={workdir}",
        "--config.deterministic=true", "--config.data.n_train=64", "--config.data.n_val=0", "--config.data.n_test=4",
        "--config.batch_size=16", "--config.optim.schedule=constant", "--config.optim.warmup=0",
        "--config.eval.base=false", "--config.eval.gallery=false", "--config.checkpoint_seconds=0", *changes,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "result.json").read_text())["status"] == "done"
    return (workdir / "tuned" / TUNED).read_bytes()


def test_the_same_bits_twice_and_after_a_resume(tmp_path):
    """A run, the same run again, and one that another process continues after three steps."""
    first = run(tmp_path / "first", "--config.steps=6")
    assert run(tmp_path / "again", "--config.steps=6") == first
    run(tmp_path / "resumed", "--config.steps=3")
    assert run(tmp_path / "resumed", "--config.steps=6", "--accept_changes") == first


@on_gpu
def test_deterministic_needs_its_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(ValueError, match="xla_gpu_exclude_nondeterministic_ops"):
        host.check_deterministic()


@on_gpu
def test_fused_attention_is_as_exact_as_the_written_out_form():
    """In bfloat16, against float32: image tokens, and the gradient of the pixels through 577 tokens, padded to 584."""
    sizes = {
        "vision_width": 128,
        "vision_heads": 2,
        "vision_layers": 2,
        "vision_mlp": 256,
        "text_width": 128,
        "text_heads": 2,
    }
    config = BlipConfig(**sizes, text_layers=1, text_mlp=256, vocab_size=64, cls_id=2, sep_id=3, bos_id=5, enc_id=6)
    shapes = jax.eval_shape(lambda: Blip.build(config).init(jax.random.key(0), Blip.build(config).example()))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.05, s.shape), jnp.float32), shapes)
    image_BYXC = jnp.asarray(rng.normal(size=(2, 384, 384, 3)), jnp.float32)

    def outputs(**fields):
        model = Blip.build(config).replaced(**fields)

        def loss(image_BYXC):
            tokens_BPD = model.apply({"params": params}, image_BYXC, method="encode_image").astype(jnp.float32)
            return jnp.sum(jnp.sin(tokens_BPD)), tokens_BPD

        gradient, tokens_BPD = jax.jit(jax.grad(loss, has_aux=True))(image_BYXC)
        return np.asarray(tokens_BPD), np.asarray(gradient)

    exact = outputs()
    plain, fused = (outputs(dtype="bfloat16", attention=kind) for kind in ("plain", "cudnn"))
    for a, b, c in zip(exact, plain, fused, strict=True):
        assert np.abs(c - a).mean() < 1.5 * np.abs(b - a).mean()
