"""Your own pictures: a directory and one annotation file, tuned with one command.

    python main.py --config=configs/folder.py:root=pics,annotations=captions.csv,base=blip-base --workdir=runs/mine
    python main.py --config=configs/folder.py:task=vqa,root=pics,annotations=qa.jsonl --workdir=runs/mine_vqa
    python main.py --config=configs/folder.py:root=pics,train=train.csv,test=test.csv,base=blip-base --workdir=runs/mine

`annotations` is looked up below `root` first: a CSV or JSONL with `image, caption` or `image, question, answer`, COCO
captions JSON, Karpathy's dataset_coco.json, BLIP's list of rows, or VQA v2 annotations with
--config.data.questions=FILE. Pictures are split by a hash of their id, unless the file names splits or there is a file for
each: train=, val=, test=.
Texts are as long as they are: the longest decides, up to what the base reads; --config.task_options.max_tokens=40 (captions),
.length=10 (answers) or .max_question=35 cut them, and every cut is counted. Answers and captions are compared without case,
accents and the spacing of punctuation; --config.task_options.variant=official2021 scores answers as VQA v2's server does, =coco
captions as COCO's.
`base` is a directory with a Hugging Face BLIP (config.json, model.safetensors, vocab.txt) or, for a quick try, 'tiny'.
--config.data.on_error=skip drops rows that are broken and counts them in result.json.
"""

from configs import common


def get_config(arg=""):
    a = common.parse_arg(
        arg,
        root="",
        annotations="",
        train="",
        val="",
        test="",
        task="captioning",
        base="tiny",
        method="lora",
        size=16,
        head="none",
        steps=0,
        seed=0,
    )
    if not a.root:
        raise ValueError("configs/folder.py needs root=DIRECTORY")
    files = common.annotations(a)
    c = common.folder(common.get_config(a.task, a.method, a.size, a.head), a.root)
    c.base, c.seed, c.data.annotations = a.base, a.seed, files
    # as long as validation falls, at most 30 epochs; the best step is kept, or step 0 where nothing was learned from pictures
    c.steps, c.epochs, c.optim.schedule = a.steps, 30.0, "plateau"
    c.stop.every, c.stop.patience, c.stop.images_must_matter = 0, 5, True
    c.eval.text_only = True
    c.optim.lr = {"full": 1e-5 if a.base != "tiny" else 5e-4}.get(a.method, 1e-3)
    c.batch_size = 32 if a.base == "tiny" else 8
    c.eval.batch_size = c.batch_size
    return c
