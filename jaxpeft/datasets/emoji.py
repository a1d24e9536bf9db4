"""emoji: real pictures in four drawing styles with words that people wrote, as a directory for `data.name=folder`.

    python -m jaxpeft.datasets.emoji --out data/emoji             # about a minute and 150 MB of packages
    python -m jaxpeft.datasets.emoji --out data/emoji --floors    # what a nearest neighbour in pixels scores

Needs npm, which fetches five packages of fixed versions, and `pip install 'jaxpeft[emoji]'`, which rasterises SVG. The
names and keywords are the English ones of Unicode CLDR; captions, questions and answers are made of them by rule, so
say "rule-derived" beside a number. Flags, symbols and people are left out, and so are concepts that a style lacks.

    DIR/{google,twitter,fluent,openmoji}/CODEPOINTS.png   64x64 RGB on white, all concepts in all styles
    DIR/annotations/SPLIT.jsonl    train            Google's and Twitter's pictures of 80 % of the concepts, without
                                   val              one of the two pictures of every tenth of those concepts
                                   test_style       Fluent's pictures of the same concepts
                                   test_style_hard  OpenMoji's: outlined, the style farthest from the others
                                   test_concept     Google's and Twitter's of the other 20 %, never seen or named
    DIR/ATTRIBUTION.md, DIR/manifest.json, and DIR/floors.json after --floors

A caption row holds up to five captions, the name first. Question types: name ('what is this?'), kind (one of six groups
of concepts) and animal (yes or no, as many of one as of the other in every split).
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxpeft import images, metrics
from jaxpeft.datasets.emoji_words import SPLITS, concepts, split_rows

MOST_BYTES = 64 << 20  # of a member of a package
SIZE = 64  # two of the four styles come in it
CLDR, CLDR_VERSION = "cldr-annotations-full", "48.2.0"
PACKAGES = {  # style: package, version, and where it keeps a picture, given its code points in lower or upper case
    "google": ("emoji-datasource-google", "16.0.0", "package/img/google/64/{lower}.png"),
    "twitter": ("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/{lower}.png"),
    "fluent": ("@lobehub/fluent-emoji-flat", "1.1.0", "package/assets/{lower}.svg"),
    "openmoji": ("openmoji", "17.0.0", "package/color/svg/{upper}.svg"),
}
_VERSION = 1  # raise it when the same packages give other files

ATTRIBUTION = f"""# Where these pictures and words come from

Every picture was composited on white and brought to {SIZE}x{SIZE} pixels; nothing else was changed. Captions, questions
and answers were made by rule from the names and keywords of Unicode CLDR and the short names of emoji-datasource.

| here | work | licence |
|---|---|---|
| google/ | Noto Emoji, by Google | Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0 |
| twitter/ | Twemoji, by Twitter, Inc and other contributors | CC BY 4.0, https://creativecommons.org/licenses/by/4.0/ |
| fluent/ | Fluent Emoji (flat), by Microsoft | MIT |
| openmoji/ | OpenMoji, by the OpenMoji project | CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/ |
| names, keywords | Unicode CLDR, by Unicode, Inc. | Unicode-3.0, https://www.unicode.org/license.txt |
| short names, groups | emoji-datasource, by Cal Henderson | MIT |

The pictures below openmoji/ stay under CC BY-SA 4.0: who passes them on, changed or not, keeps that licence.
"""


# Packages


def npm_pack(name: str, version: str, work: Path) -> Path:
    """The tarball of a package of exactly this version in `work`, fetched by npm unless it is there."""
    path = work / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"  # npm's own way to name it
    if path.exists():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm, which fetches {name}@{version}, is missing: install Node.js, or put {path.name} in {work}"
        )
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as temporary:  # a killed fetch leaves nothing that looks like a package
        command = ["npm", "pack", f"{name}@{version}", "--ignore-scripts", "--silent", "--pack-destination", temporary]
        done = subprocess.run([npm, *command[1:]], capture_output=True, text=True)
        packed = list(Path(temporary).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            reason = (done.stderr or done.stdout).strip()[-500:] or "npm wrote no package"
            raise ValueError(f"could not fetch {name}@{version} by `{' '.join(command[:-2])}`: {reason}")
        os.replace(packed[0], path)
    return path


def read_members(path: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """{name: bytes} of the members of a .tgz that are wanted and there, in one pass; the rest is not unpacked."""
    wanted = frozenset(wanted)
    try:
        with tarfile.open(path, "r|gz") as archive:
            found = {}
            for member in archive:
                if member.name in wanted and member.isfile():
                    if member.size > MOST_BYTES:
                        raise ValueError(f"{path}: {member.name} has {member.size:,} bytes, more than {MOST_BYTES:,}")
                    found[member.name] = archive.extractfile(member).read()
            return found
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"cannot read the package {path}: {error}; delete it and run again") from error


def _json_member(path: Path, name: str):
    found = read_members(path, [name])
    if name not in found:
        raise ValueError(f"{path} has no {name}; is it the package that its name says? Delete it and run again")
    return json.loads(found[name])


def style_pictures(path: Path, template: str, codes: Iterable[str]) -> dict[str, bytes]:
    """{code: bytes of its PNG or SVG}; packages differ in whether a file's name keeps the variation selectors."""
    spelled = {
        code: [template.format(lower=one, upper=one.upper()) for one in (code, code.replace("-fe0f", ""))]
        for code in codes
    }
    found = read_members(path, (name for names in spelled.values() for name in names))
    there = {code: [found[name] for name in names if name in found] for code, names in spelled.items()}
    return {code: pictures[0] for code, pictures in there.items() if pictures}


