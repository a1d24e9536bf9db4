"""How BLIP was fine-tuned (Li et al. 2022, arXiv:2201.12086): what its recipes in configs/ share."""

import ml_collections


def fine_tuning(c: ml_collections.ConfigDict) -> None:
    """Set what BLIP's two published fine-tunings share."""
    c.model.dropout, c.data.augment = 0.1, "blip"
    c.model.extend_vocabulary = False  # WordPiece can spell nearly all words
    c.optim.warmup, c.optim.weight_decay, c.optim.clip_norm, c.optim.no_decay = 0.0, 0.05, 0.0, ""
