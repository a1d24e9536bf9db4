"""The default config of a run, and typed config arguments: `--config=configs/point.py:task=vqa,method=lora,size=8`.

Every key can also be set on its own: `--config.optim.lr=1e-3`. Unknown keys and arguments are errors.
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from jaxpeft import methods, tasks
from jaxpeft.runtime.registry import did_you_mean

# scenes: the longest captions have 40 words; with one length for all subsets they share one compiled program
SCENES_LIMITS = {
    "captioning": {"max_tokens": 48, "max_new_tokens": 44},
    "vqa": {"max_question": 35, "max_new_tokens": 9},
}


def parse_arg(arg: str, **defaults) -> ml_collections.ConfigDict:
    """Parse 'key=value,flag' to the types of the defaults; raises ValueError for an unknown key, listing the known ones."""
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
                raise ValueError(f"config argument {key}={text!r}: expected true or false")
            values[key] = text.lower() not in ("false", "0")
        else:
            try:
                values[key] = kind(text)
            except ValueError as error:
                raise ValueError(f"config argument {key}={text!r}: expected {kind.__name__}") from error
    return ml_collections.ConfigDict(values)


def get_config(task: str = "vqa", method: str = "lora", size: int = 8, head: str = "none") -> ml_collections.ConfigDict:
    """The complete default config for one task and method."""
    c = ml_collections.ConfigDict()
    c.name = config_dict.placeholder(str)  # of the run in its result; None: made from the settings
    c.task = task
    c.task_options = task_options(task, **SCENES_LIMITS.get(task, {}))
    # tiny, tiny_mplug or tiny_decoder of the package, a jaxpeft or Hugging Face directory, mPLUG's .pth file, or
    # owner/name[@revision] of the hub
    c.base = "tiny"
    c.init = "base"  # 'scratch': the same architecture with random weights, a control
    c.seed = 0
    size_field = methods.size_field(method)

    c.method = ml_collections.ConfigDict({"name": method, **methods.defaults(method)})
    if size_field:
        c.method[size_field] = size
    c.head = head  # 'none', 'transform', 'untied': how the decoder head is trained beside the method

    c.model = ml_collections.ConfigDict()
    c.model.image_size = config_dict.placeholder(int)  # None: that of the checkpoint; else positions are resized
    c.model.dtype = "float32"  # on every device; set 'bfloat16' on accelerators
    # Of float32 products: 'default', 'high' or 'highest'. None: the device's default, which on recent GPUs is TF32, with 10
    # bits of mantissa, and on TPUs bfloat16; 'highest' is float32
    c.model.precision = config_dict.placeholder(str)
    c.model.frozen_dtype = "float32"  # of frozen matrices in memory; 'bfloat16' halves their size
    # What the backward pass recomputes to save memory: 'none', 'dots' or 'full'. None: 'dots' where the image encoder is
    # trained in bfloat16 on an accelerator, which halves the memory of activations there, otherwise 'none'
    c.model.remat = config_dict.placeholder(str)
    c.model.unroll = config_dict.placeholder(int)  # stacks of at most this many layers have no loop; None: all, CPU 16
    # 'plain', 'parts' (on CPU) or 'cudnn'. None: 'parts' on CPU, 'cudnn' on GPU in bfloat16, else 'plain'
    c.model.attention = config_dict.placeholder(str)
    c.model.dropout = 0.0
    c.model.extend_vocabulary = True  # add words that a base without word pieces (tiny) lacks, and train their rows

    c.data = ml_collections.ConfigDict()
    c.data.name = "scenes"
    c.data.seed = 0  # of the data set itself
    c.data.n_train = 16384
    c.data.n_val = 512
    c.data.n_test = 512
    c.data.fraction = 1.0  # of the training images; subsets with one subset_seed are nested
    c.data.n_images = config_dict.placeholder(int)  # instead of `fraction`: the number of training images
    c.data.subset_seed = 0
    c.data.captions = "human"  # scenes only; 'web': the style of pre-training; 'clean': that style without noise
    c.data.types = ()  # scenes only: the types of questions to keep; (): all
    c.data.texts = config_dict.placeholder(int)  # scenes only: captions and questions to keep of each training image
    c.data.augment = "none"  # 'crop', 'crop_flip', 'blip' or 'mplug' (add RandAugment), on images at their native size
    c.data.feature_bytes = 4 << 30  # memory limit for the outputs of one frozen stage (image tokens, question states)

    c.mesh = ml_collections.ConfigDict({"data": 0, "fsdp": 1, "tensor": 1})  # devices; data 0: all remaining ones
    c.batch_size = 32
    c.grad_accum = 1  # microbatches per step
    c.steps = 1200  # 0: as many as `epochs` passes over the training examples take, at least 100
    c.epochs = 0.0
    c.optim = ml_collections.ConfigDict()
    c.optim.name = "adamw"  # a key of jaxpeft.training.optim.OPTIMIZERS: adafactor, lion, muon, sgd
    c.optim.lr = 3e-3
    c.optim.lr_groups = ()  # pairs (pattern of leaf names, factor of the learning rate): (("^params/vision", 0.5),)
    c.optim.schedule = "cosine"
    c.optim.warmup = 0.06
    c.optim.start_lr = 0.0  # where the warm-up begins
    c.optim.end_lr = 0.0  # where the decay ends
    c.optim.cooldown = 0.2  # schedule 'plateau': share of the steps
    c.optim.weight_decay = 0.0
    c.optim.no_decay = r"(bias|scale|position|class_embedding)$"
    c.optim.clip_norm = 1.0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999

    c.stop = ml_collections.ConfigDict()  # schedule 'plateau': start the cooldown when validation stops improving
    c.stop.split = "val"
    c.stop.examples = 512  # of that split, used in each validation
    c.stop.every = 100  # steps between validations; 0: chosen to give 40 validations
    c.stop.patience = 3  # validations without improvement; 0: never stop early
    c.stop.min_gain = 0.005  # relative decrease of the loss that counts as an improvement
    c.stop.images_must_matter = False  # keep step 0 if, at the best step, texts are as likely with other images

    c.log_every = 20
    # Time between checkpoints: what a killed run loses at most. Saving LoRA's state stops training for about 10 ms, so a
    # minute is cheap; where saving is slow, the loop saves less often. 0: every step
    c.checkpoint_seconds = 60.0
    c.checkpoint_keep = 2  # number of newest checkpoints to keep
    # on GPUs: only kernels that give the same bits every time; slower (runtime/host.py). None: no, as in older runs
    c.deterministic = config_dict.placeholder(bool)
    c.check_frozen = False  # digest the frozen parameters before and after training
    c.eval = ml_collections.ConfigDict()
    c.eval.splits = ("test",)
    c.eval.batch_size = 128
    c.eval.beams = 1
    c.eval.base = True  # also score the frozen base
    c.eval.text_only = False  # also score the tuned model without images
    c.eval.gallery = True
    c.eval.forgetting = False  # scenes: change of the likelihood of web captions of test images
    return c


def task_options(task: str, **changes) -> ml_collections.ConfigDict:
    """All options of a task, defaults replaced by `changes`, so that each can be set on the command line."""
    fields = {field.name: field.default for field in dataclasses.fields(tasks.TASKS.find(task))}
    fields = {name: config_dict.placeholder(str) if value is None else value for name, value in fields.items()}
    return ml_collections.ConfigDict(fields | changes)


def annotations(a) -> "str | dict[str, str] | None":
    """The files of `annotations=FILE` or `train=FILE,val=FILE,test=FILE`; None without either: the root is searched for texts.

    Raises ValueError if both are given, and for files of other splits without one for train.
    """
    by_split = {name: a[name] for name in ("train", "val", "test") if a[name]}
    if a.annotations and by_split:
        raise ValueError(
            "give either annotations=FILE or one file per split, train=FILE,test=FILE (and val=FILE), not both"
        )
    if by_split and "train" not in by_split:
        raise ValueError(f"got files for {', '.join(by_split)} but none for train; add train=FILE")
    return a.annotations or by_split or None


def folder(c: ml_collections.ConfigDict, root: str) -> ml_collections.ConfigDict:
    """Point a config at a directory of your own images (see jaxpeft/data/folder/ for the file formats)."""
    c.data.name = "folder"
    c.task_options = task_options(c.task)  # limits of 0: as long as the longest text
    c.data.root = root
    c.data.annotations = config_dict.placeholder(object)
    c.data.questions = config_dict.placeholder(object)
    c.data.on_error = "raise"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.1
    c.data.data_dir = config_dict.placeholder(str)
    c.data.jpeg_edge = config_dict.placeholder(int)
    return c


N_CAPTIONS = 566_435  # of COCO, for its 113,287 training images
N_QUESTIONS = {"karpathy": 605_102, "official": 658_111}  # of VQA v2
N_GENOME = 1_445_322  # of Visual Genome
LR = {"prompt": 3e-2, "prefix": 1e-3}  # not tuned; 2e-4 for other methods


def recipe(arg: str, task: str, lr: float, **defaults) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    """(config, arguments) of a published recipe for COCO captions or VQA v2; what is a model's own is set by its file.

    `lr`: of full tuning. `defaults`: of the arguments that differ between recipes: `base`, `epochs`, `batch_size` and
    `image_size`, for VQA also `protocol`, and others that only one recipe has.
    """
    a = parse_arg(
        arg, **defaults, data_dir="", method="full", size=16, head="none", lr=0.0, steps=0, seed=0, dtype="bfloat16"
    )
    c = get_config(task, a.method, a.size, a.head)
    c.base, c.seed, c.batch_size = a.base, a.seed, a.batch_size
    c.model.image_size, c.model.dtype, c.model.frozen_dtype = a.image_size, a.dtype, a.dtype
    c.data.name, c.data.data_dir, n = "coco_captions", a.data_dir, N_CAPTIONS
    c.data.jpeg_edge = config_dict.placeholder(int)
    c.eval.base, c.eval.splits = False, ("test",)
    if task == "vqa":
        if a.protocol not in N_QUESTIONS:
            raise ValueError(f"protocol is {a.protocol!r}; choose 'karpathy' or 'official'")
        c.data.name, c.data.protocol, c.data.train_parts = "vqav2", a.protocol, ("train", "val")
        c.data.visual_genome = a.get("visual_genome", False)
        c.eval.splits = ("test",) if a.protocol == "karpathy" else ("test_dev", "test")
        n = N_QUESTIONS[a.protocol] + N_GENOME * c.data.visual_genome
    c.steps = a.steps or a.epochs * n // a.batch_size
    c.optim.lr = a.lr or (LR | {"full": lr}).get(a.method, 2e-4)
    return c, a
