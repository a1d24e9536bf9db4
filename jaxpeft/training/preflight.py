"""Checks before a long run: does it fit into memory, how long does a step take at least, how large may the batch be?

    python main.py --config=... --workdir=DIR --preflight                       on the devices of this machine
    python main.py ... --preflight --devices=8 --config.mesh.fsdp=8             on eight virtual CPU devices
    python main.py ... --preflight --topology=h100                              for GPUs, from any machine (preflight-cuda)
    python main.py ... --preflight --topology=v5e:2x4                           for a TPU slice, from any machine (libtpu)

The training step is compiled from shapes: no weights (a base directory's config.json is enough) and no images are read, and
nothing is computed. Memory is what XLA plans for one device: exact for a topology; on CPU an estimate for an accelerator,
whose fusions differ. FLOPs are counted on the program with unrolled layers and without what remat repeats. For GPUs the kernels
of the program are counted, and gpu.py predicts its time.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpeft import data, tasks, tree
from jaxpeft.adapt import budget, sites
from jaxpeft.data import base, pipeline
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime.text import aligned
from jaxpeft.training import frozen_cache, gpu, loop, optim, setup, sharding
from jaxpeft.training.setup import Config
from jaxpeft.tree import Tree

Step = Callable[..., tuple[loop.TrainState, dict[str, jax.Array]]]
Shapes = tuple[loop.TrainState, Tree, dict[str, jax.ShapeDtypeStruct]]  # the arguments of a step


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak numbers of one device, from its data sheet: dense bfloat16 FLOP/s, memory bandwidth in bytes/s, memory in bytes."""

    flops: float
    bandwidth: float
    memory: float


CHIPS = {
    "a100": Chip(312e12, 2.04e12, 80e9),
    "h100": Chip(989e12, 3.35e12, 80e9),
    "h200": Chip(989e12, 4.8e12, 141e9),
    "b200": Chip(2250e12, 7.7e12, 180e9),
    "v4": Chip(275e12, 1.23e12, 32 << 30),
    "v5e": Chip(197e12, 0.82e12, 16 << 30),
    "v5p": Chip(459e12, 2.77e12, 95 << 30),
    "v6e": Chip(918e12, 1.64e12, 32 << 30),
}


def chip_of(said: str | None, topology: str | None) -> Chip | None:
    """The chip given by name or as 'TFLOP/s,GB/s,GB', or else that of the topology; None where neither is known."""
    if not said:
        return CHIPS.get((topology or "").split(":")[0])
    if said in CHIPS:
        return CHIPS[said]
    try:
        flops, bandwidth, memory = (float(part) for part in said.split(","))
    except ValueError:
        raise ValueError(
            f"chip is {said!r}; choose one of {', '.join(CHIPS)}, or give 'TFLOP/s,GB/s,GB' for one device"
        ) from None
    return Chip(flops * 1e12, bandwidth * 1e9, memory * 1e9)


def devices_of(topology: str | None) -> list[Any]:
    """The devices to plan for: those of a topology by name, such as 'h100', 'h100:8' or 'v5e:2x4', or else this machine's."""
    if not topology:
        return jax.devices()
    if not topology.startswith("v"):
        return gpu.devices(topology)
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology {topology!r} needs the compiler for TPUs: pip install libtpu")
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # libtpu's errors have many types
        raise ValueError(f"topology {topology!r} cannot be loaded: {error}") from None


# ---------------------------------------------------------------- the step, in shapes


def training_texts(c: Config) -> base.Split:
    """The training split of a run, for its texts; for scenes, whose texts are all similar, 64 images of it."""
    if c.data.name != "scenes":
        whole = {key: value for key, value in setup.as_json(c.data).items() if key not in SUBSET}
        task = tasks.build(c.task, **c.task_options)
        train = setup.with_texts(c, task, _training(json.dumps(whole), tuple(setup.needed_splits(c))))
        return pipeline.subset(train, seed=c.data.subset_seed, fraction=c.data.fraction, n_images=c.data.n_images)[0]
    few = c.data.copy_and_resolve_references()
    few.n_train = 64
    return data.load(few, ["train"])["train"]