def rasterise(svg: bytes) -> bytes:
    """SVG -> PNG of SIZE x SIZE on white."""
    import resvg_py

    options = {"width": SIZE, "height": SIZE, "background": "#ffffff", "skip_system_fonts": True}
    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), **options))


def to_png(data: bytes, name: str, svg: bool) -> bytes:
    """The bytes of a picture as packaged -> those of an RGB PNG of SIZE x SIZE on white."""
    image_YXC = images.resize(images.decode(rasterise(data) if svg else data, name=name), SIZE)
    buffer = io.BytesIO()
    Image.fromarray(image_YXC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# The directory


def build(out, work=None, seed: int = 0, fetch: Callable[[str, str, Path], Path] = npm_pack, log=print) -> dict:
    """Make the directory `out`, unless it is there and whole -> its manifest.

    Everything is written into a directory beside `out`, which is renamed at the end. Raises ValueError when npm or
    resvg-py is missing, a package cannot be fetched or read, or `out` holds something else. `fetch(package, version,
    work)` gives the path of a tarball.
    """
    out, work = Path(out).expanduser(), Path(work or "~/.cache/jaxpeft/emoji").expanduser()
    packages = {name: version for name, version, _ in PACKAGES.values()} | {CLDR: CLDR_VERSION}
    recipe = {"version": _VERSION, "seed": seed, "size": SIZE, "packages": packages}
    if (manifest := _existing(out, recipe)) is not None:
        return manifest
    if importlib.util.find_spec("resvg_py") is None:
        raise ValueError("resvg-py is not installed, and two styles are SVG: pip install 'jaxpeft[emoji]'")
    tarballs = {name: fetch(name, version, work) for name, version in packages.items()}
    log(f"packages are in {work}; reading them")
    words = _json_member(tarballs[CLDR], "package/annotations/en/annotations.json")["annotations"]["annotations"]
    found = concepts(_json_member(tarballs[PACKAGES["google"][0]], "package/emoji.json"), words)
    drawn = {s: style_pictures(tarballs[p], at, [one.code for one in found]) for s, (p, _, at) in PACKAGES.items()}
    found = [one for one in found if all(one.code in pictures for pictures in drawn.values())]
    if not found:
        raise ValueError(f"no concept has a picture in all of {', '.join(PACKAGES)}; delete the packages in {work}")
    log(f"{len(found):,} concepts are in all {len(PACKAGES)} styles; drawing them at {SIZE}x{SIZE}")
    rows = split_rows(found, seed)
    files = {f"annotations/{s}.jsonl": "".join(json.dumps(r) + "\n" for r in rows[s]).encode() for s in SPLITS}
    for style, (_, _, at) in PACKAGES.items():
        pictures = {f"{style}/{one.code}.png": drawn[style][one.code] for one in found}
        files |= {name: to_png(data, name, at.endswith(".svg")) for name, data in pictures.items()}
    files["ATTRIBUTION.md"] = ATTRIBUTION.encode()
    digest = hashlib.sha256(b"".join(name.encode() + hashlib.sha256(files[name]).digest() for name in sorted(files)))
    counts = {split: _count(rows[split]) for split in SPLITS}
    manifest = {"recipe": recipe, "concepts": len(found), "splits": counts, "digest": digest.hexdigest()[:16]}
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    _write(out, files)
    return manifest


def _existing(out: Path, recipe: dict) -> dict | None:
    """The manifest of a finished directory of this recipe; None if `out` is free; ValueError if it is another."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    path = out / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {}
    if manifest.get("recipe") != recipe:
        was = manifest.get("recipe", "no emoji data")
        raise ValueError(f"{out} holds {was}, not {recipe}; remove it or give another --out")
    return manifest


def _count(rows: list[dict]) -> dict[str, int]:
    kinds = [row.get("type", "pictures") for row in rows]
    counts = {kind: kinds.count(kind) for kind in ("pictures", "name", "kind", "animal")}
    return counts | {"captions": sum(len(row.get("caption", ())) for row in rows)}


def _write(out: Path, files: dict[str, bytes]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)
        temporary.chmod(0o755)  # mkdtemp's is for its maker alone
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Floors


def floors(out) -> dict:
    """What the nearest training picture in pixels scores on each other split; also written to floors.json.

    {split: {'name', 'kind', 'animal': {'nearest_64', 'nearest_16', 'majority', 'n'}, 'captions': {'nearest_64',
    'nearest_16', 'own_name'}}}: the pictures are compared at 64 and at 16 pixels, which is harder to beat. Accuracies
    are shares of exact matches; `majority` is the most frequent training answer. The caption given is the name, and
    `own_name` scores the true one: about what a model reaches that knows everything and says no more.
    """
    from jaxpeft.data import most_common
    from jaxpeft.datasets import folder

    out = Path(out).expanduser()
    rows = {split: folder.parse({split: f"annotations/{split}.jsonl"}, out)[0] for split in SPLITS}
    pixels = {size: {split: _pixels(out, rows[split], size) for split in SPLITS} for size in (SIZE, SIZE // 4)}
    answers = {(s, kind): _answers(rows[s], kind) for s in SPLITS for kind in ("name", "kind", "animal")}
    report: dict[str, dict] = {split: {} for split in SPLITS[1:]}
    for (split, kind), truth in answers.items():
        if split == "train" or not truth:
            continue
        known, right = answers["train", kind], list(truth.values())
        share = {"majority": _share([most_common(known.values())] * len(right), right), "n": len(right)}
        for size, of in pixels.items():
            near = _nearest(of[split][list(truth)], of["train"][list(known)])
            share[f"nearest_{size}"] = _share([list(known.values())[i] for i in near], right)
        report[split][kind] = share
    for split, scores in report.items():
        said = {f"nearest_{size}": _nearest(of[split], of["train"]) for size, of in pixels.items()}
        said = {label: [rows["train"][i] for i in near] for label, near in said.items()} | {"own_name": rows[split]}
        references = {row["image_id"]: row["captions"] for row in rows[split]}
        scores["captions"] = {
            label: metrics.captions_report(
                dict(zip(references, (row["captions"][0] for row in them), strict=True)), references
            )
            for label, them in said.items()
        }
    temporary = out / f".floors.{os.getpid()}"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, out / "floors.json")
    return report


def _share(guesses: list[str], right: list[str]) -> float:
    return sum(map(str.__eq__, guesses, right)) / len(right)


def _answers(rows: list[dict], kind: str) -> dict[int, str]:
    return {i: q["answers"][0] for i, row in enumerate(rows) for q in row["questions"] if q["type"] == kind}


def _pixels(out: Path, rows: list[dict], size: int) -> np.ndarray:
    """(n, size * size * 3) float32 in 0..1."""
    pictures = [images.resize(images.decode(out / row["file"]), size) for row in rows]
    return np.stack(pictures).reshape(len(rows), -1).astype(np.float32) / 255


def _nearest(query_ND: np.ndarray, known_KD: np.ndarray) -> np.ndarray:
    """(N,) index of the known picture with the smallest Euclidean distance; the first of equals."""
    return np.argmin((known_KD**2).sum(1)[None, :] - 2 * query_ND @ known_KD.T, axis=1)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the directory to make")
    parser.add_argument("--work", help="where the packages are kept, default ~/.cache/jaxpeft/emoji")
    parser.add_argument("--seed", type=int, default=0, help="of the division into splits")
    parser.add_argument("--floors", action="store_true", help="compute the nearest-neighbour floors too")
    options = parser.parse_args(arguments)
    try:
        manifest = build(options.out, options.work, options.seed)
        print(f"{options.out}: {manifest['concepts']:,} concepts, digest {manifest['digest']}")
        for split, counts in manifest["splits"].items():
            print(f"  {split:16}" + "".join(f"{n:6,} {what}" for what, n in counts.items()))
        for split, scores in (floors(options.out) if options.floors else {}).items():
            print(f"floors of {split}")
            for kind, one in scores.items():
                one = {label: value["cider_d"] if kind == "captions" else value for label, value in one.items()}
                print(f"  {kind:16}" + "".join(f"  {label} {value:.4g}" for label, value in one.items()))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
