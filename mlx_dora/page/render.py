"""Builds the page: one HTML file that contains its style, script and data."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_dora import __version__
from mlx_dora.page.local import without_folders

_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="page"></main>
<div id="tip" role="status"></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(title: str, data: Mapping[str, Any], script: Path) -> str:
    """Return a self-contained page that needs no network.

    Args:
        title: The page's title, plain text written by us.
        data: What the page shows. The script finds it as ``data``; if it has the key
            ``provenance``, the page ends with these facts.
        script: File of JavaScript that calls ``show(html)`` of ``page.js`` once.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    # Prevents names in the data from ending the script element.
    text = text.replace("<", "\\u003c")
    style = (_HERE / "page.css").read_text("utf-8")
    code = (_HERE / "page.js").read_text("utf-8") + script.read_text("utf-8")
    return _PAGE.format(
        policy=_policy(code, style), title=title, style=style, data=text, script=code
    )


def provenance(command: Sequence[str] = ()) -> dict[str, str]:
    """Return the facts about how a page was made, without local folders.

    Args:
        command: The words of the command line, if a command makes the page.
    """
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": f"mlx_dora {__version__}",
    }
    return {**facts, "command": without_folders(command)} if command else facts


def _policy(script: str, style: str) -> str:
    """Return a content security policy that allows only the page's script and style.

    Even if a name in the data were interpreted as markup, it could neither run a script
    nor contact a server. Bars and dots need inline ``style`` attributes.
    """

    def digest(content: str) -> str:
        hashed = hashlib.sha256(content.encode()).digest()
        return f"'sha256-{base64.b64encode(hashed).decode()}'"

    return (
        f"default-src 'none'; script-src {digest(script)}; "
        f"style-src-elem {digest(style)}; style-src-attr 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
