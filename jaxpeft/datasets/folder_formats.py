"""Annotation files of many dialects -> records; the dialect is told from the content, never from the file's name.

A record is one statement about one image: {where, image, image_id, split, captions, question, hint}.  `image` (a path
below the root) or `image_id` may be empty; `where` says in which file and line it stood.  A parser is a generator that
tells `problems` about everything it leaves out, so that people hear about all of it at once.

To add a dialect: a rule in `detect`, a parser here, and its line in ACCEPTED.
"""

import csv
import io
import json
import re

from jaxpeft import untrusted

ACCEPTED = """accepted are
  COCO captions   JSON {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
  Karpathy        JSON {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
  BLIP            JSON [{"image", "caption"}, ...] or [{"image", "question", "answer"}, ...]
  VQA v2          questions=JSON {"questions": [{"question_id", "image_id", "question"}]}, annotations=JSON
                  {"annotations": [{"question_id", "image_id", "answers": [{"answer"}]}]}
  table           CSV with a header, or JSONL, with the columns image, caption or image, question, answer;
                  optional: answers, image_id, question_id, split, type"""

FIXES = {
    "unreadable file": "repair or convert the annotation file",
    "unknown key": "correct the spelling or remove it (on_error='skip' ignores the key and keeps its row)",
    "missing key": "add it",
    "bad value": "write a text (or, for ids and answers, a number)",
    "bad row": "repair the line",
    "empty caption": "write one or remove the row",
    "empty question": "write one or remove the row",
    "empty answer": "write at least one answer for each question",
    "image without text": "write a caption or remove the image's entry",
    "duplicate id": "give one id to one thing; several answers to one question belong in one row",
    "unmatched id": "make both sides agree, or remove the entry",
    "two splits": "put every image into exactly one split, or the test set leaks into training",
    "split": "name train, val (or valid, validation, dev), test or test_ANYTHING in every row, or in none",
    "missing image": "correct the path (relative to root) or remove the row",
    "ambiguous image": "name the file instead of the id, or keep one file of that name below root",
    "outside the directory": "move the image below root and use a relative path",
    "corrupt image": "replace the file or remove its rows",
}
SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test"}  # fmt: skip


def split_name(name):
    """The split that a name means, or None: a key of SPLITS, or train, val or test with more after '_': test_style."""
    known = SPLITS.get(name)
    return known or (name if re.fullmatch(r"(train|val|test)_[A-Za-z0-9_]+", name) else None)


class Problems:
    """Everything found wrong, by kind: counted all, remembered the first `keep` of each kind."""

    def __init__(self, keep=3):
        self.keep, self.counts, self.examples, self.fatal = keep, {}, {}, False

    def note(self, kind, message, fatal=False):
        assert kind in FIXES, kind
        self.fatal |= fatal  # a file we cannot read at all is not "some rows dropped": no skipping
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < self.keep:
            examples.append(message)

    def report(self):
        return {**self.counts, "examples": [f"{kind}: {m}" for kind, ms in self.examples.items() for m in ms]}

    def __str__(self):
        lines = []
        for kind, count in self.counts.items():
            lines += [f"{kind} ({count}); {FIXES[kind]}:"] + [f"    {m}" for m in self.examples[kind]]
            lines += ["    ..."] * (count > self.keep)
        return "\n".join(lines)


def records(path, questions, problems):
    """The records of one annotation file (for VQA v2: of its two files); `path` and `questions` are existing files."""
    dialect, data = detect(path, problems)
    if questions is None and dialect in ("vqa questions", "vqa annotations"):
        message = f"{path.name}: found {dialect}, one file of two; give both questions= and annotations="
        problems.note("unreadable file", message, fatal=True)
    elif questions is None and dialect is not None:
        yield from _PARSERS[dialect](path.name, data, problems)
    elif questions is not None:
        other, asked = detect(questions, problems)
        if (other, dialect) == ("vqa questions", "vqa annotations"):
            yield from vqa(questions.name, asked, path.name, data, problems)
        elif other and dialect:
            found = f"questions={questions.name} is {other}, annotations={path.name} is {dialect}"
            problems.note("unreadable file", f"{found}; expected vqa questions and vqa annotations", fatal=True)


