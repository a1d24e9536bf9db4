"""What is said about a scene: web captions, human captions, questions, and a text-only corpus.

Every statement is made by rule from the objects of the scene; 'human' names the style, no person wrote any of it.
Web captions (pre-training) list what is there, the largest first or from left to right: no count, some objects missing,
8 % about another scene; half of them say on which side one or two things are, the others say nothing of positions.
Human captions (downstream) say more: how many, where, and always every object. Questions have one right answer each.
Held-out pairs (world.HELD_PAIRS) are never named outside the split 'test_comp', not even to be denied.
All text is lower case without punctuation, and WORDS is every word that can occur.
"""

from jaxpeft.data.scenes.world import (
    COLORS,
    HELD_PAIRS,
    QUADRANTS,
    SHAPES,
    SIZES,
    chance,
    pick,
    scene,
    shuffled,
    stream,
)

NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
SYNONYMS = {
    "small": "tiny",
    "large": "big",
    "circle": "disc",
    "moon": "crescent",
    "purple": "violet",
    "cyan": "turquoise",
}
TYPES = ("exist", "count", "color", "shape", "position", "compare")
ANSWERS = ("yes", "no", *NUMBERS, *COLORS, *SHAPES, "left", "right", "top", "bottom")
WORDS = tuple(
    sorted(
        {
            *ANSWERS,
            *PLURALS.values(),
            *SIZES,
            *SYNONYMS.values(),
            *"a and anything are at color how in is larger many more of on one or picture shape shapes shows smaller than the "
            "there this what with".split(),
        }
    )
)
SWAPPED = 0.08  # share of pictures whose web captions describe another scene
DROPPED = 0.1  # share of objects that a web caption leaves out
LOCATED = 0.5  # share of web captions that say on which side their first two things are
SYNONYM = 0.1  # share of texts in which a word gives way to its synonym, per word


def image_id(split, index):
    """The name of a picture in result files."""
    return f"scenes-{split}-{index}"


def record(split, index, seed=0):
    """The row of one picture: two web captions in pretrain, five human captions and six questions elsewhere."""
    if split == "pretrain":
        captions, asked = web_captions(split, index, seed=seed), []
    else:
        captions, asked = human_captions(split, index, seed=seed), questions(split, index, seed)
    return {"image_id": image_id(split, index), "captions": captions, "questions": asked}


def web_captions(split, index, n=2, seed=0):
    """n noisy captions of one picture, as if found beside it: 'a picture of a large red circle and a blue star'."""
    rng = stream(split, index, seed, "web")
    objects = scene("swap" if chance(rng, SWAPPED) else split, index, seed).objects
    return [_web_caption(rng, objects) for _ in range(n)]


def _web_caption(rng, objects):
    kept = [thing for thing in objects if not chance(rng, DROPPED)] or [pick(rng, objects)]
    order = pick(rng, ("size", "left", "none"), (0.4, 0.4, 0.2))
    if order == "none":
        kept = shuffled(rng, kept)
    else:  # which thing comes next teaches where things are long before the rare word 'left' does
        kept = sorted(kept, key=lambda thing: (-thing.radius if order == "size" else thing.x, thing.y, thing.x))
    located = chance(rng, LOCATED)
    say = _speaker(rng, sized=not located and chance(rng, 0.5))
    phrases = [f"a {say(thing)}" for thing in kept]
    if located:
        phrases[:2] = [f"{phrase} {_side(rng, thing)}" for phrase, thing in zip(phrases[:2], kept, strict=False)]
    return "a picture of " + " and ".join(phrases)


def _side(rng, thing):
    """'on the left' or 'at the top': half of where a thing is, in the words of the position questions."""
    vertical, horizontal = thing.quadrant.split()
    return f"on the {horizontal}" if chance(rng, 0.5) else f"at the {vertical}"


def human_captions(split, index, n=5, seed=0):
    """n references that say how many, what and where: 'there are two shapes a red circle at the top left and a ...'."""
    rng = stream(split, index, seed, "human")
    objects = scene(split, index, seed).objects
    return [_human_caption(rng, objects) for _ in range(n)]


