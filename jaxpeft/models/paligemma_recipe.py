"""How big_vision transfers PaliGemma (Beyer et al. 2024, arXiv 2407.07726): what its recipes in configs/ share."""

import ml_collections


def transfer(c: ml_collections.ConfigDict) -> None:
    """Set what the recipes share."""
    c.model.remat = "full"
    c.optim.warmup, c.optim.clip_norm, c.optim.b2, c.optim.weight_decay = 0.05, 1.0, 0.999, 0.0
    c.task_options.smoothing = 0.0