def detect(path, problems):
    """-> (dialect, data), or (None, None) with the reason among the problems."""

    def bad(message):
        problems.note("unreadable file", f"{path.name}{message}", fatal=True)
        return None, None

    try:
        raw = untrusted.kept_in(path).read_bytes()
    except ValueError as error:  # a link
        return bad(f": {error}")
    try:
        text = raw.decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return bad(f" line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8")
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if first[:1] not in ("[", "{"):
        header = [name.strip(' "') for name in first.split(_delimiter(first))]
        return ("csv", text) if "image" in header else bad(f": found a text that begins {first[:60]!r}; {ACCEPTED}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() in (".jsonl", ".ndjson") or (first[0] == "{" and _is_json(first)):
            return "jsonl", text
        at, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        return bad(f" line {at} column {getattr(error, 'colno', 1)}: broken JSON, {reason}")
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
        if "image" in data:
            return "jsonl", text  # JSON lines with a single line
    elif any(isinstance(row, dict) and "image" in row for row in data):
        return "rows", data
    found = f"an object with the keys {sorted(data)[:10]}" if isinstance(data, dict) else f"a list {str(data)[:60]}"
    return bad(f": found JSON, {found}; {ACCEPTED}")


def _is_json(text):
    try:
        return json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def _delimiter(header):
    return max(",;\t", key=header.count)  # spreadsheets in many countries write semicolons


def coco(name, data, problems):
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
            problems.note("unmatched id", f"{where}: image_id {image_id} is not among the images")
        elif _once(_text(entry.get("id"), where, problems), ids, f"{where}: annotation id", problems):
            yield _record(where, files[image_id], image_id, captions=_captions([entry["caption"]], where, problems))
    for image_id, file in files.items():
        if image_id not in described:
            problems.note("image without text", f"{name}: no annotation for image id {image_id}, {file}")


def karpathy(name, data, problems):
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
        yield _record(where, "/".join(filter(None, parts)), image_id, image.get("split"), captions)


def vqa(questions_name, questions, answers_name, annotations, problems):
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
            problems.note("unmatched id", f"{place}: question_id {question_id} has another image_id than at {where}")
            continue
        said = [a.get("answer") if isinstance(a, dict) else a for a in _listed(reply["answers"])]
        question = _question(entry["question"], said, question_id, reply.get("answer_type"), where, problems)
        yield _record(where, None, image_id, question=question, hint=questions.get("data_subtype"))
    for question_id, (where, _) in answers.items():
        if question_id not in asked:
            problems.note("unmatched id", f"{where}: question_id {question_id} was never asked")


def rows(name, data, problems):
    for i, row in enumerate(data):
        yield from _row(row, f"{name} row {i}", problems)


def jsonl(name, text, problems):
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                column, reason = getattr(error, "colno", 1), getattr(error, "msg", error)
                problems.note("bad row", f"{name} line {i} column {column}: broken JSON, {reason}")
            else:
                yield from _row(row, f"{name} line {i}", problems)


def table(name, text, problems):
    """CSV: a cell `answer` is one answer as written, a cell `answers` is a list separated by '|'."""
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
                _header(header, where, problems)
            elif len(cells) != len(header):
                message = f"{where}: {len(cells)} cells for {len(header)} columns; quote cells with {delimiter!r}"
                problems.note("bad row", message)
            else:
                pairs = zip(header, cells, strict=True)
                row = {key: cell for key, cell in pairs if cell.strip() and key in _ROW_KEYS}
                if "answers" in row:
                    row["answers"] = row["answers"].split("|")
                yield from _row(row, where, problems, columns=header)
    except csv.Error as error:
        problems.note("unreadable file", f"{name} line {reader.line_num}: broken CSV, {error}", fatal=True)


def _header(header, where, problems):
    if len(set(header)) < len(header):
        problems.note("unreadable file", f"{where}: a column appears twice in the header {header}", fatal=True)
    for column in set(header) - _ROW_KEYS:
        problems.note("unknown key", f"{where}: column {column!r}; known are {', '.join(sorted(_ROW_KEYS))}")


_PARSERS = {"coco": coco, "karpathy": karpathy, "rows": rows, "jsonl": jsonl, "csv": table}
_ROW_KEYS = {"image", "image_id", "caption", "question", "answer", "answers", "question_id", "split", "type", "dataset"}


def _row(row, where, problems, columns=()):
    """A row of BLIP's lists, of JSONL or of CSV (whose empty cells are absent keys): captions, a question, or both."""
    if not _entry(row, where, problems, {"image"}, _ROW_KEYS):
        return
    if "caption" not in row and "question" not in row:
        kind = next((f"empty {key}" for key in ("caption", "question") if key in columns), "missing key")
        problems.note(kind, f"{where}: neither a caption nor a question")
        return
    image, image_id = _text(row["image"], where, problems, numbers=False), _text(row.get("image_id"), where, problems)
    if not image:
        return image is None or problems.note("bad value", f"{where}: 'image' is empty")
    record = _record(where, image, image_id, row.get("split"))
    if "caption" in row:
        record["captions"] = _captions(_listed(row["caption"]), where, problems)
    if "question" in row:
        answers = _listed(row.get("answers", [])) + _listed(row.get("answer", []))
        question_id = _text(row.get("question_id"), where, problems)
        record["question"] = _question(row["question"], answers, question_id, row.get("type"), where, problems)
    yield record


def _record(where, image, image_id, split=None, captions=(), question=None, hint=None):
    return {"where": where, "image": image, "image_id": image_id, "split": split, "captions": list(captions),
            "question": question, "hint": hint}  # fmt: skip


def _question(question, answers, question_id, kind, where, problems):
    question = _text(question, where, problems)
    said = [_text(answer, where, problems) for answer in answers]
    if question == "":
        problems.note("empty question", where)
    if "" in said or not said:
        problems.note("empty answer", where)
    said = [answer for answer in said if answer]
    kind = _text(kind, where, problems) or ""
    ok = question and said
    return {"question_id": question_id, "question": question, "answers": said, "type": kind} if ok else None


def _captions(captions, where, problems):
    said = [_text(caption, where, problems, numbers=False) for caption in captions]
    if "" in said or not said:
        problems.note("empty caption", where)
    return [caption for caption in said if caption]


def _text(value, where, problems, numbers=True):
    """Stripped text, '' for nothing (None), None after a note about an unusable value."""
    if value is None:
        return ""
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    try:
        value.encode()  # a lone surrogate, as in "\ud83d", is valid JSON but no text
        return value.strip()
    except (AttributeError, UnicodeEncodeError):
        problems.note("bad value", f"{where}: {value!r:.60} is not a text")


def _listed(value):
    return value if isinstance(value, list) else [value]


def _once(value, seen, what, problems):
    """Whether `value` is new; a set remembers it, a dict is filled by the caller."""
    if value and value in seen:
        problems.note("duplicate id", f"{what} {value} was given before")
        return False
    if isinstance(seen, set):
        seen.add(value)
    return True


def _entry(entry, where, problems, required, optional):
    """Whether `entry` is an object with the required keys; keys nobody knows are noted, but do not spoil it."""
    if not isinstance(entry, dict):
        problems.note("bad value", f"{where}: expected an object, got {entry!r:.60}")
        return False
    for key in entry.keys() - required - optional:
        problems.note("unknown key", f"{where}: {key!r}; known are {', '.join(sorted(required | optional))}")
    missing = sorted(key for key in required if entry.get(key) is None)
    for key in missing:
        problems.note("missing key", f"{where}: {key!r}; found are {', '.join(entry)}")
    return not missing