def _human_caption(rng, objects):
    ordered = sorted(objects, key=lambda thing: (QUADRANTS.index(thing.quadrant), -thing.radius, thing.y, thing.x))
    if chance(rng, 0.3):
        ordered = shuffled(rng, objects)
    say = _speaker(rng, sized=chance(rng, 0.8))
    preposition = pick(rng, ("at", "in"), (0.8, 0.2))
    listing = [f"{say(thing)} {preposition} the {thing.quadrant}" for thing in ordered]
    if len(objects) == 1:
        return pick(rng, ("there is one shape a ", "one "), (0.6, 0.4)) + listing[0]
    opening = pick(rng, ("there are {} shapes", "{} shapes", "the picture shows {} shapes"), (0.5, 0.3, 0.2))
    return " ".join([opening.format(NUMBERS[len(objects)]), " and ".join(f"a {phrase}" for phrase in listing)])


def _speaker(rng, sized):
    """A function thing -> '[large] red circle' that keeps to one choice of sizes and synonyms, as one speaker would."""
    swaps = {word: synonym for word, synonym in SYNONYMS.items() if chance(rng, SYNONYM)}

    def say(thing):
        words = (thing.size, thing.color, thing.shape) if sized else (thing.color, thing.shape)
        return " ".join(swaps.get(word, word) for word in words)

    return say


def questions(split, index, seed=0):
    """Six different questions on one picture, one of each type where the scene allows it: dicts of question_id,
    question, type and answers. The one right answer stands there ten times, because VQA scoring wants ten."""
    rng = stream(split, index, seed, "questions")
    asked = _questions(rng, scene(split, index, seed).objects, 6, comp=split == "test_comp")
    name = image_id(split, index)
    return [
        {"question_id": f"{name}-{k}", "question": question, "answers": [answer] * 10, "type": kind}
        for k, (question, answer, kind) in enumerate(asked)
    ]


def _questions(rng, objects, n, comp):
    """n different (question, answer, type)."""
    asked = {}
    queue = shuffled(rng, TYPES)
    while len(asked) < n:
        kind = queue.pop() if queue else pick(rng, TYPES)  # an impossible type is replaced by a random one
        found = _ASK[kind](rng, objects, comp)
        if found and found[0] not in asked:
            asked[found[0]] = (*found, kind)
    return shuffled(rng, [*asked.values()])


def _exist(rng, objects, comp):
    """The answer is drawn first; 'no' asks for something that shares its colour or its shape with what is there."""
    present = pick(rng, objects)
    answer = pick(rng, ("yes", "no"))
    if chance(rng, 0.3):
        word = pick(rng, [c for c in COLORS if all(c != o.color for o in objects)]) if answer == "no" else present.color
        return f"is there anything {word}", answer
    if chance(rng, 0.2):
        word = pick(rng, [s for s in SHAPES if all(s != o.shape for o in objects)]) if answer == "no" else present.shape
        return f"is there a {word}", answer
    shape, color = present.pair if answer == "yes" else _absent_pair(rng, objects, comp)
    return f"is there a {color} {shape}", answer


def _absent_pair(rng, objects, comp):
    """A pair that is not there but shares its colour or its shape with something that is. In test_comp half of these
    are held-out pairs instead, as half of its things are: otherwise 'held out means yes' would answer its questions."""
    present = {o.pair for o in objects}
    if comp and chance(rng, 0.5):
        return pick(rng, sorted(HELD_PAIRS - present))
    near = pick(rng, objects)
    pairs = [(near.shape, color) for color in COLORS] + [(shape, near.color) for shape in SHAPES]
    return pick(rng, [pair for pair in pairs if pair not in present and pair not in HELD_PAIRS])


def _count(rng, objects, comp):
    """Draws the answer among those that some question on this scene has, rare ones more often, then such a question."""
    by_answer = {}
    for name, number in _groups(objects):
        by_answer.setdefault(number, []).append(f"how many {name} are there")
    number = pick(rng, [*by_answer], [(0.7, 1.0, 2.2, 3.0, 3.0)[number] for number in by_answer])
    return pick(rng, by_answer[number]), NUMBERS[number]


def _groups(objects):
    """(plural, how many) for all shapes together, each shape and each colour."""
    yield "shapes", len(objects)
    for shape in SHAPES:
        yield PLURALS[shape], sum(o.shape == shape for o in objects)
    for color in COLORS:
        yield f"{color} shapes", sum(o.color == color for o in objects)


def _unique(objects, *fields):
    """The objects that no other equals in these fields."""
    keys = [tuple(getattr(o, field) for field in fields) for o in objects]
    return [o for o, key in zip(objects, keys, strict=True) if keys.count(key) == 1]


