"""Writes ``docs/cli.md`` from the commands' help: ``python -m mlx_dora.cli._docs``."""

import sys
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

import click

from mlx_dora.cli._framework import PassThrough, VerbGroup
from mlx_dora.cli._group import VERBS, group
from mlx_dora.cli._help import added_options

_HEAD = """\
# Commands

Generated from `--help` by `python -m mlx_dora.cli._docs docs/cli.md`; do not edit.

Every command is installed as `mlx_dora.VERB`; `mlx_dora VERB`,
`python -m mlx_dora VERB` and `python -m mlx_dora.VERB` do the same. Results go to
stdout; progress and warnings go to stderr.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | bad input, or a file that cannot be read or written: one line on stderr |
| 2 | wrong usage |
| 3 | `fuse --verify`: the fused model is outside the tolerance |
| 129 | stopped by SIGHUP (a closed terminal), after cleaning up |
| 130 | interrupted by Ctrl-C, after cleaning up |
| 143 | stopped by SIGTERM (`kill`, a cluster, `docker stop`), after cleaning up |

In `train`, each of these three signals finishes the step and saves first; a second
signal stops at once. `generate`, `chat` and `server` handle signals as mlx-lm does;
`server --adapter` answers the running requests first.

`~` stands for the home folder in every path, on the command line and in config files.
No command writes over, around or into its inputs, even with `--overwrite`, which
replaces only an empty folder or a folder that one of these commands made. If you work
inside an input folder (`--data .`), you may create a new folder there.

Every command has `-q` (results, warnings and errors only), `-v` (details, such as a
line for each matrix), `--log-file FILE` (appends everything, with times) and
`--version`. A terminal gets lines of its width, a pipe whole lines. `--json FILE`
writes the results as JSON, and `--json -` writes them to stdout, which then gets
nothing else; an existing file is replaced only with `--overwrite`. In JSON, a number
that is not finite is null.

The shell completes commands, options, choices, files and folders, for example in bash:

```
eval "$(_MLX_DORA_COMPLETE=bash_source mlx_dora)"
eval "$(_MLX_DORA_TRAIN_COMPLETE=bash_source mlx_dora.train)"
```

In zsh it is `zsh_source`, in fish `_MLX_DORA_COMPLETE=fish_source mlx_dora | source`.
Put the lines into `~/.bashrc`, `~/.zshrc` or `~/.config/fish/config.fish` to keep
them.

A config file (`-c`) is YAML in mlx-lm's format: option names with underscores as keys,
and `lora_parameters` containing `rank`, `scale`, `dropout` and `keys`. A flag overrides
the file, and the file overrides the default; an unknown key is an error.
"""

_HOSTED = """\
{text}

The arguments are those of mlx-lm, passed on unchanged except that `~` in paths is
expanded: `mlx_dora.{verb} --help` ends with the help of the installed
`mlx_lm.{verb}`, which takes a second.
Without `--model`, the base is the one that the adapter records.

```
{examples}
```
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
    """Return the text of ``docs/cli.md``."""
    parts = [_HEAD, f"```\n{_help(group, 'mlx_dora')}\n```\n"]
    for verb in VERBS:
        command: click.Command = import_module(f"mlx_dora.cli.{verb}").command
        parts.append(f"## mlx_dora.{verb}\n")
        if isinstance(command, PassThrough):
            parts.append(
                _HOSTED.format(
                    text=cleandoc(command.help or ""),
                    verb=verb,
                    examples="\n".join(command.examples),
                )
            )
            if command.params:
                parts.append(f"Added options:\n\n```\n{added_options(command)}\n```\n")
        else:
            parts.append(f"```\n{_help(command, f'mlx_dora.{verb}')}\n```\n")
        if isinstance(command, VerbGroup):
            for name, subcommand in command.commands.items():
                parts.append(f"### mlx_dora.{verb} {name}\n")
                parts.append(
                    f"```\n{_help(subcommand, f'mlx_dora.{verb} {name}')}\n```\n"
                )
    return "\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(render(), encoding="utf-8")
    else:
        click.echo(render(), nl=False)
