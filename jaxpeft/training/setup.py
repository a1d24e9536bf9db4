"""What is decided before training: task, model, methods, and the variables on their devices."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpeft import data, methods, metrics, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.data import pipeline
from jaxpeft.data.base import Split
from jaxpeft.methods import METHODS, Method, Site
from jaxpeft.models import convert, loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.models.stack import DTYPES, StackConfig
from jaxpeft.runtime import host, registry, renamed
from jaxpeft.training import optim, sharding
from jaxpeft.training.optim import Config
from jaxpeft.tree import Mask, Tree

Log = Callable[[str], object]
PRECISIONS = ("default", "high", "highest")
LEAST_STEPS = 100  # minimum where epochs decide: a few images are seen many times, and the best step is kept
VALIDATIONS = 40  # number of validations where stop.every is 0
LEAST = {  # key -> its smallest value
    "batch_size": 1, "grad_accum": 1, "steps": 0, "epochs": 0, "log_every": 1, "checkpoint_seconds": 0,
    "checkpoint_keep": 1, "data.feature_bytes": 0, "optim.lr": 0, "optim.start_lr": 0, "optim.end_lr": 0,
    "optim.weight_decay": 0, "optim.clip_norm": 0, "stop.examples": 1, "stop.every": 0, "stop.patience": 0,
    "stop.min_gain": 0, "eval.batch_size": 1, "eval.beams": 1, "task_options.min_length": 0, "task_options.max_words": 0,
    "task_options.max_answers": 1, "task_options.n_answers": 1, "task_options.rank_k": 1,
}  # fmt: skip
SHARES = ("model.dropout", "optim.b1", "optim.b2", "task_options.smoothing")  # in [0, 1)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run before its first step. `variables` are on the devices of `mesh`, frozen matrices in their dtype."""

    task: tasks.Task
    model: VisionLanguageModel
    methods: tuple[Method, ...]
    variables: Tree
    mask: Mask
    mesh: Mesh
    originals: Tree  # the variables as loaded, for `tuned/`; the base is in this host's memory
    splits: dict[str, Split]  # 'train' is the subset that is trained on
    whole: tuple[Split, np.ndarray]  # all of 'train' with texts of the task, and the indices of the subset in it
    candidates: list[str] | None  # the closed list that answers are chosen from
    facts: dict[str, Any]  # for the result: counts, model, texts

    @property
    def trainable(self) -> Tree:
        return tree.split(self.variables, self.mask)[0]

    @property
    def frozen(self) -> Tree:
        return tree.split(self.variables, self.mask)[1]


def prepare(config: Config, log: Log) -> Setup:
    """Read data and base, attach the methods, and put everything on its devices. Raises ValueError for an invalid setup."""
    mesh = sharding.mesh(config.get("mesh"))
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)
    task = tasks.build(config.task, **config.task_options)
    splits, whole = load_splits(config, task, log)
    log("images: " + ", ".join(f"{name} {len(split.rows):,}" for name, split in splits.items()))
    for remark in splits["train"].report.get("remarks", []):
        log(f"warning: {remark}")
    model, params, chosen, facts = setup_model(config, task, splits["train"], log)
    model = for_devices(config, model, sites.resolved(model, chosen), mesh.devices.flat[0].platform)
    variables = sites.attach(model, params, chosen, jax.random.key(config.seed))
    mask = sites.trainable(variables)
    task, texts = with_limits(task, model, chosen, splits, log)
    log(" + ".join(map(str, chosen)))
    log(_towers(variables, mask))
    log(sites.describe(variables, mask, leaves=False))
    facts = {
        "model": facts,
        "counts": sites.counts(variables, mask),
        "texts": texts,
        "base_digest": tree.digest(params),
    }
    dtype = config.model.get("frozen_dtype", "float32")
    placed = _placed(sites.narrowed(model, variables, dtype, mask), model, mesh, log)
    candidates = task.candidates(splits["train"], task.template(model))
    return Setup(
        task=task,
        model=model,
        methods=sites.methods_of(variables),
        variables=placed,
        mask=mask,
        mesh=mesh,
        originals=variables,
        splits=splits,
        whole=whole,
        candidates=candidates,
        facts=facts,
    )


def needed_splits(config: Config) -> list[str]:
    """The splits that a run reads, 'train' first."""
    validated = [config.stop.split] if config.optim.schedule == "plateau" else []
    return list(dict.fromkeys(["train", *config.eval.splits, *validated]))


