"""Build hook: what a package index shows, with the address of the repository.

A hosted build knows the address (`GITHUB_SERVER_URL`, `GITHUB_REPOSITORY`). The hook
then adds the project's links to the metadata and makes the README's relative links
absolute, since an index has no files beside it. Elsewhere both stay as they are.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """Fills in the fields `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the two fields to the project's metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository := os.environ.get("GITHUB_REPOSITORY"):
            server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
            home = f"{server}/{repository}"
            ref = os.environ.get("GITHUB_REF_NAME", "main")
            text = absolute(text, home, ref)
            metadata["urls"] = {
                "Homepage": home,
                "Documentation": f"{home}/blob/{ref}/docs/README.md",
                "Changelog": f"{home}/blob/{ref}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, home: str, ref: str) -> str:
    """Return Markdown whose relative links lead to files of a repository."""

    def point(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        kind = "raw" if image else "blob"
        return f"{image}[{label}]({home}/{kind}/{ref}/{target})"

    return LINK.sub(point, text)
