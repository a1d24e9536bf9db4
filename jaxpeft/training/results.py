"""The results of a run: metrics during training, a table on the terminal, and a gallery of test images."""

import contextlib
import hashlib
import json
import resource
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxpeft.runtime import files, registry, text
from jaxpeft.training import boards

PACKAGE = Path(__file__).parents[1]
APART = ("apps", "configs", "study")  # folders that a run's numbers do not depend on; its config is compared separately


class Metrics:
    """Writer of metrics.jsonl, a line per record, continued by a resumed run; also of the run's boards (boards.py).

    Of several processes only the first one writes. Lines that cannot be written (a full disk) are kept for the next try, so
    that training can continue.
    """

    def __init__(self, workdir: Path, start: int, log: Callable[[str], object] = print) -> None:
        self._path, self._log = workdir / "metrics.jsonl", log
        self._waiting, self._size, self._failing = "", 0, False  # `_size`: bytes of the file's complete lines
        self._boards = boards.Boards(workdir, start, log)
        if jax.process_index() > 0:
            return
        if self._path.exists():  # a killed run may have logged steps that it never saved; they will be logged again
            lines = self._path.read_text().splitlines() if start else []
            kept = [line for line in lines if _step_of(line) <= start]
            files.write_text(self._path, "".join(line + "\n" for line in kept))
            self._size = self._path.stat().st_size

    def write(self, step: int, **values: Any) -> None:
        if jax.process_index() > 0:
            return
        self._waiting += json.dumps({"step": step, **values}) + "\n"
        self._flush()
        self._boards.scalars(step, values)

    def _flush(self) -> None:
        raw = self._waiting.encode()
        try:
            with self._path.open("ab") as file:
                file.truncate(self._size)  # remove the partial line of a failed write
                file.write(raw)
        except OSError as error:
            if not self._failing:
                self._log(f"{self._path} cannot be written ({error.strerror}); training continues, its lines are kept")
            self._failing = True
            return
        self._waiting, self._size, self._failing = "", self._size + len(raw), False

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._boards.close()


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed run
        return sys.maxsize


def _package_code() -> dict[str, str]:
    """Path of a Python file of the package, except those in APART -> sha256."""
    paths = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    return {
        name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items() if name.parts[0] not in APART
    }  # fmt: skip


_PACKAGE_CODE = _package_code()  # computed at import: files that are edited later are not what this process runs


def code() -> str:
    """A short digest of the code that this process runs: the package's Python files except study/, apps/ and configs/, and
    the modules of --imports. Runs with the same config and the same code can be compared."""
    value = json.dumps(_PACKAGE_CODE | registry.digests, sort_keys=True)
    return hashlib.sha256(value.encode()).hexdigest()[:12]