MOST_PLANS = 10  # for the largest batch
SUBSET = ("subset_seed", "fraction", "n_images")  # the keys of config.data that select a subset


@functools.lru_cache(maxsize=4)
def _training(settings: str, splits: tuple[str, ...]) -> base.Split:
    return data.load(ml_collections.ConfigDict(json.loads(settings)), list(splits))["train"]


def step_in_shapes(c: Config, model: VisionLanguageModel, platform: str = "cpu") -> tuple[Step, Shapes, int]:
    """(step on a platform, (state, frozen, batch) as shapes, bytes of the outputs of frozen stages on the host) of a run. Only
    texts of its data are read."""
    pipeline.check_augment(c.data.augment)
    task, chosen = tasks.build(c.task, **c.task_options), setup.methods_of(c)
    split = training_texts(c)
    n_all = len(split.rows)
    if c.data.name == "scenes":
        n_all = c.data.n_train + c.data.n_val + c.data.n_test
    model, chosen, *_ = setup.with_new_words(c, task, model, chosen, split)
    task, _ = setup.with_limits(task, model, chosen, {"train": split}, lambda *_: None)
    examples = task.examples(split, task.template(model))
    variables = budget.abstract_variables(model, chosen)
    mask = sites.trainable(variables)
    dtype = c.model.get("frozen_dtype", "float32")
    variables = jax.eval_shape(functools.partial(sites.narrowed, model, dtype=dtype, mask=mask), variables)
    n_rows = {"image": n_all, "example": len(examples)}
    cache = frozen_cache.planned(c, model, variables, mask, examples, n_all)
    tables = ((stage, cache.programs[stage.name].row) for stage in cache.stages)
    n_bytes = sum(n_rows[stage.per] * row.size * row.dtype.itemsize for stage, row in tables)
    assert model.processor is not None  # `task.template` used it
    size, index = model.processor.image_size, np.zeros_like(examples.arrays["image_index"])
    examples = dataclasses.replace(
        examples, images=np.zeros((1, size, size, 3), np.uint8), arrays=examples.arrays | {"image_index": index}
    )
    batch = pipeline.gather(cache.shapes(examples), np.zeros(1, np.int64))
    batch = _of_size(c.batch_size, batch)
    tuned, frozen = tree.split(variables, mask)
    tx = optim.optimizer(c.optim, tuned, setup.scheduled(c, len(examples)).steps)
    model = setup.for_devices(c, model, sites.resolved(model, chosen), platform)
    best = c.optim.schedule == "plateau"
    state = jax.eval_shape(functools.partial(loop.start, tx=tx, seed=0, best=best), tuned)

    def train_step(
        state: loop.TrainState, frozen: Tree, batch: dict[str, jax.Array], model: VisionLanguageModel = model
    ) -> tuple[loop.TrainState, dict[str, jax.Array]]:
        loss = functools.partial(task.loss, model)
        return loop.train_step(state, frozen, batch, loss=loss, tx=tx, grad_accum=c.grad_accum)

    return train_step, (state, frozen, batch), n_bytes


