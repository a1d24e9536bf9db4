"""Pre-training of tiny models on procedural scenes: makes the checkpoints that the package ships.

Each model has its objectives in apps/pretrain_NAME.py; their stages are separate, resumable runs. Stage 'text' reads text,
the others an image and two web captions of it. For matching, each image has two negatives: the caption in the batch that shares
the most words with its own, and its own caption with one colour, shape or side changed to something not in the image.

    python main.py --config=configs/pretrain.py --workdir=runs/pretrain
"""

import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import ops, tree
from jaxpeft.adapt import budget
from jaxpeft.data import scenes
from jaxpeft.data.base import pad_tokens
from jaxpeft.inputs.processor import Processor, Template
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models import loading
from jaxpeft.models.base import Context, VisionLanguageModel
from jaxpeft.ops import matmul
from jaxpeft.runtime import host
from jaxpeft.tasks.base import teacher_forced
from jaxpeft.tasks.captioning import Captioning
from jaxpeft.tasks.vqa import Vqa
from jaxpeft.training import evaluate, loop
from jaxpeft.training.setup import as_json
from jaxpeft.training.setup import digest as run_digest
from jaxpeft.tree import Tree

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
STATED = ("color", "shape", "position")  # types of questions whose answers captions state too
TEXT_LENGTH = 28  # tokens of a pre-training text, including special ones
TASK = Captioning(max_tokens=40, max_new_tokens=36, variant="coco")  # the task of the held-out scores in the manifest


def masked_loss(apply: Callable, batch: dict) -> jax.Array:
    """The mean loss of masked tokens, by the decoder without an image."""
    total, count = ops.token_loss(apply(batch["tokens"], method="masked_lm"), batch["targets"], batch["weights"])
    return total / count


def caption_loss(apply: Callable, memory_BSD: jax.Array, batch: dict, mask_BS: jax.Array | None = None) -> jax.Array:
    """The mean loss of the tokens of texts (B, A, T) that the decoder writes about a context."""
    n_rows, n_texts, n_tokens = batch["tokens"].shape
    context = Context(memory_BSD, mask_BS, jnp.zeros(n_rows, jnp.int32))
    logits_BTV = apply(batch["tokens"].reshape(-1, n_tokens), context, method="score")
    logits_BATV = logits_BTV.reshape(n_rows, n_texts, n_tokens, -1)
    total, count = ops.token_loss(logits_BATV, batch["targets"], batch["weights"])
    return total / count


def matching_loss(head: Tree, states_BAD: jax.Array) -> jax.Array:
    """Binary cross-entropy of (image, text) pairs, from the state of each; the first text of each image is its own."""
    n_images, n_texts, _ = states_BAD.shape
    logits = matmul(states_BAD, head["kernel"], head["bias"])
    right_BA = jnp.tile(jnp.arange(n_texts) == 0, (n_images, 1))
    nll_BA = ops.token_nll(logits, right_BA.astype(jnp.int32))
    return (nll_BA * jnp.where(right_BA, 0.5, 0.5 / (n_texts - 1))).sum() / n_images  # both classes have equal weight


