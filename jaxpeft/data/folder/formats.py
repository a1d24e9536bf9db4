"""Annotation files of many formats -> records. The format is detected from the content, never from the file name.

A record is one statement about one image: {where, image, image_id, split, captions, question, hint, beside}.  `image` (a
path below the root or, with `beside`, below the directory of the annotation file) or `image_id` may be empty; `where` is the
file and line of the record.  A parser is a generator that adds everything it leaves out to `problems`, so that users see all
of it at once.  A text file beside an image, which holds captions only, is read by `caption_file`.

To add a format: a rule in `detect`, a parser here, and its line in ACCEPTED.
"""

import csv
import io
import json
import os
import re

ACCEPTED = """accepted formats:
  COCO captions   JSON {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
  Karpathy        JSON {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
  a list          JSON [{"image", "caption"}, ...] or [{"image", "question", "answer"}, ...]
  VQA v2          questions=JSON {"questions": [{"question_id", "image_id", "question"}]}, annotations=JSON
                  {"annotations": [{"question_id", "image_id", "answers": [{"answer"}]}]}
  table           CSV with a header, or JSONL, with the columns image, caption or image, question, answer;
                  optional: answers, image_id, question_id, split, type.  Several captions: caption_1, caption_2, ...
                  or a list in JSONL.  text is another name for caption, and file_name for image: relative to the
                  directory of its annotation file, as in Hugging Face's ImageFolder
without annotations=, in root or in directories below it:
  ImageFolder     metadata.csv or metadata.jsonl: a table as above
  text files      cat.txt beside cat.jpg, one caption per line
where all images are in train/, val/ and test/, these are the splits"""

FIXES = {
    "unreadable file": "repair or convert the annotation file",
    "unknown key": "correct the spelling or remove it (on_error='skip' ignores the key and keeps its row)",
    "two names": "keep one of the two: image or file_name, caption or text",
    "two annotations": "give the file to read as annotations=FILE, or move the others out of root",
    "missing key": "add it",
    "bad value": "it must be a string (or, for ids and answers, a number)",
    "bad row": "correct the line",
    "empty caption": "add one or remove the row (nan, None, null and <NA> count as missing)",
    "empty question": "add one or remove the row (nan, None, null and <NA> count as missing)",
    "empty answer": "give at least one answer to each question",
    "image without text": "add a caption, or remove the image or its entry",
    "duplicate id": "ids must be unique; put several answers to one question into one row",
    "unmatched id": "make both files agree, or remove the entry",
    "two splits": "put every image into exactly one split, or test images leak into training",
    "split": "give train, val (or valid, validation, dev), test or test_ANYTHING for every image, or for none (without "
    "annotations=, as the name of a directory)",
    "missing image": "correct the path (relative to root; file_name: to the directory of its file) or remove the row",
    "ambiguous image": "give the path instead of the name or id, or keep one file of that name below root",
    "outside the directory": "move the image below root and use a relative path",
    "corrupt image": "replace the file or remove its rows",
    "unsupported image": "convert the file and update its rows, or remove them",
}
# what users should know although it is no error
REMARKS = {
    "16-bit image nearly black": "it uses less than an eighth of its range; scale the values to 0..65535 to make it lighter",
    "text without an image": "no image in the same directory has this name, so it was ignored",
    "text not read": "a metadata file describes the same image, and was read instead",
    "image not used": "it has no caption or question",
    "column not read": "it holds neither the image nor a text",
    "split": "so that none is empty",
    "directories": "images were divided by a hash, because not all are in directories named as splits",
}
MOST_CAPTIONS = 1 << 20  # the most bytes of a text file beside an image
_BOX = re.compile(r"[-+]?[.0-9][-+.0-9eE]*(\s+[-+]?[.0-9][-+.0-9eE]*){4,}")  # a line of a YOLO label file
SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test"}  # fmt: skip


