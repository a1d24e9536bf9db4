"""Generate captions and answers for images with a tuned run, a shipped checkpoint or a Hugging Face checkpoint.

    jaxpeft generate --workdir runs/mine --image a.jpg b.png
    jaxpeft generate --workdir runs/mine --image a.jpg --question "what is on the table" --top 3
    jaxpeft generate --base Salesforce/blip-image-captioning-base --folder pics --out captions.jsonl
    jaxpeft generate --workdir runs/mine --image a.jpg --prompt "a drawing of"

Prints a line per image, or writes a JSON object per image: image, question, texts (text and log-probability in nats, per
token with more than one beam). An image that cannot be read is reported and left out; the exit status is then 1.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import jax
import numpy as np
from PIL import Image

from jaxpeft import tasks
from jaxpeft.data.base import Split
from jaxpeft.data.folder.files import Files
from jaxpeft.data.pipeline import Resized
from jaxpeft.inputs.images import decode, rgb, why_unread
from jaxpeft.models import loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files, host, malloc, registry
from jaxpeft.tasks import Task
from jaxpeft.training import evaluate, finished
from jaxpeft.tree import Tree

Picture = np.ndarray | Image.Image | str | Path
Pictures = Sequence[Picture] | Picture
Ids = Sequence[int] | np.ndarray


def _pixels(image: Picture) -> np.ndarray:
    if isinstance(image, Image.Image):
        return rgb(image)
    return image if isinstance(image, np.ndarray) else decode(image)


@overload
def generate(
    model: VisionLanguageModel, variables: Tree, images: Pictures, prompts: Sequence[str] | str | None = None, *,
    beams: int = 3, batch_size: int = 16, task: Task | None = None, adapter_ids: Ids | None = None, top: None = None,
) -> list[str]: ...  # fmt: skip
@overload
def generate(
    model: VisionLanguageModel, variables: Tree, images: Pictures, prompts: Sequence[str] | str | None = None, *,
    beams: int = 3, batch_size: int = 16, task: Task | None = None, adapter_ids: Ids | None = None, top: int,
) -> list[list[dict[str, Any]]]: ...  # fmt: skip
def generate(
    model: VisionLanguageModel,
    variables: Tree,
    images: Pictures,
    prompts: Sequence[str] | str | None = None,
    *,
    beams: int = 3,
    batch_size: int = 16,
    task: Task | None = None,
    adapter_ids: Ids | None = None,
    top: int | None = None,
) -> list[str] | list[list[dict[str, Any]]]:
    """Generate a caption for each image or, with `prompts` (one question per image, or one for all), an answer. A single
    image is treated as a list of one.

    With `top`, returns a list of at most `top` {'text', 'score'} for each image, best first, from a search with at least `top`
    beams.

    `images`: uint8 arrays image_YXC of any size, images of Pillow, or paths. `variables`: {'params': ...}, or the result of
    `attach`; or that of `stack`, in which case `adapter_ids` selects one of the stacked trees for each image. Raises ValueError
    where the model has no tokenizer, where prompts are given to a captioning model, and where they are missing for one that
    answers questions.
    """
    name = "captioning" if prompts is None else "vqa"
    if name not in model.tasks or (task and task.kind != name):
        raise ValueError(
            f"this {'task' if name in model.tasks else 'model'} "
            f"{'answers questions: pass prompts' if prompts is None else 'captions: pass no prompts'}"
        )
    task = task or tasks.build(name)
    alone = isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) == 3
    some = cast(Sequence[Picture], [images] if alone else images)
    pictures = [_pixels(image) for image in some]
    questions = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts or [""] * len(pictures))
    if len(questions) != len(pictures):
        raise ValueError(f"{len(questions)} prompts for {len(pictures)} images; pass one per image, or one for all")
    rows = [
        {
            "image_id": str(i),
            "captions": ["-"],
            "questions": [{"question_id": "", "question": q, "answers": ["-"], "type": ""}],
        }
        for i, q in enumerate(questions)
    ]
    split = Split("generate", Resized.of(pictures, model), rows)
    task = evaluate.reading(task, split, model)
    cases = task.eval_examples(split, task.template(model))
    if adapter_ids is not None:
        ids, n_trees = np.asarray(adapter_ids, np.int32), {x.shape[0] for x in jax.tree.leaves(variables["peft"])}
        if ids.shape != (len(pictures),) or len(n_trees) != 1 or not np.all((0 <= ids) & (ids < min(n_trees))):
            raise ValueError(
                f"adapter_ids is {ids.tolist()}; expected one index per image ({len(pictures)}), each below {min(n_trees)}, "
                f"the number of stacked trees"
            )
        cases = dataclasses.replace(cases, arrays=cases.arrays | {"adapter": ids})
    found = evaluate.ranked(model, variables, task, cases, batch_size=batch_size, beams=max(beams, top or 1))
    if top is None:
        return [best["text"] for best, *_ in found]
    return [list({one["text"]: one for one in reversed(texts)}.values())[::-1][:top] for texts in found]


def pictures(paths: list[Path], n: int) -> Iterator[tuple[list[Path], list, list[str]]]:
    """Decode `n` files at a time -> (paths, decoded images, errors)."""
    for start in range(0, len(paths), n):
        found, decoded, errors = [], [], []
        for path in paths[start : start + n]:
            try:
                if any("\ud800" <= c <= "\udfff" for c in str(path)):
                    raise ValueError("the name is not in UTF-8; rename the file")
                decoded.append(decode(path))
                found.append(path)
            except (ValueError, OSError) as error:
                errors.append(f"{path}: {error}")
        yield found, decoded, errors


def main(argv=None) -> int:
    """Run the command line -> exit status: 0, 1 where images were left out, 2 for invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="jaxpeft generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="the directory of a finished run")
    which.add_argument(
        "--base", help="a model without tuning: 'tiny', a directory, or owner/name on the Hugging Face hub"
    )
    parser.add_argument("--image", nargs="+", type=Path, default=[])
    parser.add_argument("--folder", type=Path, help="all images in this directory and below it")
    parser.add_argument("--question", help="for a model that answers questions: the same question for every image")
    parser.add_argument(
        "--prompt", help="for a model that writes captions: the beginning of the text, in place of the default prompt"
    )
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--top", type=int, default=1, help="number of texts per image, best first")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a .jsonl file to write; by default lines are printed")
    registry.add_argument(parser)
    args = parser.parse_args(argv)
    if min(args.beams, args.top, args.batch) < 1:
        parser.error("--beams, --top and --batch must be at least 1")
    paths, unread = list(args.image), []
    if args.folder:
        if not args.folder.is_dir():
            parser.error(f"--folder {args.folder} is not a directory")
        below = Files(args.folder)
        paths += [args.folder / name for name in below.all()]
        unread = [f"{args.folder / name}: {why_unread(name)}" for name in below.unread()]
    if not paths:
        some = f"; files in unsupported image formats: {len(unread)}, such as {unread[0]}" if unread else ""
        parser.error(f"no images found: give --image, or a --folder with images{some}")
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: the directory does not exist")
    malloc.keep_freed_memory()
    host.keep_compiled_programs()
    if args.workdir:
        model, variables, _, task = finished.load_run(args.workdir, args.imports)
    else:
        task = tasks.build("captioning" if args.question is None else "vqa")
        model, params = loading.load(args.base, task=task.name)
        variables = {"params": params}
    if args.prompt is not None:
        task = prompted(task, args.prompt, model.tokenizer)
    bad = unread + _write(args, model, variables, task, paths)
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    return int(bool(bad))


