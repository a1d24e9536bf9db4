"""How mPLUG was fine-tuned (Li et al. 2022, arXiv 2205.12005, and its release): what its recipes in configs/ share."""

import ml_collections

VISION = r"^params/vision/"
NO_DECAY = (
    r"(bias|(self|cross|mlp)_norm/scale|(embed|head)/norm/scale)$"  # "bias" and "LayerNorm.weight": not CLIP's norms
)


def fine_tuning(c: ml_collections.ConfigDict) -> None:
    """Set what the release's two fine-tunings share. Full tuning has a second learning rate, for the ViT, and the release's
    schedule; a method has neither."""
    c.model.dropout, c.data.augment = 0.1, "mplug"
    c.model.extend_vocabulary = False  # WordPiece can spell nearly all words
    c.optim.warmup, c.optim.weight_decay, c.optim.clip_norm, c.optim.no_decay = 0.0, 0.02, 0.0, NO_DECAY
    if c.method.name == "full":
        c.optim.lr_groups = ((VISION, 5e-6 / c.optim.lr),)
        c.optim.start_lr, c.optim.end_lr = 1e-5, 1e-6
        c.optim.warmup = min(0.5, 400 / c.steps)
    c.eval.beams = 5
