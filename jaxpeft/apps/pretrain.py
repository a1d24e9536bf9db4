"""Pre-training of the tiny BLIP on procedural scenes: makes the checkpoint that the package ships.

BLIP's objectives (Li et al. 2022, section 3.2) at toy size in three stages, each a separate, resumable run:
    text     masked language modelling on text alone, in place of BLIP's initialisation from BERT
    lm       language modelling of two web captions per image
    lm_itm   the same, and image-text matching against hard negatives
Encoder and decoder share everything except self-attention, as in BLIP: of the encoder only the self-attention is stored, and
`shared` adds the rest before every forward pass. Each image has two negatives for matching: the caption in the batch that
shares the most words with its own, and its own caption with one colour, shape or side changed to something not in the image.
BLIP mines the former with a contrastive head; at this size word overlap is enough.

    python main.py --config=configs/pretrain.py --workdir=runs/pretrain
"""

import dataclasses
import functools
import time
from collections import Counter
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import ops, tree
from jaxpeft.data import scenes
from jaxpeft.data.base import pad_tokens
from jaxpeft.models import loading
from jaxpeft.models.base import Context
from jaxpeft.models.blip import Blip, BlipConfig, build, processor
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.ops import matmul
from jaxpeft.runtime import host
from jaxpeft.tasks.base import teacher_forced
from jaxpeft.tasks.captioning import Captioning
from jaxpeft.training import evaluate, loop
from jaxpeft.training.setup import as_json
from jaxpeft.training.setup import digest as run_digest
from jaxpeft.tree import Tree

