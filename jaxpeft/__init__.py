"""jaxpeft: parameter-efficient fine-tuning of vision-language models in JAX/Flax.

The map, in the order in which data flow:
    datasets/ tasks/ images text data     records -> examples -> batches
    layers sites models/ methods/ tree    model + what is tuned and where
    losses optim sharding train point     the step, the one loop, and a run from config to result
    decode metrics evals results          answers, scores, files
    checkpoint hub pretrain               what is kept, what comes in, what is shipped

    import jax, jaxpeft as jp
    model, params = jp.load("tiny", question_encoder=True)
    method = jp.LoRA(rank=8)
    variables = jp.attach(model, params, method, jax.random.key(0))
    tuned, frozen = jp.split(variables, jp.trainable(method, variables))
"""

from jaxpeft.evals import generate
from jaxpeft.hub import load
from jaxpeft.methods import METHODS, Full, Head, LoRA, Method, Selective
from jaxpeft.point import run
from jaxpeft.sites import attach, counts, merge, trainable
from jaxpeft.tree import join, split

__all__ = [
    "METHODS", "Full", "Head", "LoRA", "Method", "Selective", "attach", "counts", "generate", "join", "load", "merge",
    "run", "split", "trainable",
]  # fmt: skip