def text_batch(tokenizer: Tokenizer, indices, rng: np.random.Generator) -> dict:
    """A batch masked as in BERT: 15 % of tokens are predicted; of these 80 % become [MASK], 10 % a random word, 10 % stay."""
    ids = pad_tokens([tokenizer.encode(scenes.text(0, int(i)), TEXT_LENGTH) for i in indices], 0, TEXT_LENGTH)
    maskable = (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
    chosen, kind = maskable & (rng.random(ids.shape) < 0.15), rng.random(ids.shape)
    random = rng.integers(len(tokenizer.special), len(tokenizer), ids.shape)
    tokens = np.where(chosen & (kind < 0.8), tokenizer.mask_id, np.where(chosen & (kind < 0.9), random, ids))
    return {"tokens": tokens.astype(np.int32), "targets": ids, "weights": chosen.astype(np.float32)}


def edited(caption: str, scene, rng: np.random.Generator) -> str | None:
    """The caption with one colour, shape or side changed so that it is not true of the scene; None if it names nothing that
    can be changed. If a side can be changed, it is changed with probability 1/2."""
    words = caption.split()
    pairs = {thing.pair for thing in scene.objects}
    places = [i for i in range(len(words) - 1) if words[i] in scenes.COLORS and words[i + 1] in scenes.SHAPES]
    if not places:
        return None
    sides = [  # in '<color> <shape> on the left', the index of 'left', if no such object is on the right
        i + 4
        for i in places
        if words[i + 2 : i + 3] in (["on"], ["at"])
        and not any(
            thing.pair == (words[i + 1], words[i]) and OPPOSITE[words[i + 4]] in thing.quadrant
            for thing in scene.objects
        )
    ]
    if sides and rng.random() < 0.5:
        i = int(rng.choice(sides))
        words[i] = OPPOSITE[words[i]]
        return " ".join(words)
    i = int(rng.choice(places))
    color, shape = words[i], words[i + 1]
    not_these = pairs | scenes.HELD_PAIRS | {(shape, color)}  # a swapped caption may name absent pairs
    options = [(c, shape) for c in scenes.COLORS if (shape, c) not in not_these]
    options += [(color, s) for s in scenes.SHAPES if (s, color) not in not_these]
    words[i : i + 2] = options[int(rng.integers(len(options)))]
    return " ".join(words)


def nearest_other(captions: list[str]) -> list[str]:
    """For each caption the one in the batch that shares the most words without being the same bag of words."""
    bags = [Counter(caption.split()) for caption in captions]
    picked = []
    for i, bag in enumerate(bags):
        overlap = [(-1 if other == bag else (bag & other).total() / (bag | other).total()) for other in bags]
        overlap[i] = -2
        picked.append(captions[int(np.argmax(overlap))])
    return picked


def caption_batch(
    processor: Processor, stage: str, n_texts: int, indices: Iterable[int], rng: np.random.Generator
) -> dict:
    """A batch of images with `n_texts` web captions each; for matching ('itm' in the stage's name) the texts (own, edited,
    nearest other); for prefixes ('prefix') the first caption cut in two at a random word; for questions ('qa') two of them with
    their answers, as rows 2b and 2b + 1, in the stage 'qa' as noisy as the captions. A prefix-LM gets its captions' prompt too.
    """
    template, reads = processor.template("captioning"), processor.template("vqa")
    indices = [int(i) for i in indices]
    bodies = [scenes.plain_web_captions("pretrain", i, n_texts) for i in indices]
    captions = [[f"{template.start_text} {text}".lstrip() for text in group] for group in bodies]
    batch = _texts([[template.target(text, TEXT_LENGTH)[0] for text in group] for group in bodies], template)
    batch["image"] = np.stack([scenes.render(scenes.scene("pretrain", i)) for i in indices])
    if not template.start:
        batch["prompt"] = np.tile(np.array(template.prompt("")[0], np.int32), (len(indices), 1))

    def read(texts: Iterable[str]) -> np.ndarray:
        return pad_tokens([reads.prompt(text, TEXT_LENGTH)[0] for text in texts], template.pad, TEXT_LENGTH)

    if "itm" in stage:
        own = [group[0] for group in captions]
        others = nearest_other(own)
        wrong = [
            edited(text, scenes.scene("pretrain", i), rng) or other
            for text, i, other in zip(own, indices, others, strict=True)
        ]
        groups = [text for triple in zip(own, wrong, others, strict=True) for text in triple]
        batch["pairs"] = read(groups).reshape(len(indices), 3, -1)
    if "prefix" in stage:
        words = [group[0].split() for group in captions]
        cuts = [int(rng.integers(1, len(one))) for one in words]
        batch["prefix"] = read(" ".join(one[:cut]) for one, cut in zip(words, cuts, strict=True))
        rest = [" ".join(one[cut:]) for one, cut in zip(words, cuts, strict=True)]
        rest = _texts([[template.target(text, TEXT_LENGTH)[0]] for text in rest], template)
        batch |= {f"rest_{name}": x for name, x in rest.items()}
    if "qa" in stage:
        ask = scenes.noisy_questions if stage == "qa" else scenes.questions
        asked = [q for i in indices for q in _two(ask("pretrain", i), rng)]
        batch["answer_prompt"] = read(q["question"] for q in asked)
        answers = _texts([[reads.target(q["answers"][0], 8)[0]] for q in asked], reads, length=8)
        batch |= {f"answer_{name}": x for name, x in answers.items()}
    return batch


def _two(questions: list[dict], rng: np.random.Generator) -> list[dict]:
    """Two questions whose answers captions state too, the same one twice where there is no other."""
    stated = [q for q in questions if q["type"] in STATED] or questions
    return [stated[int(i)] for i in (rng.permutation(len(stated)) if len(stated) > 1 else [0, 0])[:2]]


def _texts(ids: list[list[list[int]]], template: Template, length: int = TEXT_LENGTH) -> dict:
    """Teacher-forced texts in one shape for every batch."""
    batch = teacher_forced(ids, [[1.0] * len(ids[0])] * len(ids), template)
    short = length - (template.start != ()) - batch["tokens"].shape[-1]
    return {name: np.pad(x, ((0, 0), (0, 0), (0, short))) for name, x in batch.items()}


def _batches(config, stage, make):
    """Batches of new images: index = step * batch_size + row, so no image is repeated within a stage."""

    def from_step(start):
        order = grain.MapDataset.range(stage.first, stage.first + stage.steps * config.batch_size)
        if jax.process_count() > 1:
            raise ValueError("pre-training supports one process only; start it without --coordinator or --distributed")
        steps = order.batch(config.batch_size).seed(config.seed).random_map(make)[start:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    return from_step


def run(config, workdir, log=print) -> dict:
    """Run the stages, score the held-out images zero-shot, and write WORKDIR/checkpoint (what `loading.load` reads)."""
    began, workdir = time.perf_counter(), Path(workdir)
    objectives = importlib.import_module(f"jaxpeft.apps.pretrain_{config.model_type}")
    model = objectives.model(objectives.tokenizer(), **config.architecture)
    params, seconds, digest = objectives.init(model, config.seed), {}, run_digest(as_json(config))
    log(f"{tree.count(params):,} stored parameters, {tree.count(objectives.shared(params)):,} in the model")
    for name in config.order:
        stage = config.stages[name]
        make = (
            functools.partial(text_batch, model.tokenizer)
            if name == "text"
            else functools.partial(caption_batch, model.processor, name, config.captions_per_image)
        )
        log(f"stage {name}")
        settings = config.copy_and_resolve_references()
        settings.steps = stage.steps
        settings.optim.update({key: stage[key] for key in ("lr", "schedule", "warmup")})
        manifest = {"config": digest, "base": tree.digest(params), "data": name}
        (workdir / name).mkdir(parents=True, exist_ok=True)
        job = loop.Job(
            loss=functools.partial(objectives.loss, name, model),
            trainable={"params": params},
            frozen={"params": jax.tree.map(lambda _: None, params)},
            batches=_batches(config, stage, make),
            manifest=manifest,
        )
        state, timing = loop.fit(settings, workdir / name, job, log)
        params, seconds[name] = jax.device_get(state.tuned["params"]), timing
        if name == "text":
            params = objectives.after_text(params)
    full = objectives.shared({name: x for name, x in params.items() if name != "itm"})
    more = f",mixture={config.mixture},seed={config.seed}" if config.get("mixture") else ""
    command = f"python main.py --config=configs/pretrain.py:model={config.model_type}{more} --workdir=DIR"
    facts = {
        "name": objectives.NAME,
        "command": command,
        "scores": zero_shot(model, full, config),
        "timing": seconds,
        "total_s": round(time.perf_counter() - began, 1),
        "machine": host.machine(),
        "versions": host.versions(),
    }
    loading.save(workdir / "checkpoint", model, full, aliases=objectives.ALIASES, **facts)
    size = (workdir / "checkpoint" / "model.safetensors").stat().st_size
    log(f"{facts['scores']}\nwrote {workdir / 'checkpoint'} ({size / 1e6:.2f} MB) in {facts['total_s']:.0f} s")
    return facts


def zero_shot(model: VisionLanguageModel, params: Tree, config) -> dict:
    """CIDEr-D and nats per token on held-out images, for captions of each style (training has web captions); of a model that
    was trained on questions also the accuracy of its answers, by type."""
    task, scores = TASK, {}
    half = jax.tree.map(lambda x: jnp.asarray(np.float16(x), jnp.float32), params)  # what is stored
    if any("qa" in stage for stage in config.order):
        asks, answering = Vqa(max_new_tokens=9), model.for_task("vqa")
        held_out = scenes.load({"n_test": config.n_heldout}, ["test"])["test"]
        cases = asks.eval_examples(held_out, asks.template(answering))
        written = [one["text"] for one in evaluate.predict(answering, {"params": half}, asks, cases)]
        found = asks.score(cases.rows, written)
        scores["questions"] = {key: found[key] for key in ("accuracy", "by_type")} | {"n": len(cases)}
    model = model.for_task("captioning")
    variables = {"params": {name: half[name] for name in budget.abstract_params(model)}}
    for style in scenes.STYLES:
        held_out = scenes.load({"n_test": config.n_heldout, "captions": style}, ["test"])["test"]
        template = task.template(model)
        cases, examples = task.eval_examples(held_out, template), task.examples(held_out, template)
        written = [one["text"] for one in evaluate.predict(model, variables, task, cases)]
        scores[style] = {
            "cider_d": round(task.score(cases.rows, written)["cider_d"], 4),
            "nll": round(evaluate.nll(model, variables, task, examples), 4),
            "n": len(cases),
        }
    return scores
