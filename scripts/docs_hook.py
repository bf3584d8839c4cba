"""Hook of MkDocs: a link that leaves ``docs/`` becomes the path of the file, for the site has no page of it."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files of the repository that are no pages."""
    return _OUTSIDE.sub(r"\1 (`\2`)", markdown)
