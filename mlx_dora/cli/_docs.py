"""Writes ``docs/cli.md`` from the commands' help: ``python -m mlx_dora.cli._docs``."""

import sys
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

import click

from mlx_dora.cli._framework import PassThrough, VerbGroup
from mlx_dora.cli._group import VERBS, group

_HEAD = """\
# Commands

Made from `--help` by `python -m mlx_dora.cli._docs docs/cli.md`; do not edit.

Every command is installed as `mlx_dora.VERB`; `mlx_dora VERB`,
`python -m mlx_dora VERB` and `python -m mlx_dora.VERB` are the same. Results go to
stdout, progress and warnings to stderr.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | bad input or a file that cannot be read or written: one line on stderr |
| 2 | wrong usage |
| 3 | `fuse --verify`: the fused model is outside the tolerance |
| 129 | stopped by SIGHUP (a closed terminal), after cleaning up |
| 130 | interrupted by Ctrl-C, after cleaning up |
| 143 | stopped by SIGTERM (`kill`, a cluster, `docker stop`), after cleaning up |

In `train`, each of these three finishes the step and saves first; a second one stops at
once. `generate`, `chat` and `server` answer signals as mlx-lm does.

`~` stands for the home folder in every path, on the command line and in config files.
No command writes over, around or into what it was given, `--overwrite` or not, and
`--overwrite` replaces only an empty folder or one that a command here has made. Working
inside an input folder (`--data .`), you may name a new folder there.

A config file (`-c`) is YAML in mlx-lm's form: option names as keys, with underscores,
and `lora_parameters` nesting `rank`, `scale`, `dropout` and `keys`. A flag beats the
file, the file beats the default; an unknown key is an error.
"""

_HOSTED = """\
{text}

The arguments are mlx-lm's, passed on untouched but for a `~` in paths:
`mlx_dora.{verb} --help` prints the help of the `mlx_lm.{verb}` that is installed.
"""


def _help(command: click.Command, name: str) -> str:
    context = click.Context(
        command,
        info_name=name,
        terminal_width=80,
        help_option_names=["-h", "--help"],
    )
    text = command.get_help(context)
    return "\n".join(line.rstrip() for line in text.splitlines())


def render() -> str:
    """The whole of ``docs/cli.md``."""
    parts = [_HEAD, f"```\n{_help(group, 'mlx_dora')}\n```\n"]
    for verb in VERBS:
        command: click.Command = import_module(f"mlx_dora.cli.{verb}").command
        parts.append(f"## mlx_dora.{verb}\n")
        if isinstance(command, PassThrough):
            parts.append(_HOSTED.format(text=cleandoc(command.help or ""), verb=verb))
        else:
            parts.append(f"```\n{_help(command, f'mlx_dora.{verb}')}\n```\n")
        if isinstance(command, VerbGroup):
            for name, one in command.commands.items():
                parts.append(f"### mlx_dora.{verb} {name}\n")
                parts.append(f"```\n{_help(one, f'mlx_dora.{verb} {name}')}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(render(), encoding="utf-8")
    else:
        click.echo(render(), nl=False)
