"""How Sphinx builds the documentation: Markdown through MyST, docstrings through autodoc; `make docs` makes warnings errors."""

import inspect
import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import losa

project, author = "losa", "the losa authors"
version = release = losa.__version__
html_title = f"losa {version}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # [text](page.md#heading), as on GitHub
html_math_renderer = "mathml"  # pages need no network
default_role = "code"  # `name` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
log = logging.getLogger(__name__)


def math_inline(translator: Any, node: nodes.math) -> None:
    """A formula in the text, as MathML: browsers show it without any script."""
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def math_block(translator: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    translator.body.append(f'<div class="formula">{latex2mathml.tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def say_outside(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to the repository around docs/, which is not there where these pages are read, become their text."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", source[0])


def demand_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A public name without a docstring is a warning, and so an error."""
    if what in ("module", "class", "function", "method", "property") and not any(lines) and not inspect.isbuiltin(obj):
        log.warning("%s has no docstring", name)


def setup(app: Sphinx) -> None:
    """What is ours beside the extensions."""
    app.add_html_math_renderer("mathml", (math_inline, None), (math_block, None))
    app.connect("source-read", say_outside)
    app.connect("autodoc-process-docstring", demand_docstring)
