"""Your own pictures: a directory and their texts, tuned with one command.

    python main.py --config=configs/folder.py:root=pics,base=Salesforce/blip-image-captioning-base --workdir=runs/mine
    python main.py --config=configs/folder.py:root=pics,annotations=captions.csv,base=path/to/blip --workdir=runs/mine
    python main.py --config=configs/folder.py:task=vqa,root=pics,annotations=qa.jsonl --workdir=runs/mine_vqa
    python main.py --config=configs/folder.py:root=pics,train=train.csv,test=test.csv --workdir=runs/mine

Texts. With root alone: metadata.csv or metadata.jsonl with `file_name, text`, as Hugging Face's ImageFolder has them,
or else cat.txt beside cat.jpg, a caption a line. `annotations` names a file, looked up below root first: a CSV or JSONL
with `image, caption` or `image, question, answer` (several captions as caption_1, caption_2, or as a list), COCO
captions JSON, Karpathy's dataset_coco.json, BLIP's list of rows, or VQA v2 annotations with
--config.data.questions=FILE.
Splits. Directories train/, val/ and test/ that hold all pictures, a column `split`, or a file for each: train=, val=,
test=. Else a tenth of the pictures each is for validation and for the test, by a hash of their id (data.val_fraction,
data.test_fraction). Where a test is named and no val, validation takes its tenth of train.
Base. `owner/name` of the Hugging Face hub, a directory with a Hugging Face BLIP (config.json, model.safetensors,
vocab.txt), or 'tiny', for a quick try.
Training. As long as the loss on validation falls, at most 30 epochs (but 100 steps at least); the best step is kept. If
validation texts cannot be shown to be more likely with their own picture than with another, nothing was learned from
the pictures: step 0 is kept, and the run says so (with 5 to 19 validation pictures the mean alone decides, with fewer
nothing is tested). --config.optim.schedule=cosine --config.steps=1000 trains so many steps without validation and keeps
the last.
Limits. Texts are as long as they are, up to what the base reads; --config.task_options.max_tokens=40 (captions),
.max_new_tokens=9 (answers) or .max_question=35 cut them, and every cut is counted. Answers and captions are compared without
case, accents and the spacing of punctuation; --config.task_options.variant=official2021 scores answers as VQA v2's
server does, =coco captions as COCO's. --config.data.on_error=skip drops rows that are broken and counts them in
result.json.
"""

from jaxpeft import config


def get_config(arg=""):
    a = config.parse_arg(
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
    files = config.annotations(a)
    c = config.folder(config.get_config(a.task, a.method, a.size, a.head), a.root)
    c.base, c.seed, c.data.annotations = a.base, a.seed, files
    # as long as the validation loss falls; the best step is kept, or step 0 where nothing was learned from the pictures
    c.steps, c.epochs, c.optim.schedule = a.steps, 30.0, "plateau"
    c.stop.every, c.stop.patience, c.stop.images_must_matter = 0, 5, True
    c.eval.text_only = True
    c.optim.lr = {"full": 1e-5 if a.base != "tiny" else 5e-4}.get(a.method, 1e-3)
    c.batch_size = 32 if a.base == "tiny" else 8
    c.eval.batch_size = c.batch_size
    return c