def _of_size(n: int, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch with `n` rows in place of its own."""
    return {name: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def flops_of(step: Step, shapes: Shapes, model: VisionLanguageModel) -> float:
    """FLOPs of one step on all devices together. XLA counts the body of a loop once, so the layers are unrolled. `model`: for
    this machine's CPU."""
    step = functools.partial(step, model=model.unrolled())
    costs = jax.jit(step).lower(*shapes).cost_analysis()
    assert costs is not None  # no backend of JAX lacks it
    return float(costs["flops"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory that XLA plans for one device, in bytes, and how long planning took."""

    arguments: int  # weights, optimizer, batch
    temporary: int  # activations and gradients
    seconds: float
    kernels: tuple[gpu.Kernel, ...] = ()  # of a GPU's program
    program: str = ""  # its text, on request

    @property
    def peak(self) -> int:
        return self.arguments + self.temporary


def compiled(step: Step, shapes: Shapes, rules: sharding.Rules, mesh: Mesh, keep_program: bool = False) -> Plan:
    """The plan of a step on a mesh. The step's output state reuses the memory of its input state."""
    state, frozen, batch = shapes
    placed = sharding.shardings(state, rules, mesh)

    def at(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    rows = NamedSharding(mesh, sharding.BATCH)
    arguments = (
        jax.tree.map(at, state, placed),
        jax.tree.map(at, frozen, sharding.shardings(frozen, rules, mesh)),
        {name: at(x, rows) for name, x in batch.items()},
    )
    began = time.perf_counter()
    jitted = jax.jit(functools.partial(step), donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)))
    with sharding.using_mesh(mesh):
        program = jitted.lower(*arguments).compile()
    found, on_gpu = program.memory_analysis(), mesh.devices.flat[0].platform == "gpu"
    text = program.as_text() if on_gpu or keep_program else None
    assert found is not None  # no backend of JAX lacks it
    return Plan(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes,
        time.perf_counter() - began,
        tuple(gpu.kernels(text)) if on_gpu and text else (),
        text or "" if keep_program else "",
    )


# ---------------------------------------------------------------- the report


def report(config: Config, topology: str | None = None, chip: Chip | None = None) -> str:
    """The preflight report of a run, as text. Raises ValueError for the run's errors that can be found from shapes."""
    setup.check_ranges(config)
    devices = devices_of(topology)
    mesh = sharding.mesh(config.get("mesh"), devices)
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)
    model = setup.abstract_model(config)
    step, shapes, n_tables = step_in_shapes(config, model, devices[0].platform)
    state, frozen, batch = shapes
    counts = sites.counts(tree.join(state.tuned, frozen), jax.tree.map(lambda x: True, state.tuned))
    flops = flops_of(step, shapes, model)
    try:
        plan = compiled(step, shapes, model.sharding, mesh)
    except jax.errors.JaxRuntimeError as error:  # such as an unknown kind of GPU, or memory that is exceeded on a TPU
        first = str(error).splitlines()[0]
        raise ValueError(f"XLA cannot compile the step for {devices[0].device_kind}: {first}") from None
    where = sharding.shardings(frozen, model.sharding, mesh)
    n_frozen = sharding.bytes_per_device(frozen, where)
    n_state = sharding.bytes_per_device(state, sharding.shardings(state, model.sharding, mesh))

    axes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
    rows = [
        ("devices", f"{len(devices)} x {devices[0].device_kind}, mesh {axes}"),
        ("parameters", f"{counts['total']:,} in the base, {counts['tuned']:,} tuned, {counts['stored']:,} stored"),
        ("batch", f"{config.batch_size}, {config.grad_accum} microbatch{'es' if config.grad_accum > 1 else ''}"),
        ("frozen per device", _mb(n_frozen)),
        ("state per device", f"{_mb(n_state)} (tuned leaves and optimizer)"),
        ("activations per device", f"{_mb(plan.temporary)} (planned, gradients included)"),
        ("peak per device", f"{_mb(plan.peak)}{_share(plan.peak, chip)}"),
        ("FLOPs per step", f"{flops:.3g} in all, {flops / mesh.size:.3g} per device"),
    ]
    if whole := sharding.whole(frozen, where):
        rows.append(("whole on every device", ", ".join(whole[:6])))
    if chip:
        rows += _roofline(config, mesh, chip, flops, frozen, state)
    if chip and plan.kernels:
        rows += _predicted(config, mesh, chip, flops, plan)
    if mesh.shape["data"] < mesh.size:
        plain = sharding.mesh(None, devices)
        other = compiled(step, shapes, model.sharding, plain)
        rows.append((f"with data={plain.size} instead", f"peak {_mb(other.peak)} per device{_share(other.peak, chip)}"))
    rows.append(("largest batch", _largest(config, step, shapes, model, mesh, chip, plan)))
    rows.append(("compiled in", f"{plan.seconds:.0f} s"))
    return "\n".join(aligned(rows, left=2))


def _mb(n: float) -> str:
    return f"{n / 1e6:,.1f} MB"


def _share(n: float, chip: Chip | None) -> str:
    return (
        f", {100 * n / chip.memory:.0f} % of the device's{'' if n <= chip.memory else ': IT DOES NOT FIT'}"
        if chip
        else ""
    )


def _roofline(
    config: Config, mesh: Mesh, chip: Chip, flops: float, frozen: Tree, state: loop.TrainState
) -> list[tuple[str, str]]:
    """The least time of a step: its FLOPs at peak speed, or reading and writing its weights and state once."""
    compute = flops / mesh.size / chip.flops
    width = jnp.dtype(config.model.dtype).itemsize
    weights = (tree.count(frozen) + tree.count(state.tuned)) * width * 2 * config.grad_accum / mesh.shape["tensor"]
    own = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / sharding.n_split(mesh)
    memory = (weights + own) / chip.bandwidth
    bound = "compute" if compute >= memory else "memory"
    return [
        (
            "step at least",
            f"{1e3 * max(compute, memory):.2f} ms ({bound}: {1e3 * compute:.2f} ms of products at {chip.flops / 1e12:.0f} "
            f"TFLOP/s, {1e3 * memory:.2f} ms of weights and state at {chip.bandwidth / 1e12:.2f} TB/s); "
            f"{config.batch_size / max(compute, memory):,.0f} examples/s at most",
        )
    ]


def _predicted(config: Config, mesh: Mesh, chip: Chip, flops: float, plan: Plan) -> list[tuple[str, str]]:
    """The kernels of a GPU's program, and its time by the model of gpu.py."""
    n = sum(one.times for one in plan.kernels)
    fused = sum(one.times for one in plan.kernels if "fmha" in one.target)
    seconds = gpu.seconds(plan.kernels, chip.flops, chip.bandwidth)
    share = 100 * flops / mesh.size / seconds / chip.flops
    return [
        ("kernels per step", f"{n:,}, {fused} of them fused attention"),
        (
            "predicted step",
            f"{1e3 * seconds:.1f} ms, {share:.0f} % of the peak, {config.batch_size / seconds:,.0f} examples/s (a model, see "
            f"jaxpeft/training/gpu.py; not measured)",
        ),
    ]


def _largest(
    config: Config,
    step: Step,
    shapes: Shapes,
    model: VisionLanguageModel,
    mesh: Mesh,
    chip: Chip | None,
    plan: Plan,
) -> str:
    """A batch whose planned peak fits, close to the largest: each plan is extrapolated from the last two."""
    if chip is None:
        return "unknown without --chip"
    unit = sharding.n_batch(mesh) * config.grad_accum
    state, frozen, batch = shapes
    peaks: dict[int, float] = {config.batch_size: plan.peak}

    def peak(n: int) -> float:
        if n not in peaks:
            try:
                peaks[n] = compiled(step, (state, frozen, _of_size(n, batch)), model.sharding, mesh).peak
            except jax.errors.JaxRuntimeError as error:  # the TPU compiler raises where memory is exceeded
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                peaks[n] = np.inf
        return peaks[n]

    small = config.batch_size if plan.peak <= chip.memory else unit
    if peak(small) > chip.memory:
        return f"none: {small} does not fit"
    fits, fails, n = small, np.inf, 2 * small
    while n > 1.05 * fits and len(peaks) < MOST_PLANS:
        if peak(n) > chip.memory:
            fails, n = n, math.sqrt(fits * n)
        else:
            slope = (peak(n) - peak(fits)) / (n - fits)  # of small batches it may be 0: TPUs pad them
            guess = n + (chip.memory - peak(n)) / slope if slope > 0 else np.inf
            fits, n = n, min(guess, 16 * n, 0.95 * fails)
        n = int(n) // unit * unit
    return f"{fits} ({_mb(peaks[fits])} planned), a multiple of {unit}"
