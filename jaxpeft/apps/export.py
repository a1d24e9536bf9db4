"""Export a tuned run for transformers and PEFT, with a model card whose code can be run unchanged.

jaxpeft export --workdir runs/mine --out merged                  the model with the adapter merged into its weights
jaxpeft export --workdir runs/mine --out adapter --format peft   an adapter for PeftModel.from_pretrained

If the base is not a Hugging Face checkpoint ('tiny'), or words were added to it, it is also written, to adapter/base.
"""

import argparse
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxpeft import interchange
from jaxpeft.interchange import hf_out
from jaxpeft.methods import Prefix, Prompt
from jaxpeft.models import hf, loading
from jaxpeft.runtime import registry
from jaxpeft.training import finished, results, setup

# whether the task asks questions -> pipeline tag
LABELS = {False: "image-to-text", True: "visual-question-answering"}

TOKENIZERS = {
    "basic": "splitting at spaces and punctuation, without case and accents",
    "approximate": "an approximation of the PTB tokeniser",
    "ptb": "the PTB tokeniser",
}


def model_card(
    config: dict,
    result: dict,
    out: str | Path,
    asks: bool,
    code: list[str],
    adapter: bool = False,
    kind: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The model card (README.md) of a finished run: data, method, counts, and scores with how they were made; also `code` that
    uses the files in `out`, and `notes`. `kind`: the model's type, as a tag."""
    data, model, task = config["data"], result["model"], result["task"]
    method = result["method"] + (f", size {result['size']}" if result["size"] else "")
    method += "" if result["head"] == "none" else f", with the decoder head ({result['head']})"
    method += "" if model["init"] == "base" else f"; initialised from '{model['init']}'"
    source = Path(data["root"]).name if data.get("root") else data["name"]
    scores = {name: one for name, one in result["metrics"].items() if one.get("scored", True)}
    tokenizers = [one["tuned"]["tokenizer"] for one in scores.values() if "tokenizer" in one["tuned"]]
    of = TOKENIZERS[tokenizers[0] if tokenizers else "approximate"]
    return string.Template(Path(__file__).with_name("model_card.md").read_text("utf-8")).substitute(
        library="peft" if adapter else "transformers",
        tag=LABELS[asks],
        base=model["report"]["source"] if model.get("report", {}).get("revision") else Path(model["base"]).name,
        tags=", ".join(filter(None, (kind, "jaxpeft", result["method"]))),
        task=task,
        source=source,
        version=result["versions"]["jaxpeft"],
        method=method,
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(config, result, source)),
        scores="".join(f"{line}\n" for line in _scores(scores)),
        tokens=f" Captions were tokenised by {of}." if task == "captioning" else "",
        code="\n".join(code),
        out=out,
        notes="".join(f"{note}\n\n" for note in notes),
    )


def _facts(config: dict, result: dict, source: str) -> Iterator[tuple[str, object]]:
    """The rows of the table of a card."""
    counts, optim, seeds, model = result["counts"], config["optim"], result["seeds"], result["model"]
    yield (
        "parameters tuned",
        f"{counts['tuned']:,} of {counts['total']:,} ({100 * counts['tuned'] / counts['total']:.2f} %)",
    )
    share = f" ({100 * result['fraction']:g} %)" if result["fraction"] != 1 else ""
    yield "training images", f"{result['n_train_images']:,}, from {source}{share}"
    if kept := result.get("validation"):
        yield "step kept", f"{kept['kept_step']:,}, by validation loss"
    yield "steps x batch", f"{result['timing']['steps']:,} x {config['batch_size']}"
    yield "learning rate", f"{optim['lr']:g}, {optim['schedule']}, weight decay {optim['weight_decay']:g}"
    yield "image size", config["model"]["image_size"] or "that of the base"
    yield "seeds", f"{seeds['seed']}, subset {seeds['subset']}"
    if dropped := {key: n for key, n in result["data_report"].items() if isinstance(n, int)}:
        yield "left out of the data", ", ".join(f"{n} {key}" for key, n in dropped.items())
    if model["new_words"]:
        yield "words added", len(model["new_words"])
    if "command" in result:
        yield "command", f"`{result['command']}`"


def _scores(metrics: dict[str, dict]) -> list[str]:
    """A table for each split: the tuned model, the base and what does not look at the image."""
    lines = []
    for split, one in metrics.items():
        rows = one["blind"] | {name: one.get(name) for name in ("perfect_writer", "base", "tuned")}
        names = [key for key, value in one["tuned"].items() if isinstance(value, float)]
        lines += [f"{split}, n = {one['n']}", "", f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for label, row in rows.items():
            if row:
                cells = (f"{row[key]:.4f}" if key in row else "" for key in names)
                lines.append(f"| {results.LABELS.get(label, label)} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def main(argv=None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="jaxpeft export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the directory of a finished run")
    parser.add_argument("--out", required=True, type=Path, help="a new directory")
    parser.add_argument("--format", choices=("merged", "peft"), default="merged")
    parser.add_argument(
        "--dtype", choices=hf_out.DTYPES, default="float32", help="of a merged model's weights, which are rounded to it"
    )
    registry.add_argument(parser)
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out} exists and is not an empty directory; choose a new one")
    model, variables, chosen, task = finished.load_run(args.workdir, args.imports)
    config, result = finished.read(args.workdir)
    base = setup.pinned_base(config, result)
    beams, adapter = config["eval"]["beams"], args.format == "peft"
    with_base = bool(model.config.new_words) or loading.is_ours(base)
    name, _, revision = base.partition("@")
    where = f"{args.out}/base" if with_base else name
    pinned = revision if adapter and not with_base else ""
    in_decoder = any(isinstance(one, Prompt | Prefix) for one in chosen)
    lines = hf.of(model).code(task, str(args.out), where if adapter else "", pinned, in_decoder, beams)
    facts = {
        "card": model_card(
            config, result, args.out, task.asks, lines, adapter, model.model_type, hf.of(model).notes(task)
        ),
        "task": task,
        "beams": beams,
    }
    if adapter:
        facts |= {"base": name, "revision": revision, "with_base": with_base}
        interchange.export_peft(model, variables, args.out, **facts)
    else:
        interchange.export_hf(model, variables, args.out, dtype=args.dtype, **facts)
    names = ", ".join(sorted(path.name for path in args.out.iterdir()))
    print(f"{args.out}: {names}")
