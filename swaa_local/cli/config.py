"""Defaults of the command line: a file of the user's, and environment variables.

Options given on the command line win over variables (`SWAA_LOCAL_CHAT_TEMP=0`), these over the file, and the file over
what the help says. Knows click and one TOML file.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import Any

import click

from swaa_local.errors import SWAAError
from swaa_local.files.user_dirs import NoHome, config_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "SWAA_LOCAL"


class ConfigError(SWAAError):
    """The file of defaults cannot be read, or says something that no command knows."""


def config_path() -> Path:
    """`$XDG_CONFIG_HOME/swaa-local/config.toml`, or what the system has for it."""
    return config_dir() / "config.toml"


def default_map(program: click.Group) -> dict[str, Any]:
    """What the file says, as click takes it; empty without a file.

    A table is a command, a key an option without its dashes; what stands above the tables is for every command that has
    such an option. Raises `ConfigError`.
    """
    if f"_{ENV_PREFIX}_COMPLETE" in os.environ:  # the shell asks, and shows no errors
        return {}
    try:
        path = config_path()
    except NoHome:
        return {}
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    for_all = {key: value for key, value in said.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in said.items() if isinstance(value, dict)}
    for name in tables:
        if name not in program.commands:
            raise ConfigError(f"{path}: there is no command {name!r}{_nearest(name, program.commands)}")
    used: set[str] = set()
    defaults: dict[str, Any] = {}
    for name, command in program.commands.items():
        options = _options(command)
        table = tables.get(name, {})
        for key in table:
            if key not in options:
                raise ConfigError(f"{path}: {name} has no option {key!r}{_nearest(key, options)}")
        used |= for_all.keys() & options.keys()
        values = {key: value for key, value in for_all.items() if key in options} | table
        defaults[name] = {options[key][0]: _value(path, key, value, *options[key]) for key, value in values.items()}
    if unknown := sorted(for_all.keys() - used):
        raise ConfigError(f"{path}: no command has the option {unknown[0]!r}")
    return defaults


def origin(error: click.UsageError) -> str:
    """Where a value that is refused comes from, if not from the command line; else empty."""
    parameter = getattr(error, "param", None)
    if error.ctx is None or parameter is None or parameter.name is None:
        return ""
    source = error.ctx.get_parameter_source(parameter.name)
    if source is click.core.ParameterSource.DEFAULT_MAP:
        return f" (it is in {config_path()})"
    if source is click.core.ParameterSource.ENVIRONMENT:
        names = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
        said = [name for name in names if name in os.environ]
        return f" (it is in the variable {said[0]})" if said else ""
    return ""


class _Lines(click.types.StringParamType):
    """Texts, of which a variable has one a line: a question and a path may have blanks."""

    envvar_list_splitter = "\n"


def name_variables(program: click.Group) -> None:
    """Let each option be set by the variable that is called as the option is, whatever the parameter's name."""
    for command_name, command in program.commands.items():
        for parameter in command.params:
            if not isinstance(parameter, click.Option) or not parameter.expose_value:
                continue
            long = [name[2:] for name in parameter.opts if name.startswith("--")]
            names = [f"{ENV_PREFIX}_{command_name}_{name}".upper().replace("-", "_") for name in long]
            # What the option has of its own, such as llama-server's, stays.
            own = [parameter.envvar] if isinstance(parameter.envvar, str) else list(parameter.envvar or ())
            if names:
                parameter.envvar = list(dict.fromkeys([*names, *own]))
            if parameter.multiple and parameter.type is click.STRING:
                parameter.type = _Lines()


def _options(command: click.Command) -> dict[str, tuple[str, click.Parameter, bool]]:
    """By their names without dashes: the parameter's name, the parameter, and what a switch says."""
    found: dict[str, tuple[str, click.Parameter, bool]] = {}
    for parameter in command.params:
        if parameter.name is None or not parameter.expose_value:
            continue
        if isinstance(parameter, click.Argument):
            found[parameter.name] = (parameter.name, parameter, True)
        for said, names in ((False, parameter.secondary_opts), (True, parameter.opts)):
            for name in names:
                if isinstance(parameter, click.Option) and name.startswith("--"):
                    found.setdefault(name[2:], (parameter.name, parameter, said))
    return found


def _value(path: Path, key: str, value: Any, _name: str, parameter: click.Parameter, said: bool) -> Any:
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {key} is true or false, not {value!r}")
        return value if said else not value
    if isinstance(value, bool):
        raise ConfigError(f"{path}: {key} takes a value, not {str(value).lower()}")
    takes_many = parameter.multiple or parameter.nargs == -1
    if isinstance(value, list) and not takes_many:
        raise ConfigError(f"{path}: {key} takes one value, not a list")
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, (list, dict, bool)):
            raise ConfigError(f"{path}: {key} takes texts or numbers, not {each!r}")
    said_as_text = [str(each) for each in values]  # as on the command line, so that the same is allowed
    return said_as_text if takes_many else said_as_text[0]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
