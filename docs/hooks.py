"""What the site needs beside the pages.

The navigation lists every page of docs/results/ without naming them. Links to files of the repository outside docs/ work
both on a code host and on the site: such files are copied to `source/` there (Markdown files become pages), and the links
are changed while a page is built. A link to a directory outside docs/ becomes plain text on the site, and so do the links of
a page that is such a copy.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_config(config):
    for entry in config.nav:
        if entry.get("Results") == "results/":
            pages = sorted(path.name for path in (ROOT / "docs/results").glob("*.md") if path.name != "index.md")
            entry["Results"] = [f"results/{name}" for name in ("index.md", *pages)]
    return config


def on_files(files, config):
    for page in [*files.documentation_pages()]:
        for _, _, target in LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path and path.is_file() and not files.get_file_from_path(_copy(path)):
                files.append(File.generated(config, _copy(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri.startswith("source/"):
        return LINK.sub(lambda match: match[0] if "://" in match[3] else match[2], markdown)

    def changed(match):
        path = _outside(page.file.src_uri, match[3])
        if path is None or not path.exists():
            return match[0]  # what is missing is reported by `validation`
        if path.is_dir():
            return match[2]
        target = os.path.relpath(_copy(path), os.path.dirname(page.file.src_uri))
        return f"{match[1]}[{match[2]}]({target})"

    return LINK.sub(changed, markdown)


def _outside(src_uri, target):
    """The file of the repository that a link of a page leads to, where that is outside docs/; else None."""
    if re.match(r"\w+:|#|/", target):
        return None
    path = Path(os.path.normpath(ROOT / "docs" / Path(src_uri).parent / target.partition("#")[0]))
    inside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")
    return path if inside else None


def _copy(path):
    """Its path on the site."""
    return f"source/{path.relative_to(ROOT).as_posix()}"
