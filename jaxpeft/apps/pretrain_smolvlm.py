"""Pre-training of a tiny decoder-only model on scenes, SmolVLM's at toy size. See apps/pretrain.py.

    lm       language modelling of two web captions per image, after the caption prompt
    lm_qa    the same, and the answers to two questions per image, after each question; lm_qa_again the same on other images

Questions are of the types `color`, `shape` and `position`, whose answers captions state too; those that ask what is there, how
many, or which is larger stay new to the base. The tokenizer is a byte-level BPE, trained on the texts of the scenes.
"""

import functools
import json

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxpeft import ops
from jaxpeft.data import scenes
from jaxpeft.inputs.bpe import Bpe
from jaxpeft.models.smolvlm import SmolVLM, SmolVLMConfig
from jaxpeft.tree import Tree

ALIASES: dict[str, str] = {}
NAME = "tiny decoder-only model on scenes"

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
)
N_MERGES = 300


def tokenizer() -> Bpe:
    """A byte-level BPE in which the words of the scenes are single tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + len(alphabet) + N_MERGES, special_tokens=list(SPECIAL), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    texts = [f" {word}" for word in scenes.WORDS] * 2 + ["User: Can you describe this image?\nAssistant: a"] * 2
    for i in range(500):
        texts += [f" {text}" for text in scenes.web_captions("pretrain", i, 2)]
        texts += [f"{q['question']}? {q['answers'][0]}" for q in scenes.questions("pretrain", i)]
    library.train_from_iterator(texts, trainer)
    settings = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # so that transformers reads the files as they are
    return Bpe(library.to_str(), json.dumps(settings))


def model(tokenizer: Bpe, **architecture) -> SmolVLM:
    """The model that is trained."""
    ids = {"vocab_size": len(tokenizer), "pad_id": tokenizer.pad_id, "image_id": tokenizer.ids["<image>"]}
    return SmolVLM.build(SmolVLMConfig(**architecture, **ids), tokenizer)


def shared(params: Tree) -> Tree:
    """The parameters of the model: all stored ones."""
    return params


def init(model: SmolVLM, seed: int) -> Tree:
    """The initial parameters."""
    return jax.jit(lambda: model.init(jax.random.key(seed), model.example()))()["params"]


def loss(stage: str, model: SmolVLM, variables: Tree, batch: dict, rngs: dict) -> tuple[jax.Array, jax.Array]:
    """The loss of a stage, with a count of 1, as each term is a mean. `stage`: one with 'qa' in its name has questions."""
    apply = functools.partial(model.apply, variables, rngs=rngs)
    image_BPD = apply(batch, "image_tokens", method="stage")
    total = _text_loss(apply, image_BPD, batch, "")
    if "qa" in stage:
        total += _text_loss(apply, image_BPD, batch, "answer_")
    return total, jnp.float32(1)


def _text_loss(apply, image_BPD: jax.Array, batch: dict, prefix: str) -> jax.Array:
    """The mean loss of the tokens of texts (B, A, T) after prompts: (B, Q), or (B * n, Q) for n questions per image."""
    prompt_RQ = batch[f"{prefix}prompt"]
    image_RPD = jnp.repeat(image_BPD, prompt_RQ.shape[0] // image_BPD.shape[0], axis=0)
    logits = apply({"image_tokens": image_RPD, "prompt": prompt_RQ, "tokens": batch[f"{prefix}tokens"]})
    total, count = ops.token_loss(logits, batch[f"{prefix}targets"], batch[f"{prefix}weights"])
    return total / count