def with_texts(config: Config, task: tasks.Task, train: Split) -> Split:
    """The training images that have texts of the task; all of them where none has, which the task says itself.

    A task with `examples` of its own may read other parts of the rows. Nearly all scenes have questions of any type, and
    published subsets of scenes are drawn from all.
    """
    if config.data.name == "scenes" or type(task).examples not in (tasks.Captioning.examples, tasks.Vqa.examples):
        return train
    key = "questions" if task.asks else "captions"
    kept = np.flatnonzero(np.fromiter((bool(row[key]) for row in train.rows), bool))
    return train if len(kept) in (0, len(train.rows)) else train.take(kept)


def load_splits(config: Config, task: tasks.Task, log: Log) -> tuple[dict[str, Split], tuple[Split, np.ndarray]]:
    """Load ({name: split} with the run's subset of 'train', (all of 'train' that has texts of the task, the indices of the
    subset in it))."""
    c = config.data
    splits = data.load(c, needed_splits(config))
    whole = with_texts(config, task, splits["train"])
    if n := len(splits["train"].rows) - len(whole.rows):
        log(f"train: {n:,} images without {'questions' if task.asks else 'captions'} are left out")
    part, chosen = pipeline.subset(whole, seed=c.subset_seed, fraction=c.fraction, n_images=c.n_images)
    return splits | {"train": part}, (whole, chosen)


def check_config(config: Config) -> None:
    """Raise ValueError for invalid settings of training or evaluation, before anything is read."""
    renamed.check_config(config)
    check_ranges(config)
    optim.schedule(config.optim, 1000)
    optim.OPTIMIZERS.find(config.optim.get("name", "adamw"))
    pipeline.check_augment(config.data.augment)
    if config.eval.forgetting and config.data.name != "scenes":
        raise ValueError(
            f"eval.forgetting is True, but data.name is {config.data.name!r}: only 'scenes' has captions in the style of "
            f"pre-training; set eval.forgetting to False"
        )
    for name in ("dtype", "frozen_dtype"):
        if config.model.get(name, "float32") not in DTYPES:
            raise ValueError(
                f"model.{name} is {config.model[name]!r}{registry.did_you_mean(config.model[name], DTYPES)}; choose one of "
                f"{', '.join(DTYPES)}"
            )
    with precision(config):
        pass
    if config.get("deterministic"):
        host.check_deterministic()


def check_ranges(config: Config) -> None:
    """Raise ValueError for a number that is out of its range."""
    for key in (*LEAST, *SHARES):
        section, _, name = key.rpartition(".")
        value, least = (config.get(section, {}) if section else config).get(name), LEAST.get(key, 0)
        if value is not None and not (value >= least and (key in LEAST or value < 1)):
            said = f"at least {least}" if key in LEAST else "in [0, 1)"
            raise ValueError(f"{key} is {value}; it must be {said}")


def precision(config: Config) -> AbstractContextManager[None]:
    """Inside it, float32 products are computed as `model.precision` says. Raises ValueError for a name that it is not."""
    said = config.model.get("precision")
    if said is None:
        return contextlib.nullcontext()
    if said not in PRECISIONS:
        raise ValueError(
            f"model.precision is {said!r}{registry.did_you_mean(said, PRECISIONS)}; choose one of {', '.join(PRECISIONS)}"
        )
    return jax.default_matmul_precision(said)


def scheduled(config: Config, n_examples: int) -> Config:
    """The config with the numbers that depend on the data: `steps` from `epochs`, `stop.every` from `steps`."""
    c = config.copy_and_resolve_references()
    if not c.steps:
        if not c.get("epochs", 0) > 0:
            raise ValueError(f"steps is 0 and epochs is {c.get('epochs', 0)}; one of the two must be above 0")
        c.steps = max(LEAST_STEPS, math.ceil(c.epochs * n_examples / c.batch_size))
    c.stop.every = c.stop.every or max(1, round(c.steps / VALIDATIONS))
    return c


def setup_model(
    config: Config, task: tasks.Task, train: Split, log: Log
) -> tuple[VisionLanguageModel, Tree, tuple[Method, ...], dict[str, Any]]:
    """(model, params, methods, facts) of a config: the base, its vocabulary checked against the texts, the methods."""
    model, params, report = read_base(config, task, convert.in_memory)  # devices need not hold all of it
    for group, source in report.get("initialised", {}).items():
        log(f"{group} is initialised from {source}")
    chosen = methods_of(config)

    _, chosen, unknown, new = with_new_words(config, task, model, chosen, train)
    model, params, _ = loading.extend_vocabulary(model, params, new, config.seed)
    if new:
        log(f"vocabulary: {len(new):,} words are added to the base; their rows are initialised randomly and trained")
    if unknown:
        shown = ", ".join(map(repr, list(unknown)[:5]))
        log(
            f"warning: {len(unknown):,} different words of the training texts ({unknown.total():,} in all) are not in the "
            f"base's vocabulary and are read as [UNK]: {shown}"
        )
    facts = {"base": str(config.base), "init": config.init, "report": report}
    # new_rows: whether the rows of new words are separate leaves, unlike in version 0.1
    return model, params, chosen, facts | {"unknown_words": len(unknown), "new_words": new, "new_rows": True}


