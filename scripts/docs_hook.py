"""Hook of MkDocs: replace a link that leaves ``docs/`` by the path of the file, for which the site has no page."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files of the repository that have no page on the site."""
    return _OUTSIDE.sub(r"\1 (`\2`)", markdown)
