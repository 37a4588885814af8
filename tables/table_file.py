"""A table file: what it may hold, read and checked."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from tables.published import BEFORE, base
from utils.errors import InputError, quote
from utils.files import JSON_LIMIT, read_text

Flags = dict[str, tuple[str, ...]]  # values by flag
RESERVED = {"--output-dir", "--resume", "--overwrite", "--checkpoint", "--checkpoints", "--trigger-info", "--json"}
RESERVED |= {"--threads", "--seed", "--seeds", "--defense", "--help", "--version"}  # of every cell, or no settings
SURROGATE = ("surrogate",)  # of --clb-surrogate: the network that the table file trains for it
NAMES = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Network:
    """A network that is there already; where it is, and the file of its trigger."""

    checkpoint: str
    trigger: str | None = None


@dataclass(frozen=True)
class Stage:
    """A defence, or one of a chain: its name in a script, and its flags."""

    method: str
    flags: Flags


@dataclass(frozen=True)
class Table:
    """What a table file says.

    Attributes:
        title: of the table.
        networks: by attack, the networks that are there already.
        attacks: by attack, the flags of its training.
        training: flags of every training.
        surrogate: flags of the training of a network that ``--clb-surrogate surrogate`` stands for.
        defenses: by title, one stage or a chain of them.
        flags: of every command whose script takes them.
        seeds: of trainings and defences; every network is defended with each.
        sweep: what the settings are called, and the flags of each.
        published: names of published tables to put beside.
        seconds: whether the table tells how long a defence takes.
    """

    title: str
    networks: dict[str, list[Network]]
    attacks: dict[str, Flags]
    training: Flags
    surrogate: Flags | None
    defenses: dict[str, list[Stage]]
    flags: Flags
    seeds: list[int]
    sweep: tuple[str, dict[str, Flags]]
    published: list[str]
    seconds: bool


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key comes twice: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"{key!r} comes twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_table_file(path: Path) -> Table:
    """Read a table file.

    Raises:
        InputError: it is missing, no YAML, or an entry is unknown, missing or of the wrong type.
    """
    text = read_text(path, JSON_LIMIT)
    try:
        return _read(_expect(yaml.load(text, _Loader), dict, "a table file"))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(content: dict[str, Any]) -> Table:
    known = [each.name for each in fields(Table)]
    for key in content:
        if key not in known:
            raise InputError(f"no entry is called {quote(key)}; there are {', '.join(known)}")
    sweep = _entry(content, "sweep", dict) or {"title": "", "values": {"": ""}}
    if sweep.keys() != {"title", "values"}:
        raise InputError("sweep: needs title and values, and nothing else")
    table = Table(
        title=_entry(content, "title", str) or "Table",
        networks=_each(content, "networks", _networks),
        attacks=_each(content, "attacks", read_flags),
        training=read_flags(_entry(content, "training", str), "training"),
        surrogate=read_flags(content["surrogate"], "surrogate") if "surrogate" in content else None,
        defenses=_each(content, "defenses", _stages),
        flags=read_flags(_entry(content, "flags", str), "flags"),
        seeds=_seeds(content.get("seeds", [0])),
        sweep=(_expect(sweep["title"], str, "sweep: title"), _each(sweep, "values", read_flags)),
        published=[_expect(name, str, "published") for name in _entry(content, "published", list)],
        seconds=_entry(content, "seconds", bool),
    )
    if not (table.networks or table.attacks):
        raise InputError("names no networks and no attacks, so there is nothing to defend")
    for attack in table.networks.keys() & table.attacks.keys():
        raise InputError(f"{attack}: stands in networks and in attacks; call one of them something else")
    for title in table.defenses:
        if base(title) == BEFORE:
            raise InputError(f"defenses: {title}: so the row of the networks as they are is called; change the title")
    wanted = [flags.get("--clb-surrogate") for flags in table.attacks.values()]
    if table.surrogate is not None and SURROGATE not in wanted:
        raise InputError("surrogate: no attack has --clb-surrogate surrogate; leave it out")
    if not table.sweep[1]:
        raise InputError("sweep: values is empty")
    return table


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {NAMES[kind]}, found {quote(value)}")
    return value


def _entry(content: dict[str, Any], key: str, kind: type) -> Any:
    return _expect(content[key], kind, key) if key in content else kind()


def _each(content: dict[str, Any], key: str, read: Any) -> dict[str, Any]:
    return {str(name): read(value, f"{key}: {name}") for name, value in _entry(content, key, dict).items()}


def _seeds(given: Any) -> list[int]:
    right = isinstance(given, list) and given and all(type(seed) is int and seed >= 0 for seed in given)
    if not right or len(set(given)) < len(given):
        raise InputError(f"seeds: expected a list of different whole numbers, found {quote(given)}")
    return given


def _networks(given: Any, where: str) -> list[Network]:
    found = [_network(each, where) for each in (given if isinstance(given, list) else [given])]
    if not found:
        raise InputError(f"{where}: an empty list")
    return found


def _network(given: Any, where: str) -> Network:
    if isinstance(given, dict) and {"checkpoint"} <= given.keys() <= {"checkpoint", "trigger"}:
        return Network(**{key: _expect(value, str, f"{where}: {key}") for key, value in given.items()})
    if not isinstance(given, str) or not given:
        raise InputError(f"{where}: expected a name, or checkpoint and trigger, found {quote(given)}")
    return Network(given)


def _stages(given: Any, where: str) -> list[Stage]:
    return [_stage(each, where) for each in (given if isinstance(given, list) and given else [given])]


def _stage(given: Any, where: str) -> Stage:
    method, _, flags = _expect(given, str, where).strip().partition(" ")
    if not method or method.startswith("-"):
        raise InputError(f"{where}: begins with the name of a defence, found {quote(given)}")
    return Stage(method, read_flags(flags, where))


def read_flags(given: Any, where: str) -> Flags:
    """Split flags as a shell does.

    Args:
        given: such as ``--lr 0.01 --schedule 5 10``.
        where: they stand, for messages.

    Raises:
        InputError: it is no text, does not begin with a flag, or holds a flag that is no setting of a table.
    """
    try:
        words = shlex.split(_expect(given, str, where))
    except ValueError as error:
        raise InputError(f"{where}: {error} in {quote(given)}") from error
    flags: Flags = {}
    flag = None
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if flag in flags:
                raise InputError(f"{where}: {flag} comes twice")
            flags[flag] = (value,) if equals else ()
        elif flag is None:
            raise InputError(f"{where}: expected flags, found {quote(word)}")
        else:
            flags[flag] += (word,)
    for flag in flags.keys() & RESERVED:
        raise InputError(f"{where}: {flag} is not for a table file; docs/tables.md says what is")
    return flags
