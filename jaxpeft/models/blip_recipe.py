"""How BLIP was fine-tuned (Li et al. 2022, arXiv:2201.12086): what its recipes in configs/ share."""

import ml_collections


def fine_tuning(c: ml_collections.ConfigDict, a: ml_collections.ConfigDict, n_examples: int, lr: float) -> None:
    """Set what BLIP's two published fine-tunings share; `a`: arguments of a recipe; `n_examples`: examples per epoch."""
    c.model.image_size, c.model.dtype, c.model.dropout = a.image_size, a.dtype, 0.1
    c.model.frozen_dtype = a.dtype
    c.model.extend_vocabulary = False  # WordPiece can spell nearly all words
    c.batch_size, c.steps = a.batch_size, a.steps or a.epochs * n_examples // a.batch_size
    c.optim.lr, c.optim.warmup, c.optim.weight_decay, c.optim.clip_norm = a.lr or lr, 0.0, 0.05, 0.0
    c.optim.no_decay = ""
    c.eval.base = False