def split_name(name):
    """The split that a name stands for, or None: a key of SPLITS, or train, val or test with a suffix, as test_style."""
    known = SPLITS.get(name)
    return known or (name if re.fullmatch(r"(train|val|test)_[A-Za-z0-9_]+", name) else None)


class Problems:
    """All problems found, by kind: every one is counted, and the first `keep` of each kind are kept as examples.

    Remarks are kept beside them: what users should know although it is no error.
    """

    def __init__(self, keep=3):
        self.keep, self.counts, self.examples, self.fatal = keep, {}, {}, False
        self.remark_counts, self.remark_examples = {}, {}

    def note(self, kind, message, fatal=False):
        assert kind in FIXES, kind
        self.fatal |= fatal  # a file that cannot be read at all must not be skipped as if it were a few rows
        self._add(self.counts, self.examples, kind, message)

    def remark(self, kind, message):
        assert kind in REMARKS, kind
        self._add(self.remark_counts, self.remark_examples, kind, message)

    def _add(self, counts, examples, kind, message):
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= self.keep:  # file names may hold bytes that are not UTF-8
            examples.setdefault(kind, []).append(message.encode(errors="backslashreplace").decode())

    def remarks(self):
        """A line for each kind of remark."""
        lines = []
        for kind, count in self.remark_counts.items():
            examples = self.remark_examples[kind] + ["..."] * (count > self.keep)
            lines.append(f"{kind} ({count}); {REMARKS[kind]}: {'; '.join(examples)}")
        return lines

    def report(self):
        examples = [f"{kind}: {m}" for kind, ms in self.examples.items() for m in ms]
        return {**self.counts, "examples": examples, "remarks": self.remarks()}

    def __str__(self):
        lines = []
        for kind, count in self.counts.items():
            lines += [f"{kind} ({count}); {FIXES[kind]}:"] + [f"    {m}" for m in self.examples[kind]]
            lines += ["    ..."] * (count > self.keep)
        return "\n".join(lines + [f"remark: {line}" for line in self.remarks()])


def records(path, questions, problems, root):
    """The records of one annotation file (for VQA v2: of its two files); `path` and `questions` are existing files."""
    name = _called(path, root)
    dialect, data = detect(path, name, problems)
    if questions is None and dialect in ("vqa questions", "vqa annotations"):
        message = f"{name}: found {dialect}, one of two files; give both questions= and annotations="
        problems.note("unreadable file", message, fatal=True)
    elif questions is None and dialect is not None:
        yield from _PARSERS[dialect](name, data, problems)
    elif questions is not None:
        other_name = _called(questions, root)
        other, asked = detect(questions, other_name, problems)
        if (other, dialect) == ("vqa questions", "vqa annotations"):
            yield from vqa(other_name, asked, name, data, problems)
        elif other and dialect:
            found = f"questions={other_name} is {other}, annotations={name} is {dialect}"
            problems.note("unreadable file", f"{found}; expected vqa questions and vqa annotations", fatal=True)


def _called(path, root):
    """The name of an annotation file in messages: its path below the root, as several may be called metadata.csv."""
    below = os.path.relpath(path.absolute(), root.absolute())
    return path.name if below.split(os.sep)[0] == os.pardir else below.replace(os.sep, "/")


def _read(path, most=None):
    """The text of a file. Raises ValueError with the reason, worded to follow the name of the file."""
    try:
        if most and (size := path.stat().st_size) > most:
            raise ValueError(f"it has {size:,} bytes; a file of captions must have at most {most:,}")
        raw = path.read_bytes()
    except (ValueError, OSError) as error:  # too large, or no permission
        raise ValueError(f": {error}") from error
    try:
        return raw.decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        raise ValueError(f" line {line}: {reason}") from error


