"""The documentation site: `make docs` builds it in build/docs.

The repository's Markdown is the site. Sources are read from the repository's root, so that a link between README.md,
docs/ and benchmarks/ leads to the same page here and where the files are browsed. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
# In a docstring: what stands between backticks and bullets, which stay, or a sign that would be markup.
MARKUP = re.compile(r"(?P<name>`+[^`]*`+|^\s*\* )|[*|]|(?<=\w)_(?!\w)")
# The sidebar: what somebody new wants first, what somebody who measures wants last.
SIDEBAR = {
    "Daily use": ["docs/start", "docs/your_images", "docs/looking", "docs/recipes", "docs/hub"],
    "The zoo": ["docs/models", "docs/families", "docs/converting"],
    "PETRA": ["docs/engine", "docs/processes", "docs/cluster", "docs/extending", "docs/reliability"],
    "What was measured": ["docs/evidence", "docs/gpu", "benchmarks/README", "benchmarks/*/README"],
    "Reference": ["docs/settings", "docs/api", "CONTRIBUTING", "CHANGELOG"],
}

project = "petra-zoo"
project_copyright = "the petra-zoo authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [f"{page}.md" for pages in ([root_doc], *SIDEBAR.values()) for page in pages]
exclude_patterns = [".*", "build", "dist", "runs"]  # not walked through in search of pages

myst_heading_anchors = 4  # links to headings, by the names that they have where the files are browsed

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
default_role = "literal"  # docstrings write `name`
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "petra-zoo"
html_copy_source = False
html_static_path, html_css_files = ["static"], ["site.css"]
html_show_sphinx = False
highlight_language = "text"  # of diagrams and of what is typed
pygments_style, pygments_dark_style = "friendly", "monokai"


def add_sidebar(app: Sphinx, page: str, text: list[str]) -> None:
    """Behind the README, which is the first page and says nothing of this site where it is browsed as a file."""
    if page == root_doc:
        for caption, pages in SIDEBAR.items():
            entries = "\n".join(f"/{entry}" for entry in pages)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{entries}\n```\n"


def take_as_plain(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `names`: their products, norms and bars are no markup."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = MARKUP.sub(lambda found: found["name"] or f"\\{found[0]}", line)


def name_first_page(app: Sphinx, error: Exception | None) -> None:
    """What a server shows for the folder is the first page."""
    if error is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_sidebar)
    app.connect("autodoc-process-docstring", take_as_plain, priority=400)  # before napoleon writes markup
    app.connect("build-finished", name_first_page)
