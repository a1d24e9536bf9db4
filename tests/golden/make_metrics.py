"""Expected metric values from the published scorers -> metrics.json.

    python tests/golden/make_metrics.py --official OFFICIAL.py --legacy LEGACY.py --big-vision VQAV2.py

needs a Python with pycocoevalcap 1.2 and numpy. The three files are read, not kept here; they are published as
  OFFICIAL  github.com/GT-Vision-Lab/VQA  PythonEvaluationTools/vqaEvaluation/vqaEval.py  since 2021-03-11 (Python 2)
            (the numbers here: its copy in github.com/mlej8/VQA at 8056e523; `vqa.get_question_ids` is that copy's name)
  LEGACY    the same file at commit c4e6a0e4; mPLUG and ALBEF carry it as vqaTools/vqaEval.py
  VQAV2     github.com/google-research/big_vision  big_vision/evaluators/proj/paligemma/transfers/vqav2.py (at 5f95305)
Only seeds and numbers are stored: `caption_set`, `vqa_set` and `contraction_words` make the inputs again.
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import random
import re
import sys
import types

SEEDS = range(8)
IMAGES = 1000
KEPT = 16  # images of each seed whose own scores are stored
VQA_SETS = 2000
LEVELS = (0.0, 0.3, 0.6, 0.9, 1.0)

HAND = [  # (predictions, references) that isolate one habit each
    (["a b c d e"], [["a b c d e"]]),  # one image: CIDEr-D 0
    (["a cat sits on a mat", "two dogs run"], [["a cat sits on a mat"], ["two dogs run"]]),  # exact copies
    (["a", "the"], [["a", "a b"], ["a b c d", "the"]]),  # shorter than two words
    (["", ""], [["", "x"], ["a b"]]),  # empty predictions
    (["the the the the the the", "a b"], [["the cat is on the mat", "there is a cat"], ["b a"]]),  # clipping
    (["a b c", "q"], [["a b", "a b c d"], ["a  b", "q q"]]),  # closest length on a tie, double space
]


def _pick(rng, items):
    return items[int(rng.random() * len(items))]  # only random() is promised to be the same in every Python version


def caption_set(seed):
    """IMAGES tokenised captions and 1-6 references each, words drawn from a Zipf law over 6, 40 or 800 words."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range((6, 40, 800)[seed % 3])]
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(words))))

    def text():
        return " ".join(rng.choices(words, cum_weights=weights, k=int(rng.random() * 12)))

    predictions, references = [], []
    for _ in range(IMAGES):
        group = [text() for _ in range(1 + int(rng.random() * 6))]
        kind = _pick(rng, ("random", "copy", "longer", "spaced", "empty"))
        copy = _pick(rng, group)
        options = {"random": text(), "copy": copy, "longer": f"{copy} {text()}", "spaced": copy.replace(" ", "  ")}
        predictions.append(options.get(kind, ""))
        references.append(group)
    return predictions, references


ANSWERS = (
    "yes|no|Yes|NO|two|2|Two|none|0|zero|ten|10|a dog|dog|the dog|A Dog|an apple|apple|10,000|10000|10, 000|3.5|3. 5|.5"
    "|t-shirt|t shirt|tshirt|T-Shirt|black/white|black / white|black white|black and white|9:30 a.m.|9:30 am|9:30|9.30"
    "|don't|dont|Dont|can't|cant|couldn'tve|couldnt've|im|I'm|Ive|shes|she's|lets|let's|somebody'd|somebodyd|yall'd've"
    "|o'clock|5 oclock|5 o'clock|'ows'at|ow's'at|u.s.a.|u.s.a|usa|mr. smith|mr smith|(red)|red|red.|red!|red ?|?red"
    "|[red]|red_blue|red + blue|red+blue|$5.00|5.00|$5|50%|a|the|an|the the|...|. . .|!|-|/|a/b|1/2|1,2,3|1, 2|x@y.com"
    '|`tick`|back\\slash|{brace}|<tag>|semi;colon|quote"d|a  b|Nine|one one|none of the above|é|ÉTÉ|½|٣,٤|2,3 a-b'
    "|.........................................|a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a"
).split("|")
EDITS = (
    str, str, str, str.upper, str.capitalize, str.lower, lambda s: s + " ", lambda s: "\t" + s,
    lambda s: "\n" + s + "\n",
    lambda s: "a " + s, lambda s: "The " + s, lambda s: s + ".", lambda s: s + ",", lambda s: s + " ?", lambda s: "",
    lambda s: s.replace(" ", "-"), lambda s: s.replace("'", ""), lambda s: s.replace(" ", "\t"),
)  # fmt: skip


def vqa_set(seed, words):
    """A prediction and ten answers that are often equal only after some clean-up, sometimes all the same string.

    `words` is what `contraction_words` gives; a tenth of the sets is built from them.
    """
    rng = random.Random(10_000 + seed)
    bases = [_pick(rng, words if rng.random() < 0.1 else ANSWERS) for _ in range(1 + int(rng.random() * 3))]

    def answer():
        return _pick(rng, EDITS)(_pick(rng, bases))

    if rng.random() < 0.2:
        answers = [answer()] * 10
    elif rng.random() < 0.1:
        answers = [space + "yes" for space in ("", " ", "\t", "\n", "", "", "", "", "", " ")]  # unanimous once stripped
    else:
        answers = [answer() for _ in range(10)]
    return (_pick(rng, answers) if rng.random() < 0.5 else answer()), answers


