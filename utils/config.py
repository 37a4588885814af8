"""Configs: a setting's default, range and help stand in a frozen dataclass, and nowhere else.

Flags are made from its fields, and a Python caller's values are checked like those from the command line.
"""

import argparse
import difflib
import math
import numbers
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args

from utils import VERSION
from utils.errors import printable, quote

C = TypeVar("C", bound="Config")


class InputFile(str):
    """A file that a run reads. The run records its sha256 and is not continued with another one."""

    @property
    def path(self) -> Path:
        """The file itself."""
        return Path(self)


class InputCode(InputFile):
    """A function in a file of Python code, ``FILE.py:FUNCTION``."""

    @property
    def path(self) -> Path:
        """See ``InputFile``."""
        return Path(self.rpartition(":")[0])

    @property
    def function(self) -> str:
        """The function's name."""
        return self.rpartition(":")[2]


class InputFolder(str):
    """The same for a folder."""


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``, either of them excluded where it is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return bool(above and below and -math.inf < number < math.inf)

    def __str__(self) -> str:
        above = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        if self.high == math.inf:
            return above
        if self.open_low or self.open_high:
            return f"{above}, {'below' if self.open_high else 'at most'} {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


def setting(
    default: Any,
    help: str,
    within: Range | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    choices: Iterable[str] | None = None,
    kind: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a field of a ``Config`` that is also a flag.

    Args:
        default: the only place where it stands.
        help: what it is, with its unit; range and default are added to it.
        within: the numbers allowed; of each entry where the field is a tuple.
        flag: the published spelling where it is not the field's name; more than one, separated by blanks, are aliases.
        metavar: what the help shows for the value.
        choices: the words allowed.
        kind: makes the value from the flag's text; by default the field's type.
    """
    metadata = {"help": help, "within": within, "flag": flag, "metavar": metavar, "choices": choices, "kind": kind}
    return field(default=default, metadata=metadata)


def checked(default: Any, within: Range) -> Any:
    """Declare a field that is no flag but has a range."""
    return field(default=default, metadata={"within": within})


def one_of(default: Any, *others: Any) -> Any:
    """Declare a field that is no flag but has few possible values."""
    return field(default=default, metadata={"choices": (default, *others)})


def required(help: str, flag: str | None = None, metavar: str | None = None) -> Any:
    """Declare a field without a default: a flag that must be given."""
    return field(metadata={"help": help, "flag": flag, "metavar": metavar})


@dataclass(frozen=True)
class Config:
    """Base of all configs.

    Raises:
        ValueError: a value is out of its range or none of its choices.
    """

    def __post_init__(self):
        for each in fields(self):
            value, within, choices = getattr(self, each.name), _meta(each, "within"), _meta(each, "choices")
            entries = value if isinstance(value, tuple) else (value,)
            if value is None and NoneType in (each.type, *get_args(each.type)):
                entries = ()
            place = f"{type(self).__name__}.{each.name} = {quote(value)}"
            if not all(_is_of(entry, _entry_type(each.type)) for entry in entries):
                raise ValueError(f"{place} is no {_TYPE_NAMES[_entry_type(each.type)]}")
            if within and not all(entry in within for entry in entries):
                raise ValueError(f"{place} is out of range: it must be {within}")
            if choices and any(entry not in choices for entry in entries):
                raise ValueError(f"{place}: choose from {', '.join(map(str, choices))}")


_NUMBERS = {int: numbers.Integral, float: numbers.Real}
_TYPE_NAMES = {int: "whole number", float: "number", str: "text", bool: "truth value"}


def _is_of(entry: Any, kind: Any) -> bool:
    """Say whether a value is of a field's type; NumPy's numbers count, True is no number. Other types are not known."""
    if kind in _NUMBERS:
        return isinstance(entry, _NUMBERS[kind]) and not isinstance(entry, bool)
    return kind not in _TYPE_NAMES or isinstance(entry, kind)


def _meta(each: Field, name: str) -> Any:
    return each.metadata.get(name)


def flag_fields(config: type[Config]) -> dict[str, Field]:
    """Return the fields of a config that are flags, by the name under which argparse stores them."""
    return {_spellings(each)[0][2:].replace("-", "_"): each for each in fields(config) if _meta(each, "help")}


def _spellings(each: Field) -> list[str]:
    return (_meta(each, "flag") or "--" + each.name.replace("_", "-")).split()


def _entry_type(kind: Any) -> Any:
    """Return the type of the entries: ``float`` for ``float | None`` and ``tuple[float, ...]``."""
    parts = [part for part in get_args(kind) if part not in (NoneType, Ellipsis)]
    return _entry_type(parts[0]) if parts else kind


def _length(each: Field) -> int | str | None:
    """Return argparse's ``nargs``: None for a single value, a number or ``+`` for tuples."""
    for kind in (each.type, *get_args(each.type)):
        if getattr(kind, "__origin__", None) is tuple:
            parts = get_args(kind)
            return "+" if Ellipsis in parts else len(parts)
    return None


def number(kind: type, within: Range) -> Callable[[str], float]:
    """Return an argparse type: a number within a range.

    Raises:
        argparse.ArgumentTypeError: (the returned function) the number is out of range.
        ValueError: (the returned function) the text is no number.
    """

    def parse(text: str):
        value = kind(text)
        if value not in within:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {within}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def not_empty(kind: type[str]) -> Callable[[str], str]:
    """Return an argparse type: a text that is not empty, as a shell makes it of a variable that was never set.

    Raises:
        argparse.ArgumentTypeError: (the returned function) the text is empty.
    """

    def parse(given: str) -> str:
        if not given:
            raise argparse.ArgumentTypeError("expected a name, found an empty text")
        return kind(given)

    return parse


def code(given: str) -> InputCode:
    """An argparse type: ``FILE.py:FUNCTION``.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    found = InputCode(given)
    if found.path.suffix != ".py" or not found.function.isidentifier():
        raise argparse.ArgumentTypeError(f"{given}: expected FILE.py:FUNCTION, such as my_network.py:build")
    return found


def _specification(each: Field) -> dict[str, Any]:
    """Return what argparse has to know of a field, but for default and help."""
    if each.type is bool:
        return {"action": "store_true"}
    kind, within, choices = _entry_type(each.type), _meta(each, "within"), _meta(each, "choices")
    known = {
        "type": _meta(each, "kind")
        or (number(kind, within) if within else not_empty(kind) if issubclass(kind, str) else kind),
        "nargs": _length(each),
        "choices": list(choices) if choices else None,
        "metavar": None if choices else _meta(each, "metavar") or {int: "N", float: "X"}.get(kind),
    }
    return {name: value for name, value in known.items() if value is not None}


def _described(each: Field) -> str:
    """Return a field's help with its range."""
    within = _meta(each, "within")
    text = _meta(each, "help") + (f"; {within}" if within else "")
    return text.replace("%", "%%")


def _shown(value: Any) -> str:
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_flags(parser: Any, config: type[Config], card: bool = False, **defaults: Any) -> None:
    """Add the flags of a config to a parser or an argument group.

    Args:
        parser: what they are added to.
        config: whose fields become flags.
        card: a model card may know the values: unset flags stay None, and the help says so.
        defaults: of fields for which this parser has another default.
    """
    for each in flag_fields(config).values():
        default = defaults.get(each.name, each.default)
        text = _described(each)
        if card and default is not None:
            text += f" (default: the card's, else {_shown(default)})"
        elif default is not MISSING and default is not False and default not in (None, ""):
            text += f" (default: {_shown(default)})"
        demand = {"required": True} if default is MISSING else {"default": None if card else default}
        parser.add_argument(*_spellings(each), **_specification(each), **demand, help=text)


def add_alternative_flags(parser: Any, configs: dict[str, type[Config]]) -> None:
    """Add the flags of several configs of which the run will choose one, each flag once and unset.

    Args:
        parser: what they are added to.
        configs: by the name under which one is chosen; the help says which takes a flag with which default.
    """
    owners: dict[str, dict[str, Field]] = {}
    for name, config in configs.items():
        for dest, each in flag_fields(config).items():
            owners.setdefault(dest, {})[name] = each
    for of in owners.values():
        first = next(iter(of.values()))
        texts: dict[str, dict[str, list[str]]] = {}
        for name, each in of.items():
            texts.setdefault(_described(each), {}).setdefault(_shown(each.default), []).append(name)
        parts = [f"{text} ({_takers(defaults, len(configs))})" for text, defaults in texts.items()]
        parser.add_argument(*_spellings(first), **_specification(first), help="; or ".join(parts))


def _takers(defaults: dict[str, list[str]], count: int) -> str:
    """Say which default a flag has for which of ``count`` configs."""
    if len(defaults) == 1:
        ((default, names),) = defaults.items()
        if default == "none":
            return f"{', '.join(names)} only"
        if len(names) == count:
            return f"default: {default}"
    return "default: " + "; ".join(f"{default} for {', '.join(names)}" for default, names in defaults.items())


def given_flags(args: argparse.Namespace, config: type[Config]) -> dict[str, Any]:
    """Return the values of a config's fields that the command line names, or has a default for."""
    values = {each.name: getattr(args, dest, None) for dest, each in flag_fields(config).items()}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None
    }


