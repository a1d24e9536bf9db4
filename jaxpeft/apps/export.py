"""A tuned run as files for transformers and PEFT, with a model card whose code runs as it stands.

jaxpeft export --workdir runs/mine --out merged                  BLIP with the method folded in: no adapter needed
jaxpeft export --workdir runs/mine --out adapter --format peft   an adapter for PeftModel.from_pretrained

If the base is not a Hugging Face checkpoint ('tiny'), or words were added to it, it is written too, as adapter/base.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from jaxpeft import interchange
from jaxpeft.methods import Prefix, Prompt
from jaxpeft.models import loading
from jaxpeft.runtime import files, registry
from jaxpeft.training import results, run

# by whether the task asks questions
LABELS = {False: "image-to-text", True: "visual-question-answering"}
CLASSES = {False: "BlipForConditionalGeneration", True: "BlipForQuestionAnswering"}

TOKENIZERS = {
    "basic": "splitting at spaces and punctuation, without case and accents",
    "approximate": "an approximation of the PTB tokeniser",
    "ptb": "the PTB tokeniser",
}


def model_card(workdir: str | Path, out: str | Path, asks: bool, code: list[str], adapter: bool = False) -> str:
    """README.md of what a finished run tuned: data, method, counts, scores and how they were made, from its own files; and
    `code` to use what lies in `out`."""
    config = files.read_json(Path(workdir) / "config.json")
    result = files.read_json(Path(workdir) / "result.json", run.MOST_RESULT)
    task, counts, data, model = result["task"], result["counts"], config["data"], result["model"]
    base = model["report"]["source"] if model.get("report", {}).get("revision") else Path(model["base"]).name
    method = result["method"] + (f", size {result['size']}" if result["size"] else "")
    method += "" if result["head"] == "none" else f", with the decoder head ({result['head']})"
    source = Path(data["root"]).name if data.get("root") else data["name"]
    scores = {name: one for name, one in result["metrics"].items() if one.get("scored", True)}
    optim, seeds = config["optim"], result["seeds"]
    header = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {LABELS[asks]}",
        f"base_model: {base}",
        f"tags: [blip, jaxpeft, {result['method']}]",
        "---",
    ]
    lines = [
        f"# {task} with {base}, tuned on {source}",
        "",
        f"Tuned with jaxpeft {result['versions']['jaxpeft']}: {method}"
        + (f"; initialised from '{model['init']}'" if model["init"] != "base" else ""),
        "",
        "| | |",
        "|---|---|",
        f"| parameters tuned | {counts['tuned']:,} of {counts['total']:,} ({100 * counts['tuned'] / counts['total']:.2f} %) |",
        f"| pictures trained on | {result['n_train_images']:,}, from {source}"
        + (f" ({100 * result['fraction']:g} %)" if result["fraction"] != 1 else "")
        + " |",
        *([f"| step kept | {kept['kept_step']:,}, by validation |"] if (kept := result.get("validation")) else []),
        f"| steps x batch | {result['timing']['steps']:,} x {config['batch_size']} |",
        f"| learning rate | {optim['lr']:g}, {optim['schedule']}, decay {optim['decay']:g} |",
        f"| picture size | {config['model']['image_size'] or 'that of the base'} |",
        f"| seeds | {seeds['seed']}, subset {seeds['subset']} |",
    ]
    if dropped := {key: n for key, n in result["data_report"].items() if isinstance(n, int)}:
        lines.append(f"| left out of the data | {', '.join(f'{n} {key}' for key, n in dropped.items())} |")
    if model["new_words"]:
        lines.append(f"| words added | {len(model['new_words'])} |")
    if "command" in result:
        lines.append(f"| command | `{result['command']}` |")
    lines += ["", "## Scores", ""]
    for split, one in scores.items():
        rows = one["blind"] | {
            "perfect_writer": one.get("perfect_writer"),
            "base": one.get("base"),
            "tuned": one["tuned"],
        }
        names = [key for key, value in one["tuned"].items() if isinstance(value, float)]
        lines += [f"{split}, n = {one['n']}", "", f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for label, row in rows.items():
            if row:
                cells = (f"{row[key]:.4f}" if key in row else "" for key in names)
                lines.append(f"| {results.LABELS.get(label, label)} | {' | '.join(cells)} |")
        lines.append("")
    tokenizers = {one["tuned"]["tokenizer"] for one in scores.values() if "tokenizer" in one["tuned"]} or {
        "approximate"
    }
    how = f" Captions were tokenised by {TOKENIZERS[tokenizers.pop()]}." if task == "captioning" else ""
    lines += [
        f"Blind rows look at no picture.{how} One run, one seed: no spread.",
        "",
        "## Use",
        "",
        "```python",
        *code,
        "```",
        "",
        f"`{out}` is where these files were written; `picture.jpg` is yours.",
        "",
    ]
    if asks:
        lines += [
            "Ask questions of one length at a time, or one by one: transformers attends to the padding of questions "
            "(`generate` in every release tried; from 4.54 on the decoder too), so answers in a padded batch may differ.",
            "",
        ]
    lines += [
        "The licences of the base model and of the pictures apply; this file does not know them. "
        "Not evaluated for any use beyond the scores above.",
        "",
    ]
    return "\n".join(header + lines)


def code(model, task, out: str | Path, base: str = "", revision: str = "", methods=(), beams: int = 1) -> list[str]:
    """Lines of Python that write the text of a picture with transformers: of the merged model in `out`, or, with `base`, of
    that with the PEFT adapter in `out`."""
    quoted = functools.partial(json.dumps, ensure_ascii=False)  # as Python writes it
    kind, out, where = CLASSES[task.question_encoder], quoted(str(out)), quoted(base or str(out))
    pinned = f', revision="{revision}"' if revision else ""
    in_decoder = any(isinstance(one, Prompt | Prefix) for one in methods)
    lines = [
        "import torch",
        "from PIL import Image, ImageOps",
        *(["from peft import PeftModel"] if base else []),
        f"from transformers import {kind}, BlipProcessor",
        "",
        f"processor = BlipProcessor.from_pretrained({where}{pinned})",
        f"model = {kind}.from_pretrained({where}{pinned})",
    ]
    if base and in_decoder:
        lines.append(f"model.text_decoder = PeftModel.from_pretrained(model.text_decoder, {out})")
    elif base:
        lines.append(f"model = PeftModel.from_pretrained(model, {out})")
    text = quoted(getattr(task, "prompt", "what is in the picture"))
    n_prompt = len(task.prompt_ids(model.tokenizer))
    settings, _ = interchange.generation(model, task, beams)
    said = ", ".join(f"{name}={value}" for name, value in settings.items())
    return [
        *lines,
        "model.eval()",
        "",
        'image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")',
        f'inputs = processor(images=image, text={text}, return_tensors="pt")',
        *([f'inputs["input_ids"][:, 0] = {model.config.enc_id}  # [ENC]'] if base and task.question_encoder else []),
        "with torch.inference_mode():",
        f"    ids = model.generate(**inputs, {said})",
        f"print(processor.decode(ids[0, {n_prompt}:], skip_special_tokens=True))  # behind the prompt",
    ]


def main(argv=None) -> int:
    """The command line -> exit status; mistakes are one line."""
    parser = argparse.ArgumentParser(
        prog="jaxpeft export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--out", required=True, type=Path, help="a new directory")
    parser.add_argument("--format", choices=("blip", "peft"), default="blip")
    registry.add_argument(parser)
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out} is not empty; choose a new directory")
        model, variables, chosen, task = run.load_run(args.workdir, args.imports)
        config = files.read_json(Path(args.workdir) / "config.json")
        base = run.pinned_base(config, files.read_json(Path(args.workdir) / "result.json", run.MOST_RESULT))
        beams, adapter = config["eval"]["beams"], args.format == "peft"
        with_base = bool(model.config.new_words) or loading.is_ours(base)
        name, _, revision = base.partition("@")
        where = f"{args.out}/base" if with_base else name
        pinned = revision if adapter and not with_base else ""
        lines = code(model, task, args.out, where if adapter else "", pinned, chosen, beams)
        facts = {
            "card": model_card(args.workdir, args.out, task.question_encoder, lines, adapter),
            "task": task,
            "beams": beams,
        }
        if adapter:
            facts |= {"base": name, "revision": revision, "with_base": with_base}
            interchange.export_peft(model, variables, args.out, **facts)
        else:
            interchange.export_blip(model, variables, args.out, **facts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = ", ".join(sorted(path.name for path in args.out.iterdir()))
    print(f"{args.out}: {names}")
    return 0
