"""The command line as Typer makes it: options from settings, forms of flags, errors in one line, exit codes."""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from hf_ddpm.runtime.errors import PushError, RunError, UsageError, explain_full_memory, in_one_line, without_tokens
from hf_ddpm.runtime.launch import (
    exit_with_launcher,
    is_launched,
    is_main_process,
    report_outcome,
    start_missing_processes,
    take_token_from_argv,
)
from hf_ddpm.runtime.loading import without_garbage_collection
from hf_ddpm.runtime.settings import SettingInfo, choices_of, did_you_mean, require_choice, settings_of
from hf_ddpm.runtime.signals import STOPPED, StoppedOnPurpose

# The base of all that Typer says about a wrong command line. Typer itself exports this one of its subclasses only.
_TyperUsageError: Any = typer.BadParameter.__mro__[1]


class CommandLine(TyperGroup):
    """A group of commands whose errors are one line and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command; end the process with its exit code, or return it if `standalone_mode` is off."""
        if not args and options.get("args") is None:
            options["args"] = take_token_from_argv()
        run = functools.partial(super().main, *args, standalone_mode=False, **options)
        if standalone_mode:
            # Else Python visits each object of torch and diffusers again as it ends: three seconds before the prompt.
            atexit.register(gc.freeze)
            sys.exit(report_outcome(exit_code_of(run)))
        with raise_usage_errors():
            return run()


class Command(TyperCommand):
    """A command whose help is grouped, and whose flags are taken in the forms of argparse, too.

    Those are `--x True`, `--x=false` and lists of several words. Typer's own help has no room for long names of flags.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse flags, after they were brought to the forms that Typer takes."""
        return super().parse_args(ctx, typer_forms(args, self.params))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then a section for each group of options, in the order in which the groups begin."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                title = getattr(param, "rich_help_panel", None) or default
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def exit_code_of(run: Callable[[], int | None]) -> int:
    """Run a command, print in one line what went wrong, and return the exit code.

        0     The command did what it was asked for.
        2     The command line, a file or the data cannot work.
        75    A run was stopped on purpose: a checkpoint was written, from which it can be resumed.
        130   Ctrl-C came when there was nothing to save.
        1     Anything else went wrong.

    Args:
        run: Run the command; return its exit code or None.
    """
    try:
        with raise_usage_errors():
            return run() or 0
    except StoppedOnPurpose as stop:
        if is_main_process():
            with suppress(OSError):  # whoever read it may be gone, which is why the run was stopped
                typer.echo(str(stop), err=True)
        return STOPPED
    except typer.Abort:
        return 1
    except (UsageError, RunError, PushError) as error:
        typer.echo(f"error: {without_tokens(str(error))}", err=True)
        return 2 if isinstance(error, UsageError) else 1


@contextmanager
def report_errors() -> Iterator[None]:
    """Raise what a value, the disk or the memory is to blame for as an error that ends the command with one line.

    Training does without it: a ValueError there is a fault of the program, and needs its traceback.
    """
    try:
        with explain_full_memory("Give a smaller --batch_size, or --device cpu."):
            yield
    except (UsageError, RunError, PushError):
        raise
    except ValueError as error:
        raise UsageError(in_one_line(error)) from error
    except OSError as error:
        raise RunError(in_one_line(error)) from error


@contextmanager
def raise_usage_errors() -> Iterator[None]:
    """Raise Typer's errors of usage as UsageError, each with one line of text."""
    try:
        yield
    except _TyperUsageError as error:
        raise UsageError(_explain(error)) from None


def _explain(error: Any) -> str:
    text = " ".join(error.format_message().split())
    if hasattr(error.__cause__, "errors"):  # of pydantic, by which Typer says what a value must be, and not the value
        (wrong, *_) = error.__cause__.errors()
        wanted = wrong["msg"].removeprefix("Input should be ").partition(", unable")[0]
        return f"{error.param.name} must be {wanted}, got {wrong['input']!r}"
    if type(error).__name__ != "NoSuchOption":
        return text
    options = [option for param in error.ctx.command.params for option in (*param.opts, *param.secondary_opts)]
    remedy = did_you_mean(error.option_name, options) or f"; see {error.ctx.command_path} --help"
    return f"no such option: {error.option_name}{remedy}"