def caption_file(path, name, images, problems):
    """The records of the text file beside images, called `name` in messages: each non-empty line is a caption."""
    try:
        lines = re.split(r"\r\n|\r|\n", _read(path, MOST_CAPTIONS))
    except ValueError as error:
        problems.note("unreadable file", f"{name}{error}")
        return
    captions, said = [], [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    for i, line in said:
        if _BOX.fullmatch(line):
            problems.note("bad value", f"{name} line {i}: {line[:60]!r} is a row of numbers (boxes?), not a caption")
        else:
            captions += _captions([line], f"{name} line {i}", problems)
    if not said:
        problems.note("empty caption", f"{name}: the file is empty")
    for image in images if captions else ():
        yield _record(name, image, None, captions=captions)


def detect(path, name, problems):
    """Detect (format, data), or (None, None) with the reason among the problems; messages call the file `name`."""

    def bad(message):
        problems.note("unreadable file", f"{name}{message}", fatal=True)
        return None, None

    try:
        text = _read(path)
    except ValueError as error:
        return bad(str(error))
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if first[:1] not in ("[", "{"):
        header = {_meaning(column.strip(' "')) for column in first.split(_delimiter(first))}
        return ("csv", text) if "image" in header else bad(f": unknown format, it begins {first[:60]!r}; {ACCEPTED}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() in (".jsonl", ".ndjson") or (first[0] == "{" and _is_json(first)):
            return "jsonl", text
        at, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        return bad(f" line {at} column {getattr(error, 'colno', 1)}: invalid JSON, {reason}")
    if isinstance(data, dict):
        lists = {key: value for key, value in data.items() if isinstance(value, list)}
        if "images" in lists and "annotations" in lists:
            return "coco", data
        if "images" in lists and any(isinstance(i, dict) and "sentences" in i for i in lists["images"]):
            return "karpathy", data
        if "questions" in lists:
            return "vqa questions", data
        if "annotations" in lists and any(isinstance(a, dict) and "answers" in a for a in lists["annotations"]):
            return "vqa annotations", data
        if _names_an_image(data):
            return "jsonl", text  # JSON Lines with a single line
    elif any(_names_an_image(row) for row in data):
        return "rows", data
    found = f"an object with the keys {sorted(data)[:10]}" if isinstance(data, dict) else f"a list {str(data)[:60]}"
    return bad(f": unknown JSON format, {found}; {ACCEPTED}")


def _names_an_image(row):
    return isinstance(row, dict) and "image" in map(_meaning, row)


def _is_json(text):
    try:
        return json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def _delimiter(header):
    return max(",;\t", key=header.count)  # spreadsheets in many countries write semicolons


def coco(name, data, problems):
    """Read COCO captions -> records; rows that are invalid go to `problems`."""
    _entry(data, name, problems, {"images", "annotations"}, {"info", "licenses", "license", "type"})
    files, described = {}, set()
    extra = {"width", "height", "license", "flickr_url", "coco_url", "date_captured"}
    for i, image in enumerate(data["images"]):
        where = f"{name} images[{i}]"
        if _entry(image, where, problems, {"id", "file_name"}, extra):
            image_id = _text(image["id"], where, problems)
            if _once(image_id, files, f"{where}: image id", problems):
                files[image_id] = _text(image["file_name"], where, problems, numbers=False)
    ids = set()
    for i, entry in enumerate(data["annotations"]):
        where = f"{name} annotations[{i}]"
        if not _entry(entry, where, problems, {"image_id", "caption"}, {"id"}):
            continue
        image_id = _text(entry["image_id"], where, problems)
        described.add(image_id)
        if image_id not in files:
            problems.note("unmatched id", f"{where}: image_id {image_id} is not in 'images'")
        elif _once(_text(entry.get("id"), where, problems), ids, f"{where}: annotation id", problems):
            yield _record(where, files[image_id], image_id, captions=_captions([entry["caption"]], where, problems))
    for image_id, file in files.items():
        if image_id not in described:
            problems.note("image without text", f"{name}: no annotation for image id {image_id}, {file}")


def karpathy(name, data, problems):
    """Read Karpathy's JSON, as `coco` does."""
    _entry(data, name, problems, {"images"}, {"dataset"})
    extra = {"filepath", "split", "cocoid", "imgid", "sentids"}
    for i, image in enumerate(data["images"]):
        where = f"{name} images[{i}]"
        if not _entry(image, where, problems, {"filename", "sentences"}, extra):
            continue
        said = image["sentences"] if isinstance(image["sentences"], list) else []
        if not said:
            problems.note("image without text", f"{where}: no sentences")
        keys = {"tokens", "imgid", "sentid"}
        raw = [s["raw"] for j, s in enumerate(said) if _entry(s, f"{where} sentences[{j}]", problems, {"raw"}, keys)]
        parts = [_text(image.get(key), where, problems, numbers=False) for key in ("filepath", "filename")]
        image_id = _text(image.get("cocoid", image.get("imgid")), where, problems)
        captions = _captions(raw, where, problems) if raw else []
        yield _record(where, "/".join(filter(None, parts)), image_id, _split(image.get("split")), captions)


def vqa(questions_name, questions, answers_name, annotations, problems):
    """Read the questions and annotations of VQA v2, as `coco` does."""
    top = {"info", "task_type", "data_type", "data_subtype", "license"}
    _entry(questions, questions_name, problems, {"questions"}, top)
    _entry(annotations, answers_name, problems, {"annotations"}, top)
    answers = {}
    for i, entry in enumerate(annotations["annotations"]):
        where = f"{answers_name} annotations[{i}]"
        optional = {"image_id", "question_type", "answer_type", "multiple_choice_answer"}
        if _entry(entry, where, problems, {"question_id", "answers"}, optional):
            question_id = _text(entry["question_id"], where, problems)
            if _once(question_id, answers, f"{where}: question_id", problems):
                answers[question_id] = where, entry
    asked = set()
    for i, entry in enumerate(questions["questions"]):
        where = f"{questions_name} questions[{i}]"
        if not _entry(entry, where, problems, {"question_id", "image_id", "question"}, set()):
            continue
        question_id = _text(entry["question_id"], where, problems)
        if not _once(question_id, asked, f"{where}: question_id", problems):
            continue
        if question_id not in answers:
            problems.note("unmatched id", f"{where}: question_id {question_id} has no annotation")
            continue
        place, reply = answers[question_id]
        image_id = _text(entry["image_id"], where, problems)
        if _text(reply.get("image_id", image_id), place, problems) != image_id:
            problems.note("unmatched id", f"{place}: question_id {question_id} has a different image_id at {where}")
            continue
        said = [a.get("answer") if isinstance(a, dict) else a for a in _listed(reply["answers"])]
        question = _question(entry["question"], said, question_id, reply.get("answer_type"), where, problems)
        yield _record(where, None, image_id, question=question, hint=questions.get("data_subtype"))
    for question_id, (where, _) in answers.items():
        if question_id not in asked:
            problems.note("unmatched id", f"{where}: question_id {question_id} is not among the questions")


def rows(name, data, problems):
    """Read a JSON list of objects, as `coco` does."""
    for i, row in enumerate(data):
        yield from _row(row, f"{name} row {i}", problems)


def jsonl(name, text, problems):
    """Read JSONL: an object per line, as `coco` does."""
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may be inside a JSON string
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                column, reason = getattr(error, "colno", 1), getattr(error, "msg", error)
                problems.note("bad row", f"{name} line {i} column {column}: invalid JSON, {reason}")
            else:
                yield from _row(row, f"{name} line {i}", problems)


def table(name, text, problems):
    """Rows of a CSV file: a cell `answer` is one answer, a cell `answers` is a list separated by '|'."""
    delimiter = _delimiter(next(line for line in text.split("\n") if line.strip()))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, line = None, 1
    try:
        for cells in reader:
            where, line = f"{name} line {line}", reader.line_num + 1  # a quoted cell may hold line breaks
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if not _header(header, where, problems):
                    return
            elif len(cells) != len(header):
                message = f"{where}: {len(cells)} cells for {len(header)} columns; quote cells containing {delimiter!r}"
                problems.note("bad row", message)
            else:
                pairs = zip(header, cells, strict=True)
                row = {key: cell for key, cell in pairs if cell.strip() and _is_known(_meaning(key))}
                if "answers" in row:
                    row["answers"] = row["answers"].split("|")
                yield from _row(row, where, problems, columns=header)
    except csv.Error as error:
        problems.note("unreadable file", f"{name} line {reader.line_num}: invalid CSV, {error}", fatal=True)


def _header(header, where, problems):
    """Whether rows can be read with this header.

    Columns without a name, such as pandas' index and empty columns of spreadsheets, are ignored.
    """
    named = [column for column in header if column]
    if len(set(named)) < len(named):
        problems.note("unreadable file", f"{where}: the header {header} has a column twice", fatal=True)
        return False
    if _renamed(dict.fromkeys(named), where, problems, fatal=True) is None:
        return False
    for column in named:
        if not _is_known(_meaning(column)):
            _unknown_key(f"column {column!r}", where, problems, _SHOWN_KEYS)
    return True


_PARSERS = {"coco": coco, "karpathy": karpathy, "rows": rows, "jsonl": jsonl, "csv": table}
_ROW_KEYS = {"image", "image_id", "caption", "question", "answer", "answers", "question_id", "split", "type", "dataset"}
_OTHER_NAMES = {"file_name": "image", "text": "caption"}
_SHOWN_KEYS = _ROW_KEYS | _OTHER_NAMES.keys() | {"caption_1"}
_NUMBERED = re.compile(r"(?:caption|text)_?([0-9]{1,6})")


def _meaning(key):
    """What a column or key stands for: 'image' for 'file_name', 'caption_2' for 'text2'; any other name for itself."""
    if numbered := _NUMBERED.fullmatch(key):
        return f"caption_{int(numbered[1])}"
    return _OTHER_NAMES.get(key, key)


def _is_known(meaning):
    return meaning in _ROW_KEYS or bool(_NUMBERED.fullmatch(meaning))


def _numbered(keys):
    """The keys among caption_1, caption_2, ... in this order."""
    return sorted(filter(_NUMBERED.fullmatch, keys), key=lambda key: int(key.removeprefix("caption_")))


def _renamed(row, where, problems, fatal=False):
    """The row with its keys replaced by what they stand for; None after a note where two keys stand for the same."""
    names = {}
    for key in row:
        if (before := names.setdefault(_meaning(key), key)) != key:
            return problems.note("two names", f"{where}: {before!r} and {key!r} mean the same", fatal=fatal)
    return {_meaning(key): value for key, value in row.items()}


def _row(row, where, problems, columns=()):
    """The record of a row of BLIP's lists, JSONL or CSV (an empty cell is an absent key): captions, a question, or both."""
    names = {_meaning(key): key for key in row} if isinstance(row, dict) else {}  # as the file has them
    if isinstance(row, dict) and (row := _renamed(row, where, problems)) is None:
        return
    numbered = _numbered(row) if isinstance(row, dict) else []
    if not _entry(row, where, problems, {"image"}, _SHOWN_KEYS | set(numbered)):
        return
    if "caption" not in row and "question" not in row and not numbered:
        columns = set(map(_meaning, columns))
        captions = "caption" in columns or _numbered(columns)
        kind = "empty caption" if captions else "empty question" if "question" in columns else "missing key"
        problems.note(kind, f"{where}: neither a caption nor a question")
        return
    image, image_id = _text(row["image"], where, problems, numbers=False), _text(row.get("image_id"), where, problems)
    if not image:
        return image is None or problems.note("bad value", f"{where}: 'image' is empty")
    record = _record(where, image, image_id, _split(row.get("split")), beside=names["image"] == "file_name")
    if "caption" in row:
        record["captions"] = _captions(_listed(row["caption"]), where, problems)
    if given := [one for key in numbered for one in _listed(row[key]) if not _is_empty(one)]:
        record["captions"] += _captions(given, where, problems)
    elif "caption" not in row and "question" not in row:
        problems.note("empty caption", f"{where}: no text in {', '.join(names[key] for key in numbered)}")
    if "question" in row:
        answers = _listed(row.get("answers", [])) + _listed(row.get("answer", []))
        question_id = _text(row.get("question_id"), where, problems)
        record["question"] = _question(row["question"], answers, question_id, row.get("type"), where, problems)
    yield record


def _record(where, image, image_id, split=None, captions=(), question=None, hint=None, beside=False):
    return {"where": where, "image": image, "image_id": image_id, "split": split, "captions": list(captions),
            "question": question, "hint": hint, "beside": beside}  # fmt: skip


def _question(question, answers, question_id, kind, where, problems):
    question = _said(question, "empty question", where, problems)
    said = [_text(answer, where, problems) for answer in answers]
    if "" in said or not said:
        problems.note("empty answer", where)
    said = [answer for answer in said if answer]
    kind = _text(kind, where, problems) or ""
    ok = question and said
    return {"question_id": question_id, "question": question, "answers": said, "type": kind} if ok else None


def _captions(captions, where, problems):
    if not captions:
        problems.note("empty caption", f"{where}: an empty list")
    said = [_said(caption, "empty caption", where, problems, numbers=False) for caption in captions]
    return [caption for caption in said if caption]


# what pandas, numpy, R and databases write for a missing text; none of these is a caption
_MISSING = frozenset({"", "nan", "none", "null", "<na>"})


def _said(value, kind, where, problems, numbers=True):
    """A caption or question; '' or None after a note, where it is missing or not a string.

    Not for answers: 'none' may be one.
    """
    text = _text(value, where, problems, numbers)
    if text is None or text.lower() not in _MISSING:
        return text
    problems.note(kind, f"{where}: {'null' if value is None else repr(value)[:60]}")
    return ""


def _is_empty(value):
    """Whether a value is empty: null, NaN or white space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _split(value):
    return None if _is_empty(value) else value.strip() if isinstance(value, str) else value


def _text(value, where, problems, numbers=True):
    """The stripped text, '' for a missing value (None, NaN), or None after a note about an invalid one."""
    if value is None or value != value:
        return ""
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    try:
        value.encode()  # a lone surrogate, as in "\ud83d", is valid JSON but not valid text
        return value.strip()
    except (AttributeError, UnicodeEncodeError):
        problems.note("bad value", f"{where}: {value!r:.60} is not a string")


def _listed(value):
    return value if isinstance(value, list) else [value]


def _once(value, seen, what, problems):
    """Whether `value` is new. It is added to a set; a dict is filled by the caller."""
    if value and value in seen:
        problems.note("duplicate id", f"{what} {value} occurs twice")
        return False
    if isinstance(seen, set):
        seen.add(value)
    return True


def _unknown_key(key, where, problems, known):
    """Report an unknown key: a remark in Hugging Face's metadata files, which may have other columns, else a spelling error."""
    if re.match(r"(.*/)?metadata\.(csv|jsonl) ", where, re.IGNORECASE):
        problems.remark("column not read", f"{where}: {key}")
    else:
        problems.note("unknown key", f"{where}: {key}; allowed: {', '.join(sorted(known))}")


def _entry(entry, where, problems, required, optional):
    """Whether `entry` is an object with the required keys; unknown keys are noted, but do not make it invalid."""
    if not isinstance(entry, dict):
        problems.note("bad value", f"{where}: expected an object, got {entry!r:.60}")
        return False
    for key in entry.keys() - required - optional:
        _unknown_key(repr(key), where, problems, required | optional)
    missing = sorted(key for key in required if entry.get(key) is None)
    for key in missing:
        problems.note("missing key", f"{where}: {key!r}; found: {', '.join(entry)}")
    return not missing
