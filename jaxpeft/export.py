"""A tuned run as files for transformers and PEFT, with a model card.

python -m jaxpeft.export --workdir runs/mine --out merged                  BLIP with the method folded in: no adapter needed
python -m jaxpeft.export --workdir runs/mine --out adapter --format peft   an adapter for PeftModel.from_pretrained
"""

import argparse
import sys
from pathlib import Path

from jaxpeft import interchange, point, results, stop, untrusted

LABELS = {"captioning": "image-to-text", "vqa": "visual-question-answering"}
CLASSES = {"captioning": "BlipForConditionalGeneration", "vqa": "BlipForQuestionAnswering"}

TOKENIZERS = {
    "basic": "splitting at spaces and punctuation, without case and accents",
    "approximate": "an approximation of the PTB tokeniser",
    "ptb": "the PTB tokeniser",
}


def model_card(workdir: str | Path, adapter: bool = False) -> str:
    """README.md of what a finished run tuned: data, method, counts, scores and how they were made, from its own files."""
    config = untrusted.read_json(Path(workdir) / "config.json")
    result = untrusted.read_json(Path(workdir) / "result.json", point.MOST_RESULT)
    task, counts, data, model = result["task"], result["counts"], config["data"], result["model"]
    base = Path(model["base"]).name
    method = result["method"] + (f", size {result['size']}" if result["size"] else "")
    method += "" if result["head"] == "none" else f", with the decoder head ({result['head']})"
    source = Path(data["root"]).name if data.get("root") else data["name"]
    scores = {name: one for name, one in result["metrics"].items() if one.get("scored", True)}
    optim, seeds = config["optim"], result["seeds"]
    header = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {LABELS[task]}",
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
        f"from transformers import BlipProcessor, {CLASSES[task]}",
        "",
    ]
    if adapter:
        lines += ["from peft import PeftModel", "", f'base = {CLASSES[task]}.from_pretrained("{base}")',
                  'model = PeftModel.from_pretrained(base, "DIRECTORY")']  # fmt: skip
    else:
        lines += ['processor = BlipProcessor.from_pretrained("DIRECTORY")',
                  f'model = {CLASSES[task]}.from_pretrained("DIRECTORY")']  # fmt: skip
    lines += ["```", ""]
    if task == "vqa":
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


def main(argv=None) -> int:
    """The command line -> exit status; mistakes are one line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxpeft.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--out", required=True, type=Path, help="a new directory")
    parser.add_argument("--format", choices=("blip", "peft"), default="blip")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out} is not empty; choose a new directory")
        model, variables, chosen, _ = point.load_run(args.workdir)
        card = model_card(args.workdir, adapter=args.format == "peft")
        if args.format == "blip":
            interchange.export_blip(model, variables, args.out, card=card)
        else:
            interchange.export_peft(model, variables, chosen, args.out)
            results.write_text(args.out / "README.md", card)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = ", ".join(sorted(path.name for path in args.out.iterdir()))
    print(f"{args.out}: {names}")
    return 0


if __name__ == "__main__":
    stop.program(main)
