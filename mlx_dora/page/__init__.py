"""The shell of a self-contained HTML page: style, charts, tables, policy, provenance.

A room that shows results in a browser passes its data as JSON and a script that draws
them with the functions of ``page.js``.
"""

from mlx_dora.page.local import is_local, name_of, without_folders
from mlx_dora.page.render import provenance, render_page

__all__ = ["is_local", "name_of", "provenance", "render_page", "without_folders"]
