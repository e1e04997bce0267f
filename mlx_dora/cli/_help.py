"""Help texts with examples and groups of options, and hints for misspelled words."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._log import GENERAL, log_options, version_option

OPTIONS = "Options"
ORDER = (
    "Common options",
    OPTIONS,
    "Data",
    "Adapter",
    "Training",
    "Preference (dpo, orpo, kto, simpo)",
    "GRPO",
    "Validation and test",
    "Saving and resuming",
    "Reports",
    "Publishing",
    "Memory",
    "Advanced",
)
"""Titles of the groups, in the order of the help; `GENERAL` is last."""

_MEANT = {
    "alpha": ("scale",),
    "bs": ("batch-size",),
    "dataset": ("data",),
    "epoch": ("epochs",),
    "lr": ("learning-rate",),
    "max-length": ("max-seq-length",),
    "max-steps": ("iters",),
    "num-epochs": ("epochs",),
    "out": ("save-path", "adapter-path", "output"),
    "output": ("save-path", "adapter-path"),
    "output-dir": ("save-path", "adapter-path", "output"),
    "save": ("save-path",),
    "steps": ("iters",),
    "target-modules": ("keys", "key"),
}
"""Other programs' names of options, and ours."""


class GroupedOption(click.Option):
    """An option that the help lists under a title of `ORDER`."""

    def __init__(self, *args: Any, group: str = OPTIONS, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


class Described(click.Command):
    """A command with the general options, grouped help and example lines.

    Args:
        examples: Command lines to show.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any):
        super().__init__(*args, **settings)
        self.examples = tuple(examples)
        self.general = [version_option()]
        if not isinstance(self, click.Group):
            self.general = [*log_options(), *self.general]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, shown_help = super().get_params(ctx)
        return [*own, *self.general, shown_help]

    def format_help_text(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    # Not wrapped, because it is there to be copied.
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in ORDER}
        groups[GENERAL] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                is_help = "--help" in param.opts or "--config" in param.opts
                title = GENERAL if is_help else getattr(param, "group", OPTIONS)
                groups[title].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


def added_options(command: click.Command) -> str:
    """Return the help of the options that a hosted command adds to its host's."""
    formatter = click.HelpFormatter(width=80)
    context = click.Context(command, show_default=True)
    records = [param.get_help_record(context) for param in command.params]
    formatter.write_dl([record for record in records if record is not None])
    return "\n".join(line.rstrip() for line in formatter.getvalue().splitlines())


def described_mistake(error: click.UsageError) -> str:
    """Return click's message with the word that was probably meant."""
    context = error.ctx
    if context is None:
        return error.format_message()
    command = context.command
    if isinstance(error, click.NoSuchOption):
        given = error.option_name
        flags = [o for param in command.get_params(context) for o in param.opts]
        near = _nearest(given, [flag for flag in flags if flag.startswith("--")])
        return f"there is no option {given}" + (
            f"; did you mean {near}?" if near else "."
        )
    message = error.format_message()
    if "unexpected extra argument" in message:
        lists = [p for p in command.params if p.type.name == "names"]
        if lists:
            message += f" Separate several names with commas: {lists[0].opts[0]} a,b."
    return message


def _nearest(given: str, flags: list[str]) -> str | None:
    meant = [f"--{name}" for name in _MEANT.get(given.lstrip("-").lower(), ())]
    for flag in meant:
        if flag in flags:
            return flag
    return next(iter(difflib.get_close_matches(given, flags, n=1, cutoff=0.7)), None)


def check_subcommand(
    context: click.Context, args: Sequence[str], names: Iterable[str]
) -> None:
    """Refuse a word that is not a subcommand, and say what may have been meant."""
    known = list(names)
    if not args or args[0].startswith("-") or args[0] in known:
        return
    near = difflib.get_close_matches(args[0], known)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
    if not near and Path(args[0]).exists():
        hint = f"put one of {', '.join(known)} before it"
    context.fail(f"no command {args[0]!r}: {hint}")
