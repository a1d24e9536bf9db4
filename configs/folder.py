"""Tune on your own images: one command for a directory of images and their texts.

    python main.py --config=configs/folder.py:root=pics,base=Salesforce/blip-image-captioning-base --workdir=runs/mine
    python main.py --config=configs/folder.py:root=pics,annotations=captions.csv,base=path/to/blip --workdir=runs/mine
    python main.py --config=configs/folder.py:task=vqa,root=pics,annotations=qa.jsonl --workdir=runs/mine_vqa
    python main.py --config=configs/folder.py:root=pics,train=train.csv,test=test.csv --workdir=runs/mine

Texts. Without annotations=: metadata.csv or metadata.jsonl with `file_name, text`, as in Hugging Face's ImageFolder, or else
cat.txt beside cat.jpg, with one caption per line. `annotations` is a file, below root or in the working directory: CSV or JSONL
with `image, caption` or `image, question, answer` (several captions as caption_1, caption_2, or as a list), COCO
captions JSON, Karpathy's dataset_coco.json, BLIP's list of rows, or VQA v2 annotations with
--config.data.questions=FILE.
Splits. Directories train/, val/ and test/ that hold all images, a column `split`, or a file for each split: train=, val=,
test=. Otherwise a tenth of the images is used for validation and a tenth for the test, chosen by a hash of their id
(data.val_fraction, data.test_fraction). If there is a test split but no val, a tenth of train is used for validation.
Base. `owner/name` on the Hugging Face hub, a directory with a Hugging Face BLIP (config.json, model.safetensors,
vocab.txt), or 'tiny' for a quick test.
Training. It ends when the validation loss stops falling, at the latest after 30 epochs, or 100 steps if these are more; the
best step is kept. If validation texts cannot be shown to be more likely with their own image than with another one, nothing
was learned from the images: step 0 is kept, and the run logs it (with 5 to 19 validation images the mean alone decides,
with fewer there is no such test). --config.optim.schedule=cosine --config.steps=1000 trains for 1000 steps without
validation and keeps the last step.
Limits. Texts may be as long as the base can read; --config.task_options.max_tokens=40 (captions), .max_new_tokens=9 (answers)
or .max_question=35 cut them, and every cut is counted. Answers and captions are compared ignoring case, accents and the spacing
of punctuation; --config.task_options.variant=official2021 scores answers as VQA v2's server does, =coco captions as COCO's.
--config.data.on_error=skip leaves out invalid rows and counts them in result.json.
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
        raise ValueError("configs/folder.py requires root=DIRECTORY")
    files = config.annotations(a)
    c = config.folder(config.get_config(a.task, a.method, a.size, a.head), a.root)
    c.base, c.seed, c.data.annotations = a.base, a.seed, files
    # until the validation loss stops falling; the best step is kept, or step 0 where nothing was learned from the images
    c.steps, c.epochs, c.optim.schedule = a.steps, 30.0, "plateau"
    c.stop.every, c.stop.patience, c.stop.images_must_matter = 0, 5, True
    c.eval.text_only = True
    c.optim.lr = {"full": 1e-5 if a.base != "tiny" else 5e-4}.get(a.method, 1e-3)
    c.batch_size = 32 if a.base == "tiny" else 8
    c.eval.batch_size = c.batch_size
    return c
