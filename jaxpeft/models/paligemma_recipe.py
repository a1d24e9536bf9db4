"""How big_vision transfers PaliGemma (Beyer et al. 2024, arXiv 2407.07726): what its recipes in configs/ share."""

import ml_collections


def transfer(c: ml_collections.ConfigDict, a: ml_collections.ConfigDict, n_examples: int, lr: float) -> None:
    """Set what the recipes share; `a`: arguments of a recipe; `n_examples`: examples per epoch."""
    c.model.image_size, c.model.dtype = a.image_size, a.dtype
    c.model.frozen_dtype, c.model.remat = a.dtype, "full"
    c.data.augment = "none"
    c.batch_size, c.steps = a.batch_size, a.steps or a.epochs * n_examples // a.batch_size
    c.optim.lr, c.optim.warmup, c.optim.clip_norm, c.optim.b2, c.optim.weight_decay = a.lr or lr, 0.05, 1.0, 0.999, 0.0
    c.task_options.smoothing = 0.0
    c.eval.base = False
