from pathlib import Path

from mlx_dora.cli._docs import render


def test_cli_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    # Compare words only, because versions of click wrap lines differently.
    assert page.read_text(encoding="utf-8").split() == render().split(), (
        "run: python -m mlx_dora.cli._docs docs/cli.md"
    )