def from_flags(config: type[C], args: argparse.Namespace, **others: Any) -> C:
    """Make a config from the command line.

    Args:
        config: the class.
        args: a parsed command line with its flags.
        others: fields that are no flags.

    Raises:
        ValueError: a value is out of range.
    """
    return config(**{**given_flags(args, config), **others})


def refuse_foreign_flags(
    args: argparse.Namespace, configs: Iterable[type[Config]], chosen: type[Config], choice: str
) -> None:
    """Make sure that no flag was given that only configs take which were not chosen.

    Args:
        args: a parsed command line with the flags of ``add_alternative_flags``.
        configs: that it could choose from.
        chosen: that it chose.
        choice: the flag that chose, for the message.

    Raises:
        ValueError: one was.
    """
    all_flags = {dest for config in configs for dest in flag_fields(config)}
    for dest in sorted(all_flags - flag_fields(chosen).keys()):
        if getattr(args, dest) is not None:
            raise ValueError(f"--{dest.replace('_', '-')} has no effect with {choice}; leave it out")


def record_flags(config: Config, args: argparse.Namespace) -> None:
    """Write a config's values back into the command line, so that a run records what it was done with."""
    for dest, each in flag_fields(type(config)).items():
        setattr(args, dest, getattr(config, each.name))


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, safe to print; a flag that does not exist is answered with the nearest one."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--\S+)", message)
        nearest = difflib.get_close_matches(found[1], self._option_string_actions, 1) if found else []
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        self.exit(2, f"{self.prog}: error: {printable(message)}{hint}; --help shows every flag\n")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring and accepts no abbreviated flags."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"adversarial-neuron-pruning {VERSION}")
    return parser


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add where to write, and whether to go on with what is there."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        type=not_empty(str),
        default="./save",
        metavar="DIR",
        help="folder for everything the step writes (default: %(default)s)",
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run; on a CPU it ends bit-identical to one never interrupted",
    )
    choice.add_argument(
        "--overwrite",
        action="store_true",
        help="start again; what the step wrote before, and what later steps made of it, is removed first",
    )