def with_new_words(
    config: Config, task: tasks.Task, model: VisionLanguageModel, chosen: tuple[Method, ...], train: Split
) -> tuple[VisionLanguageModel, tuple[Method, ...], collections.Counter[str], list[str]]:
    """(model, methods, words that stay unknown, words that are added) for the training texts; no parameters are needed.

    Words are added only if the vocabulary has no word pieces, like that of the tiny base. The methods then train their rows.
    """
    texts, tokenizer = task.texts(train, task.template(model)), model.tokenizer
    assert tokenizer is not None  # `task.template` used it
    found = (word for text in texts for word in tokenizer.unknown_words(text))
    unknown = collections.Counter(dict(sorted(collections.Counter(found).items())))
    if not config.model.extend_vocabulary or tokenizer.has_pieces:
        return model, chosen, unknown, []
    model, new = loading.wider(model, list(unknown))
    if new and not any(isinstance(one, methods.Full) for one in chosen):
        chosen = (*chosen, methods.NewWords())
    return model, chosen, collections.Counter(), new


def with_limits(
    task: tasks.Task, model: VisionLanguageModel, chosen: tuple[Method, ...], splits: dict[str, Split], log: Log
) -> tuple[tasks.Task, dict]:
    """(the task with limits that fit the data and the base, {split: {limit: what it cuts}}); cuts are logged."""
    chosen = sites.resolved(model, chosen)
    shifts = [sum(one.shift(site) for one in chosen if one.selects(site)) for site in sites.sites(model)]
    template = task.template(model)
    lengths = {name: task.lengths(split, template) for name, split in splits.items()}
    task = task.limited(lengths.values(), model.positions - max(shifts, default=0), template)
    texts = {name: task.cuts(one) for name, one in lengths.items()}
    log("texts: " + ", ".join(f"{name} {one['limit']}" for name, one in texts["train"].items() if one["limit"]))
    for name, cuts in texts.items():
        for limit, one in cuts.items():
            if one["cut"] and not (name == "train" and limit in task.only_written):
                log(
                    f"warning: {name}: {one['cut']:,} of {one['of']:,} {task.limited_texts[limit]} are longer than "
                    f"task_options.{limit}={one['limit']} and are cut; the longest has {one['longest']:,}"
                )
    long, usual = max(
        (
            (int(n.max()), int(np.percentile(n, 99)))
            for name, n in lengths["train"].items()
            if name in task.limits and n.size
        ),
        default=(0, 0),
    )
    if long > max(2 * usual, 32):
        log(
            f"warning: the longest training text has {long} tokens, 99 of 100 have at most {usual}; every batch is padded to "
            f"the longest: a limit in task_options makes steps faster"
        )
    return task, texts


def abstract_model(config: Config) -> VisionLanguageModel:
    """The model of a config, from the base's configuration alone: no weights are read, and no words are added."""
    task = tasks.build(config.task, **config.task_options)
    model = loading.abstract(config.base, task=task.kind, **_options(config))
    _check_tokenizer(config, model)
    return model


def _check_tokenizer(config: Config, model: VisionLanguageModel) -> None:
    if model.tokenizer is None:
        raise ValueError(f"{config.base} has no vocab.txt or tokenizer.json; put them beside the weights")


def _options(config: Config) -> dict:
    c = config.model
    fields = {"image_size": c.image_size, "dtype": c.dtype, "dropout": c.dropout}
    # where these are None, the model decides or `for_devices`
    return fields | {name: c[name] for name in ("remat", "unroll", "attention") if c.get(name) is not None}


def for_devices(
    config: Config, model: VisionLanguageModel, chosen: Iterable[Method], platform: str
) -> VisionLanguageModel:
    """The model with the fields that the config leaves open (None) set for its devices, on platform 'cpu', 'gpu' or 'tpu', and
    for what is trained. On CPU it is the same model."""
    if platform == "cpu" or not isinstance(model.config, StackConfig):  # someone else's has no such fields
        return model
    fields = model.config.on(platform)
    if config.model.get("remat") is None and config.model.dtype == "bfloat16":
        image = model.targets.get("vision", "$^")
        fields["remat"] = "dots" if any(re.search(image, path) for path in _adapted(model, chosen)) else "none"
    return model.replaced(**fields)


