"""Options of the server of several adapters."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, option

_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,199}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the server of several adapters serves, and its limits."""

    adapter: tuple[str, ...] = option(
        (),
        help="Serve an adapter under a name: NAME=FOLDER. Give it once for each "
        'adapter; requests choose with "model": NAME.',
        multiple=True,
        metavar="NAME=FOLDER",
    )
    adapter_root: str | None = option(
        None,
        help="Folder that holds the adapters (without --adapter also the models) that "
        "requests may name.",
        path="local",
        metavar="DIR",
    )
    max_adapters: int = option(
        16, help="Adapters that may be loaded at a time.", least=1
    )
    max_body: int = option(
        8 * 10**6, help="Largest body of a request.", least=1, unit="bytes"
    )
    max_prompt_tokens: int = option(
        8192, help="Longest prompt of a request, in tokens.", least=1
    )
    max_new_tokens: int = option(
        4096, help="Most tokens that a request may generate.", least=1
    )
    max_queue: int = option(
        128,
        help="Requests that may wait while --decode-concurrency others run; more are "
        "answered 429.",
        least=0,
    )
    drain_seconds: float = option(
        30.0,
        help="Seconds that running requests have to finish after SIGTERM or Ctrl-C.",
        least=0,
    )

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            DoRAError: Names the option, the allowed values and the value received.
        """
        check_options(self)
        self.folders()
        root = self.root()
        if root is not None and not root.is_dir():
            raise DoRAError(f"--adapter-root {self.adapter_root} is not a folder.")

    def root(self) -> Path | None:
        """Return the folder of `adapter_root`."""
        return (
            None if self.adapter_root is None else Path(self.adapter_root).expanduser()
        )

    def folders(self) -> dict[str, Path]:
        """Return the adapters' folders by name.

        Raises:
            DoRAError: If an entry is not NAME=FOLDER, or a name stands twice.
        """
        folders: dict[str, Path] = {}
        for entry in self.adapter:
            name, equals, folder = entry.partition("=")
            if not equals or not folder:
                raise DoRAError(
                    f"--adapter must be NAME=FOLDER, got {entry!r:.200}; give it once "
                    "for each adapter."
                )
            check_name(name)
            if name in folders:
                raise DoRAError(f"--adapter names {name!r} twice.")
            folders[name] = Path(folder).expanduser()
        if len(folders) > self.max_adapters:
            raise DoRAError(
                f"--adapter names {len(folders)} adapters; --max-adapters allows "
                f"{self.max_adapters}."
            )
        return folders


def check_name(name: object) -> str:
    """Return the name of an adapter.

    Raises:
        DoRAError: If it is not a name of up to 200 letters, digits and ``_.:/-``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DoRAError(
            "an adapter's name must have 1 to 200 letters, digits or any of _.:/- and "
            f"start with a letter or digit, got {name!r:.100}."
        )
    return name
