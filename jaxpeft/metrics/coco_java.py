"""Caption scores as published tables have them: PTB tokens and METEOR, by the Java programs that pycocoevalcap brings.

Optional: `pip install -e '.[coco]'` and a Java runtime (8 or later). SPICE is left out: it downloads a parser at its first
use and does not run on Java 17; pycocoevalcap's `Spice` on Java 8 or 11 takes the files that `upload` writes.
"""

import contextlib
import io
import shutil

from jaxpeft.metrics import captions


def missing() -> str:
    """What is not installed, or ''."""
    try:
        import pycocoevalcap.meteor.meteor
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ImportError:
        return "pycocoevalcap is not installed"
    return "" if shutil.which("java") else "java is not installed"


def captions_report(predictions: captions.Predictions, references: captions.References) -> dict:
    """`metrics.captions_report` over PTB tokens, with 'meteor'; 'tokenizer' and 'skipped' say how it was scored.

    Where something is not installed, the approximate tokeniser of `metrics` is used and 'skipped' says why.
    """
    if why := missing():
        return captions.captions_report(predictions, references) | {
            "tokenizer": "approximate",
            "skipped": {"meteor": why},
        }
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(groups):
        with contextlib.redirect_stdout(io.StringIO()):
            # pycocoevalcap replaces \n only; at \r Java ends a line too, and all later captions would be shifted
            return PTBTokenizer().tokenize(
                {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in groups.items()}
            )

    ours, theirs = tokens({key: [text] for key, text in predictions.items()}), tokens(references)
    flat = {key: texts[0] for key, texts in ours.items()}
    report = captions.captions_report(flat, theirs, tokenizer=str)
    scorer = Meteor()
    try:
        report["meteor"] = float(scorer.compute_score(theirs, ours)[0])
    finally:
        _close(scorer)
    return report | {"tokenizer": "ptb"}


def _close(scorer):
    """Meteor leaves its process to the garbage collector."""
    process = scorer.meteor_p
    process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
    process.wait()
