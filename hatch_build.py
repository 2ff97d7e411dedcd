"""The README as package indexes show it: relative links lead to the addresses in `[project.urls]`, once they exist."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute(text: str, urls: Mapping[str, str]) -> str:
    """Make the links of a text absolute: a page of docs/ on the built site, another file in the repository.

    Args:
        text: The text, in Markdown.
        urls: `Documentation` and `Repository`; without them the text stays as it is.
    """
    if not urls:
        return text
    site, repository = urls["Documentation"].rstrip("/"), urls["Repository"].rstrip("/")
    text = re.sub(r"\]\(docs/([\w/-]+)\.md(#[\w-]+)?\)", rf"]({site}/\1.html\2)", text)
    return re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", rf"]({repository}/blob/HEAD/\1)", text)


class ReadmeHook(MetadataHookInterface):
    """Gives hatchling the README."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`, which pyproject.toml declares as dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata.get("urls", {}))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
