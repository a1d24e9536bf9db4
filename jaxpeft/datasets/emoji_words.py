"""What the emoji data set says about its pictures: names, captions, questions, splits; all by rule (see emoji.py)."""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable

STYLES = ("google", "twitter", "fluent", "openmoji")
SPLITS = ("train", "val", "test_style", "test_style_hard", "test_concept")
DROPPED_GROUPS = ("Flags", "Symbols", "Component", "People & Body")
TRACES = ("coral", "feather", "microbe", "paw prints", "pig nose", "spider web", "spiral shell", "wing")  # no animals
NAME, KIND, ANIMAL = "what is this?", "what kind of thing is this?", "is this an animal?"


@dataclasses.dataclass(frozen=True)
class Concept:
    """What an emoji shows. `code` is the stem of its files; `animal` is None where the question would be unfair."""

    code: str
    name: str
    kind: str
    captions: tuple[str, ...]
    animal: bool | None


def plain(text: str) -> str:
    """Lower-case ASCII words, digits and apostrophes, single spaces: what a tokenizer writes back as it was."""
    text = text.lower().replace("\u2019", "'").replace("&", " and ")
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^a-z0-9' ]+", " ", text).split())


def concepts(records: list[dict], annotations: dict[str, dict]) -> list[Concept]:
    """The concepts of emoji-datasource's records and CLDR's {characters: {'tts': [name], 'default': keywords}}."""
    found = []
    for record in records:
        code = record["unified"].lower()
        points = [int(point, 16) for point in code.split("-") if point != "fe0f"]  # CLDR has no variation selectors
        words = annotations.get("".join(map(chr, points)))
        if words and record["category"] not in DROPPED_GROUPS:
            keywords = [keyword for keyword in map(plain, words["default"]) if re.match("[a-z].", keyword)]
            found.append((code, record, plain(words["tts"][0]), keywords))
    animals = {name for _, record, name, _ in found if record["subcategory"].startswith("animal-")} | {"animal"}
    out = []
    for code, record, name, keywords in found:
        captions, animal = _captions(name, record, keywords), _animal(name, record, keywords, animals)
        out.append(Concept(code, name, plain(record["category"]), captions, animal))
    return out


def _animal(name: str, record: dict, keywords: list[str], animals: set[str]) -> bool | None:
    """None for what neither answer is clearly right for: a feather, a hot dog, a teddy bear, a cat's face in tears."""
    if record["subcategory"].startswith("animal-"):
        return None if name in TRACES else True
    return False if animals.isdisjoint([*keywords, *name.split()]) else None


def _captions(name: str, record: dict, keywords: list[str]) -> tuple[str, ...]:
    short = plain(record["short_names"][0])
    more = [keyword for keyword in keywords if set(keyword.split()).isdisjoint(name.split())]
    said = [
        name,
        name if re.search(r"[a-z]\d|\d[a-z]", short) else short,  # 'clock930', 'cat2' are nobody's words
        f"a drawing of {'an' if name[0] in 'aeiou' else 'a'} {name}",
        " ".join([name, *more[:4]]),
        f"{plain(record['subcategory'])} {name}",
    ]
    return tuple(dict.fromkeys(said))


def _order(found: Iterable[Concept], salt: str) -> list[Concept]:
    """A shuffle that is the same on every machine and does not depend on the order given."""
    return sorted(found, key=lambda one: hashlib.sha256(f"{salt}/{one.code}".encode()).digest())


def split_rows(found: list[Concept], seed: int) -> dict[str, list[dict]]:
    """{split: rows of its JSONL file}. Animals are as many as others in each of three pools, and so in every split."""
    order = _order(found, f"{seed}/split")
    n_test = len(order) // 5
    n_val = (len(order) - n_test) // 10
    pools = {"test": order[:n_test], "val": order[n_test : n_test + n_val], "train": order[n_test + n_val :]}
    rows: dict[str, list[dict]] = {name: [] for name in SPLITS}
    for pool, members in pools.items():
        yes, no = ([c for c in _order(members, f"{seed}/asked") if c.animal is answer] for answer in (True, False))
        asked = {one.code for pair in zip(yes, no, strict=False) for one in pair}  # as many of each as the fewer
        held = set(_order(members, f"{seed}/style")[::2])  # those whose Google picture is in val, not Twitter's
        for one in sorted(members, key=lambda one: one.code):
            for style in STYLES:
                if pool == "test":
                    split = "test_concept" if style in ("google", "twitter") else None
                elif style in ("google", "twitter"):
                    split = "val" if pool == "val" and (style == "google") == (one in held) else "train"
                else:
                    split = {"fluent": "test_style", "openmoji": "test_style_hard"}[style]
                if split:
                    rows[split] += _rows(one, style, one.code in asked)
    return rows


def _rows(one: Concept, style: str, asked: bool) -> list[dict]:
    """A row with the captions and one per question, as the `folder` loader reads them."""
    image = {"image": f"{style}/{one.code}.png"}
    questions = [(NAME, one.name, "name"), (KIND, one.kind, "kind")]
    questions += [(ANIMAL, "yes" if one.animal else "no", "animal")] if asked else []
    return [image | {"caption": list(one.captions)}] + [
        image | {"question": question, "answer": answer, "type": kind} for question, answer, kind in questions
    ]
