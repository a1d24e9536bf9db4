"""How mPLUG was fine-tuned (Li et al. 2022, arXiv 2205.12005, and its release): what its recipes in configs/ share."""

import ml_collections

VISION = r"^params/vision/"
NO_DECAY = (
    r"(bias|(self|cross|mlp)_norm/scale|(embed|head)/norm/scale)$"  # "bias" and "LayerNorm.weight": not CLIP's norms
)


def fine_tuning(c: ml_collections.ConfigDict, a: ml_collections.ConfigDict, n_examples: int, lr: float) -> None:
    """Set what the release's two fine-tunings share; `a`: arguments of a recipe; `n_examples`: examples per epoch; `lr`: of the
    text stacks. Full tuning has a second learning rate, for the ViT, and the release's schedule; a method has neither."""
    c.model.image_size, c.model.dtype, c.model.dropout = a.image_size, a.dtype, 0.1
    c.model.frozen_dtype = a.dtype
    c.model.extend_vocabulary = False  # WordPiece can spell nearly all words
    c.data.augment = "mplug"
    c.batch_size, c.steps = a.batch_size, a.steps or a.epochs * n_examples // a.batch_size
    c.optim.lr, c.optim.weight_decay, c.optim.no_decay, c.optim.clip_norm = a.lr or lr, 0.02, NO_DECAY, 0.0
    if a.method == "full":
        c.optim.lr_groups = ((VISION, 5e-6 / c.optim.lr),)
        c.optim.start_lr, c.optim.end_lr = 1e-5, 1e-6
        c.optim.warmup = min(0.5, 400 / c.steps)
    c.eval.base, c.eval.beams = False, 5