def with_underscores(name: str) -> str:
    """Return the name of an option or a command as it is declared; hyphens are taken, too."""
    return name.replace("-", "_")


def typer_forms(arguments: Sequence[str], params: Sequence[Any]) -> list[str]:
    """Return command-line arguments in the forms that Typer takes.

        --use_ema False      ->  --no_use_ema
        --use_ema=true       ->  --use_ema
        --halflives 50 500   ->  --halflives 50 --halflives 500
        --compile            ->  --compile=true         where it may also be a word, as auto
        --no_compile         ->  --compile=false

    Args:
        arguments: The words after the command.
        params: The parameters of the command.
    """
    switches = {opt: param for param in params if param.secondary_opts for opt in param.opts}
    lists = {opt for param in params if param.multiple for opt in param.opts}
    # A switch that also takes a word is an option with two flags, see `_option`.
    word_switches = {opt: param for param in params if f"--no_{param.name}" in param.opts for opt in param.opts}
    words, forms = list(arguments), []
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        flag = f"--{with_underscores(flag[2:])}" if flag.startswith("--") else flag
        if flag in switches:
            if not has_value and words and words[0].lower() in ("true", "false"):
                value = words.pop(0)
            forms.append(_switch_form(flag, value, switches[flag]))
        elif flag in word_switches and flag.startswith("--no_"):
            takes_word = not has_value and words and words[0].lower() in ("true", "false")
            value = words.pop(0) if takes_word else value or "true"
            value = {"true": "false", "false": "true"}.get(value.lower(), f"no {value}")
            forms.append(f"--{word_switches[flag].name}={value}")
        elif flag in word_switches and not has_value:
            value = words.pop(0) if words and not words[0].startswith("-") else "true"
            forms.append(f"--{word_switches[flag].name}={value}")
        elif flag in lists and not has_value:
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
            forms += [part for value in values for part in (flag, value)] if values else [word]
        else:
            forms.append(word)
    return forms


def _switch_form(flag: str, value: str, param: Any) -> str:
    if value.lower() not in ("", "true", "false"):
        raise UsageError(f"{flag} must be true or false, got {value!r}")
    return param.secondary_opts[0] if value.lower() == "false" else flag


def with_options_of(
    config_type: type, names: Sequence[str] = (), without: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function for Typer: give it an option for each setting of a config.

    The function must take `**flags`: it gets the settings that were given, by name, as text, as a list of texts or,
    of a switch, as a bool.

    Args:
        config_type: A dataclass of settings.
        names: The settings that get an option; empty for all of them.
        without: Those of them that get none.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            names = {each.name for each in own}
            is_given = {name: name in names or value not in (None, [], ()) for name, value in values.items()}
            return function(**{name: value for name, value in values.items() if is_given[name]})

        options = options_of(config_type)
        chosen = [each for each in options if (each.name in names or not names) and each.name not in without]
        parameters = [*own, *chosen]
        command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def options_of(config_type: type) -> list[inspect.Parameter]:
    """Return a parameter for each setting of a config, of which Typer makes an option; None if it is not given."""
    hints = get_type_hints(config_type)
    parameters = []
    for name, default, info in settings_of(config_type):
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_option(name, hints[name], default, info),
            )
        )
    return parameters