ALIASES = {f"text_encoder/{part}": f"text_decoder/{part}" for part in ("embed",)} | {
    f"text_encoder/blocks/{part}": f"text_decoder/blocks/{part}"
    for part in ("cross_attention", "cross_norm", "mlp", "mlp_norm")
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
TEXT_LENGTH = 28  # tokens of a pre-training text, including special ones
TASK = Captioning(max_tokens=40, max_new_tokens=36, variant="coco")  # the task of the held-out scores in the manifest


def shared(params: Tree) -> Tree:
    """The full parameters from the stored ones: the encoder gets everything except self-attention from the decoder."""
    decoder, own = params["text_decoder"], params["text_encoder"]["blocks"]
    blocks = {part: decoder["blocks"][part] for part in ("cross_attention", "cross_norm", "mlp", "mlp_norm")}
    return {
        "vision": params["vision"],
        "text_decoder": decoder,
        "text_encoder": {"embed": decoder["embed"], "blocks": blocks | own},
    }


def init(model: Blip, seed: int) -> Tree:
    """The initial stored parameters and matching head."""
    full = jax.jit(lambda: model.init(jax.random.key(seed), model.example()))()["params"]
    own = {part: full["text_encoder"]["blocks"][part] for part in ("self_attention", "self_norm")}
    itm = {"kernel": jnp.zeros((model.config.text_width, 2)), "bias": jnp.zeros(2)}
    stored = {"vision": full["vision"], "text_decoder": full["text_decoder"], "text_encoder": {"blocks": own}}
    return stored | {"itm": itm}


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The loss of a stage, with the interface of a task's; each term is a mean, so the count is 1."""

    stage: str  # 'text', 'lm' or 'lm_itm'

    def loss(self, model, variables, batch, rngs):
        params = variables["params"]
        apply = functools.partial(model.apply, {"params": shared(params)}, rngs=rngs)
        if self.stage == "text":
            logits_BTV = apply(batch["tokens"], method="masked_lm")
            total, count = ops.token_loss(logits_BTV, batch["targets"], batch["weights"])
            return total / count, jnp.float32(1)
        image_BPD = apply(batch["image"], method="encode_image")
        n_images, n_texts, n_tokens = batch["tokens"].shape
        context = Context(image_BPD, None, jnp.zeros(n_images, jnp.int32))
        logits_BTV = apply(batch["tokens"].reshape(-1, n_tokens), context, method="score")
        logits_BATV = logits_BTV.reshape(n_images, n_texts, n_tokens, -1)
        total, count = ops.token_loss(logits_BATV, batch["targets"], batch["weights"])
        loss = total / count
        if self.stage == "lm_itm":
            loss += self._matching(model, params, apply, image_BPD, batch)
        return loss, jnp.float32(1)

    def _matching(self, model, params, apply, image_BPD, batch):
        """Binary cross-entropy of (image, text) pairs; the first text of each image is its own."""
        n_images, n_texts, n_tokens = batch["pairs"].shape
        states_BTD = apply(image_BPD, batch["pairs"].reshape(-1, n_tokens), method="encode_question")
        logits = matmul(states_BTD[:, 0], params["itm"]["kernel"], params["itm"]["bias"]).reshape(n_images, n_texts, 2)
        right_BA = jnp.tile(jnp.arange(n_texts) == 0, (n_images, 1))
        nll_BA = ops.token_nll(logits, right_BA.astype(jnp.int32))
        return (
            nll_BA * jnp.where(right_BA, 0.5, 0.5 / (n_texts - 1))
        ).sum() / n_images  # both classes have equal weight


def text_batch(tokenizer: BlipTokenizer, indices, rng: np.random.Generator) -> dict:
    """A batch masked as in BERT: 15 % of tokens are predicted; of these 80 % become [MASK], 10 % a random word, 10 % stay."""
    ids = pad_tokens([tokenizer.encode(scenes.text(0, int(i)), TEXT_LENGTH) for i in indices], 0, TEXT_LENGTH)
    maskable = (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
    chosen, kind = maskable & (rng.random(ids.shape) < 0.15), rng.random(ids.shape)
    random = rng.integers(7, len(tokenizer), ids.shape)  # after the special tokens
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


def caption_batch(tokenizer: BlipTokenizer, stage: str, n_texts: int, indices, rng: np.random.Generator) -> dict:
    """A batch of images with `n_texts` web captions each and, for matching, the texts (own, edited, nearest other)."""
    template = processor(BlipConfig(), tokenizer).template("captioning")
    indices = [int(i) for i in indices]
    captions = [scenes.web_captions("pretrain", i, n_texts) for i in indices]
    bodies = [[text.removeprefix(f"{template.start_text} ") for text in group] for group in captions]
    ids = [[template.target(text, TEXT_LENGTH)[0] for text in group] for group in bodies]
    batch = teacher_forced(ids, [[1.0] * n_texts] * len(ids), template)
    short = TEXT_LENGTH - 1 - batch["tokens"].shape[-1]  # one shape for every batch
    batch = {name: np.pad(x, ((0, 0), (0, 0), (0, short))) for name, x in batch.items()}
    batch["image"] = np.stack([scenes.render(scenes.scene("pretrain", i)) for i in indices])
    if stage == "lm_itm":
        own = [group[0] for group in captions]
        others = nearest_other(own)
        wrong = [
            edited(text, scenes.scene("pretrain", i), rng) or other
            for text, i, other in zip(own, indices, others, strict=True)
        ]
        groups = [text for triple in zip(own, wrong, others, strict=True) for text in triple]
        pairs = pad_tokens([tokenizer.encode(text, TEXT_LENGTH) for text in groups], tokenizer.pad_id, TEXT_LENGTH)
        pairs[:, 0] = tokenizer.enc_id
        batch["pairs"] = pairs.reshape(len(indices), 3, -1)
    return batch


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
    tokenizer = BlipTokenizer.from_words(scenes.WORDS)
    names = ("pad_id", "cls_id", "sep_id", "bos_id", "enc_id")
    architecture = BlipConfig(
        **config.architecture,
        vocab_size=len(tokenizer),
        question_encoder=True,
        **{name: getattr(tokenizer, name) for name in names},
    )
    model = build(architecture, tokenizer)
    params, seconds, digest = init(model, config.seed), {}, run_digest(as_json(config))
    log(f"{tree.count(params):,} stored parameters, {tree.count(shared(params)):,} in the model")
    for name in config.order:
        stage = config.stages[name]
        make = (
            functools.partial(text_batch, tokenizer)
            if name == "text"
            else functools.partial(caption_batch, tokenizer, name, config.captions_per_image)
        )
        log(f"stage {name}")
        settings = config.copy_and_resolve_references()
        settings.steps = stage.steps
        settings.optim.update({key: stage[key] for key in ("lr", "schedule", "warmup")})
        manifest = {"config": digest, "base": tree.digest(params), "data": name}
        (workdir / name).mkdir(parents=True, exist_ok=True)
        job = loop.Job(
            loss=functools.partial(Pretraining(stage=name).loss, model),
            trainable={"params": params},
            frozen={"params": jax.tree.map(lambda _: None, params)},
            batches=_batches(config, stage, make),
            manifest=manifest,
        )
        state, timing = loop.fit(settings, workdir / name, job, log)
        params, seconds[name] = jax.device_get(state.tuned["params"]), timing
        if name == "text":  # encoder and decoder get the same self-attention; both of BLIP's are initialised from BERT
            blocks = params["text_decoder"]["blocks"]
            params["text_encoder"]["blocks"] = {part: blocks[part] for part in ("self_attention", "self_norm")}
    facts = {
        "name": "tiny BLIP on scenes",
        "command": "python main.py --config=configs/pretrain.py --workdir=DIR",
        "scores": zero_shot(model, params, config),
        "timing": seconds,
        "total_s": round(time.perf_counter() - began, 1),
        "machine": host.machine(),
        "versions": host.versions(),
    }
    stored = {name: params[name] for name in ("vision", "text_decoder", "text_encoder")}
    loading.save(workdir / "checkpoint", model, shared(stored), aliases=ALIASES, **facts)
    size = (workdir / "checkpoint" / "model.safetensors").stat().st_size
    log(f"{facts['scores']}\nwrote {workdir / 'checkpoint'} ({size / 1e6:.2f} MB) in {facts['total_s']:.0f} s")
    return facts


def zero_shot(model: Blip, params: Tree, config) -> dict:
    """CIDEr-D and nats per token on held-out images, for web captions (as in training) and for human ones."""
    task, scores = TASK, {}
    half = jax.tree.map(lambda x: jnp.asarray(np.float16(x), jnp.float32), shared(params))  # what is stored
    model = model.for_task("captioning")
    variables = {"params": {name: half[name] for name in ("vision", "text_decoder")}}
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