def _color(rng, objects, comp):
    asks = [(f"what color is the {o.shape}", o.color) for o in _unique(objects, "shape")]
    asks += [
        (f"what color is the {o.size} {o.shape}", o.color)
        for o in _unique(objects, "shape", "size")
        if o not in _unique(objects, "shape")
    ]
    asks += [(f"what color is the shape at the {o.quadrant}", o.color) for o in _unique(objects, "quadrant")]
    return pick(rng, asks) if asks else None


def _shape(rng, objects, comp):
    asks = [(f"what shape is the {o.color} one", o.shape) for o in _unique(objects, "color")]
    asks += [
        (f"what shape is the {o.size} {o.color} one", o.shape)
        for o in _unique(objects, "color", "size")
        if o not in _unique(objects, "color")
    ]
    asks += [(f"what is at the {o.quadrant}", o.shape) for o in _unique(objects, "quadrant")]
    return pick(rng, asks) if asks else None


def _position(rng, objects, comp):
    names = [(f"{o.color} {o.shape}", o) for o in _unique(objects, "pair")]
    names += [(o.shape, o) for o in _unique(objects, "shape")]
    if not names:
        return None
    name, thing = pick(rng, names)
    vertical, horizontal = thing.quadrant.split()
    if chance(rng, 0.5):
        return f"is the {name} on the left or on the right", horizontal
    return f"is the {name} at the top or at the bottom", vertical


def _compare(rng, objects, comp):
    """Sizes of two objects or numbers of two groups. The answer is drawn first and puts the two in order."""
    answer = pick(rng, ("yes", "no"))
    alone = _unique(objects, "pair")
    pairs = [(a, b) for a in alone for b in alone if a.radius > b.radius]
    if pairs and chance(rng, 0.5):
        a, b = (f"{o.color} {o.shape}" for o in _in_order(pick(rng, pairs), answer))
        return f"is the {a} larger than the {b}", answer
    a, b = _in_order(_two_groups(rng, objects, answer), answer)
    return f"are there more {a} than {b}", answer


def _in_order(pair, answer):
    return pair if answer == "yes" else pair[::-1]


def _two_groups(rng, objects, answer):
    """Two shapes or two colours, the more frequent first, mostly both in the scene; a third of the 'no' questions ask
    about equal numbers where there are any."""
    shapes, colors = [*_groups(objects)][1:9], [*_groups(objects)][9:]
    pairs = [(a, b) for group in (shapes, colors) for a in group for b in group if a[1] >= b[1] and a != b and a[1]]
    equal = [pair for pair in pairs if pair[0][1] == pair[1][1]]
    both = [pair for pair in pairs if pair[0][1] > pair[1][1] > 0]
    if answer == "no" and equal and chance(rng, 0.35):
        pairs = equal
    elif both and chance(rng, 0.7):
        pairs = both
    else:
        pairs = [pair for pair in pairs if not pair[1][1]]
    return [name for name, _ in pick(rng, pairs)]


_ASK = {"exist": _exist, "count": _count, "color": _color, "shape": _shape, "position": _position, "compare": _compare}


def text(seed, index):
    """Line `index` of the text-only corpus: 'question answer', a web caption or a short statement on a scene without a
    picture. It stands in for the language model that a text decoder usually starts from. It has no human caption."""
    rng = stream("text", index, seed, "text")
    objects = scene("text", index, seed).objects
    style = pick(rng, ("question", "web", "statement"), (0.45, 0.2, 0.35))
    if style == "question":
        question, answer, _ = pick(rng, _questions(rng, objects, 1, comp=False))
        return f"{question} {answer}"
    return _web_caption(rng, objects) if style == "web" else _statement(rng, objects)


def _statement(rng, objects):
    """One fact: how many, where, which is larger. Only things whose colour and shape no other has are pointed at."""
    say = _speaker(rng, sized=chance(rng, 0.5))
    number, plural = NUMBERS[len(objects)], "s" * (len(objects) > 1)
    facts = [f"this picture shows {number} shape{plural}", f"a picture with {number} shape{plural}"]
    alone = _unique(objects, "pair")
    if alone:
        thing = pick(rng, alone)
        side, end = thing.quadrant.split()[::-1]
        facts = 3 * [f"the {say(thing)} is {pick(rng, ('at', 'in'))} the {thing.quadrant}"] + facts
        facts += [f"the {say(thing)} is on the {side}", f"the {say(thing)} is at the {end}"]
    pairs = [(a, b) for a in alone for b in alone if a.radius > b.radius]
    if pairs:
        a, b = pick(rng, pairs)
        facts += 2 * [f"the {say(a)} is larger than the {say(b)}", f"the {say(b)} is smaller than the {say(a)}"]
    return pick(rng, facts)