def _option(name: str, hint: Any, default: Any, info: SettingInfo) -> Any:
    kinds = {hint, *get_args(hint)}
    common = {"help": _help(name, default, info), "rich_help_panel": info.group.capitalize(), "show_default": False}
    if True in choices_of(hint):
        choices = [str(choice).lower() for choice in choices_of(hint)]
        flags, metavar = (f"--{name}", f"--no_{name}"), f"[{'|'.join(choices)}]"
        return Annotated[
            str | None, typer.Option(*flags, metavar=metavar, autocompletion=completer(choices), **common)
        ]
    if bool in kinds:
        return Annotated[bool | None, typer.Option(f"--{name}/--no_{name}", **common)]
    if choices := [str(choice) for choice in choices_of(hint)]:
        metavar = f"[{'|'.join(['INTEGER', *choices] if int in kinds else choices)}]"
        return Annotated[
            str | None, typer.Option(f"--{name}", metavar=metavar, autocompletion=completer(choices), **common)
        ]
    if kinds & {list[float], list[int]}:
        metavar = "NUMBERS" if list[float] in kinds else "INTEGER [INTEGER]"
        return Annotated[list[str] | None, typer.Option(f"--{name}", metavar=metavar, **common)]
    metavar = "INTEGER" if int in kinds else "NUMBER" if float in kinds else "TEXT"
    return Annotated[str | None, typer.Option(f"--{name}", metavar=metavar, **common)]


def _help(name: str, default: Any, info: SettingInfo) -> str:
    if default is True:
        return f"{info.help} On by default; --no_{name} switches it off."
    if default in (None, False) or "default: " in info.help:
        return info.help
    return f"{info.help} Default: {f'{default:g}' if isinstance(default, float) else default}."


def completer(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function that completes the beginning of one of `choices` for a shell."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def option(name: str, help: str, **settings: Any) -> Any:
    """Return a Typer option whose flag is its name, with underscores."""
    return typer.Option(f"--{name}", help=help, **settings)


def choice(name: str, help: str, choices: Sequence[str], is_list: bool = False) -> Any:
    """Return a Typer option that takes one of `choices`, or several that commas separate.

    A wrong one is answered while the command line is read, before the command loads what it needs.
    """

    def check(value: str | None) -> str | None:
        for each in split_commas(value) if is_list else [] if value is None else [value]:
            require_choice(name, each, choices)
        return value

    return option(name, help, callback=check, autocompletion=completer(choices))


def switch(name: str, help: str) -> Any:
    """Return the Typer option of a bool, with one flag for each of its values."""
    return typer.Option(f"--{name}/--no_{name}", help=help, show_default=False)


def split_commas(text: str | None) -> list[str]:
    """Return the parts of a text that commas separate, without spaces around them."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def split_numbers(name: str, text: str | None) -> list[int]:
    """Return the whole numbers in a text that commas separate.

    Raises:
        UsageError: When a part is not a whole number.
    """
    parts = split_commas(text)
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{name} must be whole numbers, got {text!r}")
    return [int(part) for part in parts]


def split_decimals(name: str, text: str | None) -> list[float]:
    """Return the numbers in a text that commas separate.

    Raises:
        UsageError: When a part is not a number.
    """
    try:
        return [float(part) for part in split_commas(text)]
    except ValueError:
        raise UsageError(f"{name} must be numbers that commas separate, got {text!r}") from None


def finish(as_json: bool, result: Mapping[str, Any], *sentences: str) -> None:
    """Print what a command made: one JSON object for a script, or sentences; by one of several processes."""
    say(json.dumps(result, indent=2, default=str)) if as_json else say(*sentences)


def say(*lines: str) -> None:
    """Print lines, if this is the process that speaks for all."""
    for line in lines if is_main_process() else ():
        typer.echo(line)


def say_loading() -> None:
    """Tell the person at a terminal what the next ten seconds pass with."""
    if not is_launched() and sys.stderr is not None and sys.stderr.isatty():
        typer.echo("loading torch and diffusers", err=True)


def join_launcher() -> None:
    """Close the gaps of launchers, for a command that several processes share."""
    code = start_missing_processes()
    if code is not None:
        raise typer.Exit(code)
    exit_with_launcher()
    if is_launched():
        with without_garbage_collection():
            from hf_ddpm.runtime.processes import share_cores

        share_cores()
    say_loading()


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table whose columns are aligned."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    pairs = [zip(row, widths, strict=True) for row in texts]
    return ["  ".join(f"{text:{width}}" for text, width in row).rstrip() for row in pairs]
