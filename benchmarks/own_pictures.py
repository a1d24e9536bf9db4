"""From a folder of 8,000 JPEG files to a tuned BLIP-base and to PyTorch, as a user would do it, in a temporary directory.

    python benchmarks/own_pictures.py --out results/own_pictures.json

Images of mixed sizes, 24 of them damaged; BLIP-base with random weights at 224 pixels, float32; LoRA for 50 steps with batch 8
and BLIP's augmentation, killed after the checkpoint at step 25 and run again; evaluated; exported merged and as an adapter;
loaded by transformers and by peft, whose logits must equal jaxpeft's. Every stage is a command that a user types. With
`--n 60 --size tiny` it takes a minute.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from reference import ROOT, facts, quiet_torch, settings, use_threads, write_json

DAMAGED = 24


def draw(directory: Path, n: int) -> None:
    """Write n JPEG files with a captions.csv of two captions each; 24 of them are truncated, empty or not images."""
    from PIL import Image

    from jaxpeft.data import scenes

    directory.mkdir()
    split = scenes.load({"n_train": n, "cache": False}, ["train"])["train"]
    bad = set(np.linspace(1, n - 2, DAMAGED).astype(int).tolist())
    with (directory / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i, row in enumerate(split.rows):
            rng = np.random.default_rng(i)
            width, height = rng.integers(240, 641, 2).tolist()
            path = directory / f"{i:05}.jpg"
            Image.fromarray(split.images[i]).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
            if i in bad:
                data = path.read_bytes()
                path.write_bytes((data[: len(data) // 2], b"", b"not a picture")[i % 3])
            table.writerows([path.name, caption] for caption in row["captions"][:2])


def make_base(directory: Path, size: str) -> None:
    """Write a transformers BLIP with random weights, and a WordPiece vocabulary of the right length, without a download."""
    import torch
    import transformers

    from jaxpeft.data import scenes

    config = settings("base", "caption", 224)
    if size == "tiny":
        small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = config | {"vision_config": config["vision_config"] | small, "text_config": config["text_config"] | small
                           | {"encoder_hidden_size": 48}}  # fmt: skip
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(transformers.BlipConfig(**config)).save_pretrained(directory)
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
    words += [*letters, *(f"##{letter}" for letter in letters), *scenes.WORDS]
    words = list(dict.fromkeys(words))
    words += [f"filler{i}" for i in range(30522 - len(words))]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")


def command(*arguments, until=None, log: Path) -> dict:
    """Run a command of the project -> (exit status, seconds, output). It is killed when the file `until` appears."""
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if until and until.exists():
                time.sleep(4)  # a few more steps, which will be lost
                process.send_signal(signal.SIGKILL)
            time.sleep(0.2)
    return {"status": process.returncode, "s": round(time.perf_counter() - began, 1), "said": log.read_text()}


def compare(workdir: Path, merged: Path, adapter: Path, base: Path) -> dict:
    """The largest differences of logits, and equality of texts: jaxpeft, transformers with `merged`, peft with `adapter`."""
    import peft
    import torch
    import transformers

    import jaxpeft as jp
    from jaxpeft.models import vit

    model, variables, _, task = jp.load_run(workdir)
    rng = np.random.default_rng(0)
    size = model.config.image_size
    image_BYXC = rng.integers(0, 256, (4, size, size, 3)).astype(np.uint8)
    tokens_BT = rng.integers(110, 250, (4, 12)).astype(np.int32)
    tokens_BT[:, 0] = model.config.bos_id
    ours = np.asarray(model.apply(variables, {"image": image_BYXC, "tokens": tokens_BT[:, None]}))[:, 0]
    base_logits = np.asarray(
        model.apply({"params": variables["params"]}, {"image": image_BYXC, "tokens": tokens_BT[:, None]})
    )
    texts = jp.generate(model, variables, list(image_BYXC), task=task, beams=3)

    plain = transformers.BlipForConditionalGeneration.from_pretrained(merged).eval()
    under = transformers.BlipForConditionalGeneration.from_pretrained(base).eval()
    adapted = peft.PeftModel.from_pretrained(under, adapter).eval()
    pixels = torch.from_numpy(np.array(vit.normalised(image_BYXC, model.config)).transpose(0, 3, 1, 2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    prompt = torch.tensor([[*task.template(model).start, model.tokenizer.sep_id]] * 4)
    search = task.search(model)
    found = {"effect of tuning on logits": float(np.abs(ours - base_logits[:, 0]).max())}
    for name, there in (("transformers, merged", plain), ("peft, adapter", adapted)):
        core = there if name.startswith("trans") else there.base_model.model
        with torch.no_grad():
            states = core.vision_model(pixels).last_hidden_state
            logits = core.text_decoder(torch.from_numpy(tokens_BT).long(), encoder_hidden_states=states).logits.numpy()
            written = core.generate(pixel_values=pixels, input_ids=prompt.clone(), num_beams=3,
                                    max_length=search.length, min_length=search.min_length)  # fmt: skip
        said = [
            text.removeprefix("a picture of ").strip()
            for text in tokenizer.batch_decode(written, skip_special_tokens=True)
        ]
        found[name] = {"largest difference of a logit": float(np.abs(logits - ours).max()), "same texts": said == texts}
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--n", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    args = parser.parse_args()
    use_threads(2)
    quiet_torch(2)
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        pictures, base, run, log = where / "pictures", where / "base", where / "run", where / "log"
        began = time.perf_counter()
        draw(pictures, args.n)
        drawn = time.perf_counter()
        make_base(base, args.size)
        report = {
            "draw_s": round(drawn - began, 1),
            "megabytes": sum(p.stat().st_size for p in pictures.iterdir()) // 10**6,
        }
        arguments = [
            "main.py", f"--config=configs/folder.py:root={pictures},annotations=captions.csv,base={base},steps={args.steps}",
            f"--workdir={run}", f"--config.data.data_dir={where / 'prepared'}", "--config.data.augment=blip",
            "--config.data.val_fraction=0.002", "--config.data.test_fraction=0.004", "--config.model.image_size=224",
            "--config.checkpoint_seconds=0", "--config.eval.gallery=False",
        ]  # fmt: skip
        refused = command(*arguments, log=log)
        counted = re.search(r"corrupt image \((\d+)\)", refused["said"])
        report["damaged files, refused"] = {
            "status": refused["status"], "s": refused["s"], "counted": int(counted[1]) if counted else 0,
            "prepared copy left": (where / "prepared").exists(),
        }  # fmt: skip
        assert refused["status"] == 1 and int(counted[1]) == DAMAGED, refused["said"]

        arguments.append("--config.data.on_error=skip")
        half = run / "checkpoints" / str(args.steps // 2)
        killed = command(*arguments, until=half, log=log)
        report["prepared and tuned until killed"] = {"status": killed["status"], "s": killed["s"]}
        resumed = command(*arguments, log=log)
        assert resumed["status"] == 0, resumed["said"]
        result = json.loads((run / "result.json").read_text())
        test = result["metrics"]["test"]
        report["resumed"] = {
            "s": resumed["s"], "from step": int(re.search(r"resumed from step (\d+)", resumed["said"])[1]),
            **{key: result["timing"][key] for key in ("compile_s", "step_s", "eval_s", "total_s")},
            "peak_bytes": result["memory"]["host_peak_bytes"], "trained on": result["n_train_images"],
            "left out": result["data_report"].get("corrupt image"), "tuned": result["counts"]["tuned"], "n_test": test["n"],
            "nll": [test["base"]["nll"], test["tuned"]["nll"]],
        }  # fmt: skip
        for name, options in (("merged", []), ("adapter", ["--format", "peft"])):
            done = command("-m", "jaxpeft", "export", "--workdir", run, "--out", where / name, *options, log=log)
            assert done["status"] == 0, done["said"]
            size = sum(path.stat().st_size for path in (where / name).iterdir())
            report[f"export {name}"] = {"s": done["s"], "megabytes": round(size / 1e6, 1)}
        written = command("-m", "jaxpeft", "generate", "--workdir", run, "--image", pictures / "00000.jpg", log=log)
        report["generate, one picture"] = {"status": written["status"], "s": written["s"]}
        report["beside transformers and peft"] = compare(run, where / "merged", where / "adapter", base)
    write_json(
        args.out, facts() | {"pictures": args.n, "damaged": DAMAGED, "steps": args.steps, "batch": 8, "report": report}
    )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