def memory() -> dict:
    """Peak memory so far, in bytes: of the process, and of the first device if it reports it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = jax.local_devices()[0].memory_stats() or {}
    return {"host_peak_bytes": peak, "device_peak_bytes": device.get("peak_bytes_in_use")}


def validation(workdir: Path, split: str, timing: dict, worth: dict | None) -> dict:
    """The validation part of a result: the loss at the first, the best, the kept and the last step, from metrics.jsonl, and
    the 'curve' of all pairs [step, loss].

    `timing` is that of `loop.fit`, `worth` the result of `evaluate.worth_of_images` at the best step.
    """
    path, curve = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError):  # other records, and lines that a full disk cut off
            row = json.loads(line)
            curve.append((row["step"], row["validation_loss"]))
    (first_step, first), (last_step, last) = (curve[0], curve[-1]) if curve else ((0, None), (timing["steps"], None))
    step = timing["kept_step"]
    best = {"best_step": step, "best": dict(curve).get(step, timing["validation_loss"])}
    kept = {"kept_step": step, "kept": best["best"]}  # step 0 replaces it if the best step turns out to be of no use
    return (
        {"split": split, "first_step": first_step, "first": first}
        | best
        | kept
        | {"last_step": last_step, "last": last, "stopped": timing["stopped"], "images": worth}
        | {"curve": [[at, round(loss, 6)] for at, loss in curve]}
    )


def _validation(said: dict) -> list[str]:
    """The lines of `table` about validation."""
    if said["first"] is None:
        return []
    notes = {step: [] for step in (said["first_step"], said["best_step"], said["last_step"])}
    if said["kept_step"] in notes:
        notes[said["kept_step"]].append("kept")
    notes[said["last_step"]].append("last; stopped early" if said["stopped"] == "plateau" else "last")
    loss = {said["first_step"]: said["first"], said["best_step"]: said["best"], said["last_step"]: said["last"]}
    named = [f"{loss[n]:.3f} at step {n:,}" + (f" ({', '.join(note)})" if note else "") for n, note in notes.items()]
    lines = [f"{said['split']}: nll {', '.join(named)}"]
    if worth := said["images"]:
        lines.append(
            f"{said['split']}: on average a text is {worth['gain']:.3f} nats more likely with its own image than with "
            f"another (95 % lower bound {worth['least']:.3f}, {worth['n']} images)"
        )
    return lines


def _differences(split: str, scores: dict, metric: str) -> str:
    """The line of `table` with the intervals."""
    known = scores["intervals"]
    blind = max(scores["blind"], key=lambda label: scores["blind"][label][metric])
    names = {"blind": LABELS.get(blind, blind), "text_only": LABELS["text_only"], "base": LABELS["base"]}
    value, low, high = known["tuned"]
    parts = [f"tuned {value:.3f} [{low:.3f}, {high:.3f}]"]
    for other, name in names.items():
        if found := known.get(f"tuned - {other}"):
            value, low, high = found
            parts.append(f"{value:+.3f} [{low:+.3f}, {high:+.3f}] over {name}")
    return f"{split}, {metric}, 95 % intervals over images: " + "; ".join(parts)


def table(result: dict) -> str:
    """The closing table of a run: blind baselines, the frozen base and the tuned model, on each evaluated split."""
    name, counts, timing = result["main_metric"], result["counts"], result["timing"]
    more = result.get("task_options", {}).get("metrics", ())
    lines = []
    for split, scores in result["metrics"].items():
        if not scores.get("scored", True):
            lines += [
                f"{split} (n = {scores['n']}): no answers to score with; upload_{split}.json is for the server",
                "",
            ]
            continue
        rows = [(label, score) for label, score in scores["blind"].items()]
        rows += [("perfect_writer", scores["perfect_writer"])] if "perfect_writer" in scores else []
        rows += [(label, scores[label]) for label in ("base", "text_only", "tuned") if label in scores]
        kinds = sorted({kind for _, score in rows for kind in score.get("by_type", {})})
        kinds = [] if kinds == [""] else kinds  # questions without types
        header = [
            "",
            name,
            *more,
            *(kind or "(no type)" for kind in kinds),
            *(["nll"] if any("nll" in score for _, score in rows) else []),
        ]
        body = []
        for label, score in rows:
            cells = [f"{score[one]:.3f}" for one in (name, *more)]
            cells += [f"{score['by_type'][kind]['accuracy']:.3f}" for kind in kinds]
            cells += [f"{score['nll']:.3f}" if "nll" in score else "-"] if header[-1] == "nll" else []
            body.append([LABELS.get(label, label), *cells])
        lines += [f"{split} (n = {scores['n']})", *(f"  {line}" for line in text.aligned([header, *body]))]
        lines += [_differences(split, scores, name)] if "intervals" in scores else []
        lines.append("")
    if result.get("validation"):
        lines += [*_validation(result["validation"]), ""]
    share = 100 * counts["tuned"] / counts["total"]
    lines.append(
        f"tuned {counts['tuned']:,} of {counts['total']:,} base parameters ({share:.2f} %), stored {counts['stored']:,}"
    )
    lines.append(
        f"{timing['total_s']:.0f} s in all: compile {timing['compile_s']:.1f} s, "
        f"{timing['steps']} steps of {1000 * timing['step_s']:.1f} ms, evaluation {timing['eval_s']:.1f} s"
    )
    return "\n".join(lines)


LABELS = {
    "majority": "blind: majority",
    "question_only": "blind: question only",
    "constant_caption": "blind: one caption",
    "best_caption": "blind: best caption",
    "perfect_writer": "perfect writer",
    "base": "frozen base",
    "text_only": "tuned, no picture",
    "tuned": "tuned",
}


def gallery(path: Path, cases: list[dict], columns: int = 4) -> None:
    """Write a PNG of images with the question, the truth, and the texts generated before and after tuning.

    A case is {'image': uint8 image_YXC, 'lines': [(label, text), ...]}.
    """
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(cases))
    rows = -(-len(cases) // columns)
    titles = ["\n".join(_filled(f"{label}: {said}") for label, said in case["lines"]) for case in cases]
    most_lines = max(title.count("\n") + 1 for title in titles)
    figure = Figure(figsize=(3.4 * columns, (2.7 + 0.14 * most_lines) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    # letters that DejaVu lacks are taken from the installed Noto fonts
    others = sorted(name for name in font_manager.get_font_names() if name.startswith("Noto Sans"))
    fonts = ["DejaVu Sans Mono", "DejaVu Sans", *others]
    for case, title, axes in zip(cases, titles, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
        axes.imshow(case["image"], interpolation="nearest")
        axes.set_title(title, fontsize=7.5, loc="left", family=fonts, parse_math=False)  # "$5 or $6" is not a formula
        axes.set_anchor("SW")  # keeps an image that is small because of a long text below that text
    for axes in figure.axes:
        axes.set_axis_off()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn where no font has a letter
        figure.savefig(path, dpi=110, bbox_inches="tight")


def _filled(text: str) -> str:
    """Wrap a text to at most six lines of 40 characters."""
    return textwrap.fill(text, 40, subsequent_indent="   ", max_lines=6, placeholder=" ...")