def prompted(task: Task, prompt: str, tokenizer) -> Task:
    """The task with another prompt. Raises ValueError for a task without a prompt, and for words not in the vocabulary."""
    if not hasattr(task, "prompt"):
        raise ValueError(f"--prompt is for models that write captions; this one's task is {task.name}: use --question")
    if unknown := tokenizer.unknown_words(prompt):
        raise ValueError(f"--prompt {prompt!r} has words that are not in the model's vocabulary: {', '.join(unknown)}")
    return dataclasses.replace(task, prompt=prompt)


def _write(args, model, variables, task, paths) -> list[str]:
    """Write the texts of every image to the file, or print them -> errors."""
    bad, out, batch = [], None, min(args.batch, len(paths))
    with contextlib.ExitStack() as stack:  # which closes the file before it takes its place
        if args.out:
            out = stack.enter_context(stack.enter_context(files.replacing(args.out)).open("w", encoding="utf-8"))
        for found, decoded, errors in pictures(paths, batch):
            bad += errors
            if not found:
                continue
            written = generate(
                model, variables, decoded, args.question, beams=args.beams, batch_size=batch, task=task, top=args.top
            )
            for path, texts in zip(found, written, strict=True):
                row = {"image": str(path)} | ({"question": args.question} if args.question else {})
                if out:
                    out.write(json.dumps(row | {"texts": texts}, ensure_ascii=False) + "\n")
                else:
                    print(f"{path}: " + " | ".join(f"{one['text']} ({one['score']:.2f})" for one in texts))
    return bad
