"""Caption scores as in published tables: PTB tokens and METEOR, by the Java programs that pycocoevalcap includes.

Optional: `pip install -e '.[coco]'` and a Java runtime (8 or later). SPICE is left out: it downloads a parser on first use
and does not run on Java 17; pycocoevalcap's `Spice` on Java 8 or 11 reads the files that `upload` writes.
"""

import contextlib
import io
import shutil

from jaxpeft.metrics import captions


def missing() -> str:
    """A message about what is not installed, or ''."""
    try:
        import pycocoevalcap.meteor.meteor
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ImportError:
        return "pycocoevalcap is not installed"
    return "" if shutil.which("java") else "java is not installed"


def captions_report(predictions: captions.Predictions, references: captions.References) -> dict:
    """`metrics.captions_report` on PTB tokens, with 'meteor'; 'tokenizer' is the tokeniser that was used.

    Where something is not installed, it is the approximate one of `metrics`, and 'skipped' gives the reason.
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
            # pycocoevalcap replaces \n only, but Java also ends a line at \r, which would shift all later captions
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
        with scorer.meteor_p as process:  # pycocoevalcap leaves its end to the garbage collector
            process.kill()
    return report | {"tokenizer": "ptb"}