def contraction_words(contractions):
    """Every contraction without any subset of its apostrophes, plus words that the published table treats alone."""
    words = {"im", "ive", "id've", "were", "well", "ill"}
    for word in {*contractions, "I'm", "I've", "I'd've", "let's", "she's", "somebody'd"}:
        pieces = word.split("'")
        for marks in itertools.product(("", "'"), repeat=len(pieces) - 1):
            words.add("".join(a + b for a, b in itertools.zip_longest(pieces, marks, fillvalue="")))
    return sorted(words)


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ------------------------------------------------------------------------------- from here on, the references


def caption_scores(predictions, references, kept):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ours, theirs = {i: [text] for i, text in enumerate(predictions)}, dict(enumerate(references))
    (cider, ciders), (rouge, rouges) = Cider().compute_score(theirs, ours), Rouge().compute_score(theirs, ours)
    bleu, bleus = Bleu(4).compute_score(theirs, ours, verbose=0)
    each = [list(map(float, scores[:kept])) for scores in (ciders, *bleus, rouges)]
    return {"corpus": list(map(float, (cider, *bleu, rouge))), "each": each}


def load_class(path):
    source = re.sub(r'print (".*?")', "pass", pathlib.Path(path).read_text())  # Python 2
    scope = {}
    exec(compile(source, path, "exec"), scope)
    return scope["VQAEval"]


def official_score(evaluator, prediction, answers):
    rows = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
    truth = types.SimpleNamespace(
        qa={0: {"answers": rows, "question_type": "q", "answer_type": "a"}},
        getQuesIds=lambda: [0],
        get_question_ids=lambda: [0],
    )
    scorer = evaluator(truth, types.SimpleNamespace(qa={0: {"answer": prediction}}), n=13)
    stdout, sys.stdout = sys.stdout, open("/dev/null", "w")
    try:
        scorer.evaluate()
    finally:
        sys.stdout.close()
        sys.stdout = stdout
    return scorer.evalQA[0] / 100


def big_vision_score(path):
    """The evaluator's own loop on one example; the modules that it imports are stand-ins."""
    import numpy as np

    same = types.SimpleNamespace(
        process_sum=lambda x: x, multiprocess_write_json=lambda *_: None, get_local_slice_from_fsarray=lambda x: x
    )
    names = ("big_vision", "big_vision.evaluators", "big_vision.evaluators.common", "big_vision.pp", "big_vision.utils")
    for name in (*names, "big_vision.pp.tokenizer"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["big_vision.evaluators.common"].__dict__.update(vars(same))
    sys.modules["big_vision.utils"].__dict__.update(vars(same))
    for name in (*names[1:], "big_vision.pp.tokenizer"):
        parent, _, leaf = name.rpartition(".")
        setattr(sys.modules[parent], leaf, sys.modules[name])
    scope = {}
    exec(compile(pathlib.Path(path).read_text(), path, "exec"), scope)

    def score(prediction, answers):
        evaluator = object.__new__(scope["Evaluator"])
        batch = {"_mask": [1], "question_id": np.array([0]), "answers": [np.array(answers, dtype=object)]}
        evaluator.steps, evaluator.outfile = 1, None
        evaluator.get_data_iter = lambda: iter([batch | {"answer_type": ["other"]}])
        evaluator.decode = lambda *_: [prediction]
        evaluator.tok = types.SimpleNamespace(to_str=lambda token, stop_at_eos: token)
        return dict(evaluator.run(None))["acc"]

    return score


def level(score):
    best = min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - score))
    assert abs(LEVELS[best] - score) < 1e-9, score
    return str(best)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--official", "--legacy", "--big-vision"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    official, legacy, modern = load_class(args.official), load_class(args.legacy), big_vision_score(args.big_vision)

    scorer = official(types.SimpleNamespace(getQuesIds=list, get_question_ids=list), types.SimpleNamespace())
    words = contraction_words(scorer.contractions.values())
    outputs = [scorer.processDigitArticle(scorer.processPunctuation(word)) for word in words]
    expected = {
        "hand": [caption_scores(*pair, kept=10) for pair in HAND],
        "captions": [caption_scores(*caption_set(seed), kept=KEPT) for seed in SEEDS],
        "contractions": {"words": digest(words), "outputs": digest(outputs)},
    }
    sets = [vqa_set(seed, words) for seed in range(VQA_SETS)]
    expected["vqa"] = {
        "sets": digest([json.dumps(each) for each in sets]),
        "official2021": "".join(level(official_score(official, *each)) for each in sets),
        "legacy": "".join(level(official_score(legacy, *each)) for each in sets),
    }
    other = "".join(level(modern(*each)) for each in sets)
    differ = [each for each, a, b in zip(sets, expected["vqa"]["official2021"], other, strict=True) if a != b]
    # big_vision repaired the limit of 32 removed periods; it must agree everywhere else
    assert all(any(text.count(".") > 32 for text in (p, *answers)) for p, answers in differ), differ
    print(f"big_vision differs from official2021 on {len(differ)} sets, all with more than 32 periods")
    for name in ("official2021", "legacy"):
        print(name, {i: expected["vqa"][name].count(str(i)) for i in range(len(LEVELS))})
    pairs = zip(expected["vqa"]["official2021"], expected["vqa"]["legacy"], strict=True)
    print("variants differ:", sum(a != b for a, b in pairs))
    path = pathlib.Path(__file__).with_suffix("").with_name("metrics.json")
    path.write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
