"""The defaults of every run, and typed arguments: `--config=configs/point.py:task=vqa,method=lora,size=8`.

Every key can also be set alone: `--config.optim.lr=1e-3`. Unknown keys and arguments are errors.
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from jaxpeft import methods, tasks
from jaxpeft.runtime.registry import did_you_mean

# texts of scenes: the longest captions have 40 words; one length for all subsets is one compiled program
SCENES_LIMITS = {
    "captioning": {"max_tokens": 48, "max_new_tokens": 44},
    "vqa": {"max_question": 35, "max_new_tokens": 9},
}


def parse_arg(arg: str, **defaults) -> ml_collections.ConfigDict:
    """'key=value,flag' -> values typed as the defaults; raises ValueError for an unknown key, listing the known ones."""
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, _, text = part.partition("=")
        if key not in defaults:
            raise ValueError(
                f"unknown config argument {key!r}{did_you_mean(key, defaults)}; choose from {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        if kind is bool:
            if text.lower() not in ("", "true", "false", "1", "0"):
                raise ValueError(f"config argument {key}={text!r}: give true or false")
            values[key] = text.lower() not in ("false", "0")
        else:
            try:
                values[key] = kind(text)
            except ValueError as error:
                raise ValueError(f"config argument {key}={text!r} is not a {kind.__name__}") from error
    return ml_collections.ConfigDict(values)


def get_config(task: str = "vqa", method: str = "lora", size: int = 8, head: str = "none") -> ml_collections.ConfigDict:
    """A complete config for one task and method."""
    c = ml_collections.ConfigDict()
    c.name = config_dict.placeholder(str)  # of the point in its result; made up from the settings where None
    c.task = task
    c.task_options = task_options(task, **SCENES_LIMITS.get(task, {}))
    c.base = "tiny"  # the shipped checkpoint, a directory (ours or Hugging Face's), or owner/name[@revision] of the hub
    c.init = "base"  # 'scratch': the same architecture with random weights, as a control
    c.seed = 0
    size_field = methods.size_field(method)
    c.size = size if size_field else 0

    c.method = ml_collections.ConfigDict({"name": method, **methods.defaults(method)})
    if size_field:
        c.method[size_field] = size
    c.head = head  # 'none', 'transform', 'untied': the decoder head tuned beside the method

    c.model = ml_collections.ConfigDict()
    c.model.image_size = config_dict.placeholder(int)  # None: the checkpoint's; else positions are resized
    c.model.dtype = "float32"  # 'bfloat16' on accelerators
    c.model.frozen_dtype = "float32"  # of frozen matrices in memory; 'bfloat16' halves them
    c.model.remat = "none"  # 'full' or 'dots': what the backward pass computes again, to hold less
    c.model.dropout = 0.0
    c.model.extend_vocabulary = (
        True  # add words that a base without word pieces lacks (the tiny one), and tune their rows
    )

    c.data = ml_collections.ConfigDict()
    c.data.name = "scenes"
    c.data.seed = 0  # of the data set itself
    c.data.n_train = 16384
    c.data.n_val = 512
    c.data.n_test = 512
    c.data.fraction = 1.0  # of the training pictures; subsets of one subset_seed are nested
    c.data.n_images = config_dict.placeholder(int)  # or their number
    c.data.subset_seed = 0
    c.data.captions = "human"  # of scenes; 'web': the style of pre-training
    c.data.types = ()  # of scenes: the types of questions kept; () is all
    c.data.augment = "none"  # 'crop', 'crop_flip', 'blip' (and RandAugment), of pictures at their native size
    c.data.feature_bytes = 4 << 30  # most memory for the outputs of one frozen stage (image tokens, question states)

    c.mesh = ml_collections.ConfigDict({"data": 0, "fsdp": 1, "tensor": 1})  # devices; data 0: what the others leave
    c.batch_size = 32
    c.grad_accum = 1  # microbatches per step
    c.steps = 1200  # 0: as many as `epochs` passes over the training examples take, at least 100
    c.epochs = 0.0
    c.optim = ml_collections.ConfigDict()
    c.optim.name = "adamw"  # a key of jaxpeft.training.optim.OPTIMIZERS: adafactor, lion, muon, sgd
    c.optim.lr = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup = 0.06
    c.optim.cooldown = 0.2  # of schedule 'plateau'
    c.optim.weight_decay = 0.0
    c.optim.no_decay = r"(bias|scale|position|class_embedding)$"
    c.optim.clip_norm = 1.0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999

    c.stop = ml_collections.ConfigDict()  # schedule 'plateau': optim.cooldown follows when validation stops improving
    c.stop.split = "val"
    c.stop.examples = 512  # of that split, in each validation
    c.stop.every = 100  # steps between validations; 0: as many as make 40 validations in all
    c.stop.patience = 3  # validations without progress
    c.stop.min_gain = 0.005  # share of the loss that counts as progress
    c.stop.images_must_matter = False  # keep step 0 if, at the best step, texts are as likely with other pictures

    c.log_every = 20
    # between saves, by the clock: what a kill costs at most. A save of LoRA's state stops training for some 10 ms, so a minute
    # is cheap; where saves are slow the loop makes them rarer. 0: every step
    c.checkpoint_seconds = 60.0
    c.checkpoint_keep = 2  # the newest so many
    c.check_frozen = False  # digest the frozen half before and after training
    c.eval = ml_collections.ConfigDict()
    c.eval.splits = ("test",)
    c.eval.batch_size = 128
    c.eval.beams = 1
    c.eval.base = True  # score the frozen base too
    c.eval.text_only = False  # and what was tuned beside grey pictures
    c.eval.gallery = True
    c.eval.forgetting = False  # scenes: how much likelier or not web captions of test pictures became
    return c


def task_options(task: str, **changes) -> ml_collections.ConfigDict:
    """Every option of a task with its default or what is given here, so that each can be set on the command line."""
    fields = {field.name: field.default for field in dataclasses.fields(tasks.TASKS.find(task))}
    return ml_collections.ConfigDict(fields | changes)


def annotations(a) -> "str | dict[str, str] | None":
    """What `annotations=FILE` or `train=FILE,val=FILE,test=FILE` name; None for neither: the root is searched for texts.

    Raises ValueError for both, and for files of other splits without one for train.
    """
    by_split = {name: a[name] for name in ("train", "val", "test") if a[name]}
    if a.annotations and by_split:
        raise ValueError(
            "give annotations=FILE, or a file for each split: train=FILE,test=FILE (and val=FILE); not both"
        )
    if by_split and "train" not in by_split:
        raise ValueError(f"files for {', '.join(by_split)} but none for train; give train=FILE too")
    return a.annotations or by_split or None


def folder(c: ml_collections.ConfigDict, root: str) -> ml_collections.ConfigDict:
    """Point a config at a directory of your own pictures (see jaxpeft/data/folder/ for the file formats)."""
    c.data.name = "folder"
    c.task_options = task_options(c.task)  # limits of 0: as long as the longest text
    c.data.root = root
    c.data.annotations = config_dict.placeholder(object)
    c.data.questions = config_dict.placeholder(object)
    c.data.on_error = "raise"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.1
    c.data.data_dir = config_dict.placeholder(str)
    return c
