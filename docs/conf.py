"""The site: `python -m sphinx -W --keep-going -b html docs build/docs`. Nothing is fetched, then or by a reader."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import reference  # noqa: E402  (docs/reference.py: what the reference pages are filled with)

import undertow  # noqa: E402

project, author, copyright = "undertow", "the undertow authors", "the undertow authors, Apache-2.0"
release = version = undertow.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
suppress_warnings = ["ref.python"]  # two classes are called Task: a type in a signature may link to either
highlight_language = "text"
default_role = "code"  # docstrings write code as Markdown does, between single backticks

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"undertow {version}"
html_copy_source = False
html_show_sphinx = False


def fill(app, name, source):
    """Set what is read off the program into the pages that ask for it."""
    here = Path(__file__).parent
    source[0] = re.sub(  # `name?` in a table of contents: if there is such a page
        r"^(\w+)\?\n", lambda page: f"{page[1]}\n" if (here / f"{page[1]}.md").exists() else "", source[0], flags=re.M
    )
    source[0] = reference.filled(source[0])


def as_restructured_text(app, what, name, subject, options, lines):
    """An indented block after a line that ends in a colon is code, as in Markdown."""
    for i in range(len(lines) - 2):
        code = lines[i].endswith(":") and not lines[i + 1].strip() and lines[i + 2].startswith("    ")
        if code and not re.match(r":\w+.*:$|\.\. ", lines[i]):
            lines[i] += ":"


def setup(app):
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_restructured_text)
