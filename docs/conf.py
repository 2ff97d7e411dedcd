"""How Sphinx builds the pages: `make docs`. Every warning is an error there, an unknown reference too."""

from __future__ import annotations

import re
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import losses_page
import vision_table

project = "distill"
copyright = "The distill developers"
extensions = [
    "myst_parser",  # the pages are Markdown
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings have Google's sections
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["results/**"]

html_theme = "pydata_sphinx_theme"
html_title = "distill"
addresses = (line.split(", ") for line in metadata("distill").get_all("Project-URL", []))  # of pyproject.toml
html_baseurl = dict(addresses).get("Documentation", "")
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_show_sourcelink = False
html_copy_source = False
html_domain_indices = False  # the list of two modules; all names have a page
html_theme_options = {
    "logo": {"text": "distill"},
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
highlight_language = "none"  # what a command prints is no Python
copybutton_prompt_text = ">>> "

myst_heading_anchors = 3
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"(?s)(?!distill\.).*"),  # code in docstrings that is no name of ours
    ("py:obj", r"distill\.losses"),  # the group of entry points
    ("py:class", r"Tensor|(torch|nn|collections|os)\..*"),  # without their inventories
    ("py:.*", r"distill\.(\w+\.)*_.*"),  # private names, in signatures
]
default_role = "py:obj"  # `code` in a docstring is a link where it is a public name
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
napoleon_custom_sections = ["Reference"]
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes are described once, in the class
maximum_signature_line_length = 85
toc_object_entries_show_parents = "hide"

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "transformers": "https://huggingface.co/docs/transformers/main/en/",
}
FOR_THE_DISTILLER = {"check_models", "check_seen", "extra_repr", "per_sample", "values", "whole"}


def setup(app: Any) -> None:
    """Connect what changes pages and docstrings while Sphinx reads them."""
    nn.Module.__module__ = "torch.nn"  # where torch's own pages have it
    app.connect("config-inited", find_inventories)
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", mark_formulas, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", lambda *event: own_signature(event[3], event[5]))
    app.connect("html-page-context", shorten_contents, priority=400)  # before the theme
    app.connect("autodoc-skip-member", lambda *event: skipped(event[2], event[3]) or None)


def own_signature(value: object, arguments: str | None) -> tuple[str, None] | None:
    """The signature of a module without options, which inherits `(*args, **kwargs)`."""
    return ("()", None) if isinstance(value, type) and (arguments or "").startswith("(*args:") else None


def skipped(name: str, value: object) -> bool:
    """Whether a member has no entry: it is for the Distiller, or a field that its class describes."""
    return name in FOR_THE_DISTILLER or (getattr(value, "__doc__", None) or "").startswith("Alias for field number")


def shorten_contents(_app: Any, page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Give the contents beside a page of reference one line a loss or class; that of the one in view unfolds."""
    if page.startswith(("losses/", "distiller-reference")):
        context["theme_show_toc_level"] = 1


def fill_in(_app: Any, _page: str, source: list[str]) -> None:
    """Put what is generated where a page has its marks."""
    source[0] = vision_table.fill(losses_page.fill(source[0]))


def find_inventories(app: Any, config: Any) -> None:
    """Fetch the lists of other projects' names, to link to their pages; without a network there are no such links."""
    config.intersphinx_mapping = {}
    for name, url in INVENTORIES.items():
        try:
            with urlopen(f"{url}objects.inv", timeout=3) as answer:
                inventory = answer.read()
        except OSError:
            continue
        file = Path(app.doctreedir) / f"{name}.inv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(inventory)
        config.intersphinx_mapping[name] = (url, str(file))


def mark_formulas(_app: Any, _kind: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Keep the lines of a formula as they are: an indented block under a paragraph, not under a section's name."""
    under, before, inside, marked = "", "", False, list[str]()
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside and not before and not re.match(r"\w+:$|[-\s]", under):
            marked += [".. code-block:: text", ""]
            inside = True
        elif line and not indented:
            inside = False
        under, before = line or under, line
        marked.append(line if inside or ">>>" in line else re.sub(r"(?<= )\|(?=\w)", r"\|", line))  # |x| is no markup
    lines[:] = marked