def pinned_base(config: Config, result: dict) -> str:
    """The base of a finished run; for a repository of the hub with the commit that was tuned, as 'owner/name@commit'."""
    revision = result.get("model", {}).get("report", {}).get("revision")
    return f"{config['base'].partition('@')[0]}@{revision}" if revision else str(config["base"])


def read_base(
    config: Config, task: tasks.Task, place: convert.Place = convert.on_device
) -> tuple[VisionLanguageModel, Tree, dict[str, Any]]:
    """Read (model, params, report) that training starts from, before words are added.

    Leaves are float32, but those that `narrowed` casts have the type of the file: a base in bfloat16 is never wider in memory.
    """
    options, dtype = _options(config), None
    if config.model.get("frozen_dtype", "float32") != "float32":
        dtype = _types(abstract_model(config), methods_of(config))
    model, params, report = loading.read(
        config.base, task=task.kind, place=place, param_dtype=dtype or "float32", **options
    )
    _check_tokenizer(config, model)
    if config.init == "scratch":
        params = loading.scratch(model, config.seed)
    elif config.init != "base":
        raise ValueError(f"init is {config.init!r}; choose 'base' (the checkpoint's weights) or 'scratch' (random)")
    return model, params, report


def _types(model: VisionLanguageModel, chosen: Iterable[Method]) -> Callable[[str], str | None]:
    """Leaf -> the type to read it in: None, that of the file, for frozen leaves that `narrowed` casts."""
    chosen = sites.resolved(model, chosen)

    def one(name: str) -> str | None:
        frozen = not any(method.trains(f"params/{name}") for method in chosen)
        return None if frozen and re.search(model.narrow, name) else "float32"

    return one


def methods_of(config: Config) -> tuple[methods.Method, ...]:
    """The methods that a config names."""
    fields = {key: value for key, value in config.method.items() if key != "name"}
    return methods.build(config.method.name, config.head, **fields)


def _towers(variables: Tree, mask: Mask) -> str:
    """A line with the towers that have trained leaves, and those that have none."""
    trained = {name.split("/")[1] for name, on in tree.flatten(mask).items() if on}
    names = {on: [name for name in variables["params"] if (name in trained) == on] for on in (True, False)}
    some, rest = (", ".join(names[on]) or "nothing" for on in (True, False))
    return f"adapted: {some}; not adapted: {rest}"


def _adapted(model: VisionLanguageModel, chosen: Iterable[Method]) -> list[str]:
    """The paths of sites where the methods act, or train a leaf of the base. `chosen`: with patterns, not names of groups."""

    def hit(one: Method, site: Site) -> bool:
        leaf = f"params/{site.path}/"
        return one.selects(site) or one.trains(f"{leaf}kernel") or one.trains(f"{leaf}bias")

    chosen = tuple(chosen)
    return [site.path for site in sites.sites(model) if any(hit(one, site) for one in chosen)]


def _placed(variables: Tree, model: VisionLanguageModel, mesh: Mesh, log: Log) -> Tree:
    """Put the variables on the mesh by the model's sharding rules; with several devices, log their memory."""
    placed = sharding.shardings(variables, model.sharding, mesh)
    if mesh.size > 1:
        n_bytes, n_all = sharding.bytes_per_device(variables, placed), sum(x.nbytes for x in jax.tree.leaves(variables))
        shape = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
        log(f"mesh {shape}: {n_bytes / 1e6:.1f} MB of weights per device, {n_all / 1e6:.1f} MB in all")
        if whole := sharding.whole(variables, placed):
            log(f"not split, whole on every device: {', '.join(whole[:8])}")
    return sharding.put(variables, placed)


def imports_of(config: Config, chosen: Iterable[Method], task: tasks.Task) -> list[str]:
    """The modules outside jaxpeft that define a run's method, task, data set, optimizer and metrics."""
    entries = [METHODS[config.method.name], *map(type, chosen), type(task), data.DATASETS[config.data.name]]
    entries.append(optim.OPTIMIZERS[config.optim.get("name", "adamw")])
    return registry.modules_of(entries + [metrics.METRICS[name] for name in task.metrics])


def as_json(config: Config) -> dict:
    """A config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def digest(value: object) -> str:
    """A short SHA-256 digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
