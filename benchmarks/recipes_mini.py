"""Both BLIP recipes on a synthetic COCO and VQA v2, with their upload files scored by the official programs.

    python benchmarks/recipes_mini.py --official vqaEval.py --out results/recipes_mini.json

`vqaEval.py` is not in this repository: github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation, since 2021-03-11.
Captions are scored by pycocoevalcap with its PTB tokeniser (Java). The shipped tiny base at 64 pixels and 200 steps with batch
32 are enough for scores above 0, but no evidence of anything else.
"""

import argparse
import json
import sys
import tempfile
import types
from pathlib import Path

from reference import ROOT, facts, use_threads, write_json

sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/golden")]


def captions(tree: Path, upload: Path) -> dict:
    """CIDEr, BLEU-4, ROUGE-L and METEOR of a result file in COCO's format, against dataset_coco.json."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    written = {row["image_id"]: [{"caption": row["caption"]}] for row in json.loads(upload.read_text())}
    images = json.loads((tree / "karpathy/dataset_coco.json").read_text())["images"]
    said = {
        one["cocoid"]: [{"caption": s["raw"]} for s in one["sentences"]] for one in images if one["cocoid"] in written
    }
    ours, theirs = PTBTokenizer().tokenize(written), PTBTokenizer().tokenize(said)
    return {
        "cider_d": float(Cider().compute_score(theirs, ours)[0]),
        "bleu_4": float(Bleu(4).compute_score(theirs, ours, verbose=0)[0][3]),
        "rouge_l": float(Rouge().compute_score(theirs, ours)[0]),
        "meteor": float(Meteor().compute_score(theirs, ours)[0]),
    }


def answers(tree: Path, upload: Path, official: str) -> dict:
    """The official accuracy of a result file in the VQA server's format, against the annotations of val2014."""
    from make_metrics import load_class

    annotations = json.loads((tree / "vqa/v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    written = {row["question_id"]: row for row in json.loads(upload.read_text())}
    truth = {one["question_id"]: one for one in annotations if one["question_id"] in written}
    side = types.SimpleNamespace(qa=truth, getQuesIds=lambda: list(truth), get_question_ids=lambda: list(truth))
    scorer = load_class(official)(side, types.SimpleNamespace(qa=written), n=12)
    scorer.updateProgress = lambda _: None
    scorer.evaluate()
    return {"accuracy": scorer.accuracy["overall"] / 100}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    use_threads(2)
    import mini_coco

    from configs import blip_caption_coco, blip_vqa_v2
    from jaxpeft.data.coco import prepare
    from jaxpeft.runtime import malloc
    from jaxpeft.training import run

    malloc.keep_freed_memory()
    report = {}
    with tempfile.TemporaryDirectory() as place:
        tree, home = mini_coco.draw(Path(place, "data"), args.pictures), Path(place, "prepared")
        for name, recipe, split in (("coco_captions", blip_caption_coco, "test"), ("vqav2", blip_vqa_v2, "test")):
            prepare.prepare(name, tree, home, visual_genome=name == "vqav2", check_sizes=False)
            options = f"base=tiny,image_size=64,dtype=float32,method=lora,head=transform,lr=3e-3,steps={args.steps}"
            config = recipe.get_config(options + f",batch_size=32,data_dir={home}")
            config.eval.gallery = False
            workdir = Path(place, name)
            result = run.run(config, workdir)
            upload = workdir / f"upload_{split}.json"
            theirs = captions(tree, upload) if name == "coco_captions" else answers(tree, upload, args.official)
            ours = {key: result["metrics"][split]["tuned"][key] for key in theirs}
            report[name] = {"n": result["metrics"][split]["n"], "ours": ours, "theirs": theirs,
                            "largest difference": max(abs(ours[key] - theirs[key]) for key in theirs)}  # fmt: skip
    write_json(args.out, facts() | {"report": report})
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
