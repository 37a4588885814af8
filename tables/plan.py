"""From a table file to its cells: which command of the project runs in which folder, and what it waits for.

A cell's folder is named after its command, without places of files, and after what it depends on. Two tables that
need the same cell share it, and a changed setting leads to another folder.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from formats.zoo import PARTS, Zoo, ZooConfig, open_zoo
from tables.table_file import Flags, Network, Stage, Table, read_table_file
from utils.errors import InputError, quote
from utils.files import card_path, sha256_of, sha256_of_folder
from utils.identity import FREE_OPTIONS, input_files, input_folders

ROOT = Path(__file__).parents[1]
CELLS = Path("save", "tables", "cells")
DONE = "done"  # the empty file that a cell leaves when it has ended well
LOG = "log.txt"
RESULTS = {"prune": "repaired_model.json", "defend": "repaired_model.json", "evaluate": "metrics.json"}
SCRIPTS = {
    "train": "train_backdoor_cifar",
    "masks": "optimize_mask_cifar",
    "prune": "prune_neuron_cifar",
    "defend": "defend_cifar",
    "evaluate": "evaluate_cifar",
}
BEFORE = "before"  # the row of the networks as they are
ZOO_MASKS = ("zoo",)  # of --mask-file: the masks that the zoo has of the network
SLUG = 90  # characters of a folder's name before the digest


@dataclass(frozen=True)
class Cell:
    """One command.

    Attributes:
        name: of its folder.
        kind: of the command, see ``SCRIPTS``.
        command: its words.
        needs: names of the cells that have to be done before.
    """

    name: str
    kind: str
    command: list[str]
    needs: list[str]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        defense: title of the defence.
        setting: the sweep's value; empty where it makes no difference, or there is no sweep.
        runs: by attack; of each run the cells that made it, the one that measured it last.
    """

    defense: str
    setting: str
    runs: dict[str, list[list[str]]]


@dataclass(frozen=True)
class Plan:
    """A table file with everything that has to be done for it."""

    title: str
    sweep: str
    attacks: list[str]
    rows: list[Row]
    cells: dict[str, Cell]
    published: list[str]
    seconds: bool
    folder: str

    def as_json(self) -> bytes:
        """Return the plan as the bytes of a JSON file."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


@dataclass(frozen=True)
class _Subject:
    """A network to defend: its files, the cells it needs, and how folders call it."""

    slug: str
    checkpoint: str
    trigger: str | None = None
    needs: tuple[str, ...] = ()


def make_plan(path: Path, cells: Path = CELLS) -> Plan:
    """Read a table file and make its cells.

    Args:
        path: the table file.
        cells: the folder for the cells' folders.

    Raises:
        InputError: the file is wrong, a network is nowhere, or a script would refuse one of the commands.
    """
    table = read_table_file(path)
    try:
        return _Planner(table, cells).plan()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parser_of(kind: str) -> argparse.ArgumentParser:
    """Return the parser of a kind's script; raises ``InputError`` where the script is missing."""
    return _script(kind).build_parser()


def _script(kind: str) -> Any:
    try:
        return importlib.import_module(SCRIPTS[kind])
    except ModuleNotFoundError as error:
        raise InputError(f"{SCRIPTS[kind]}.py is missing, and with it every defence but anp") from error


def parse(kind: str, words: list[str]) -> argparse.Namespace:
    """Parse a command as its script does.

    Raises:
        InputError: the script would refuse it; the message is the script's.
    """
    script, complaint = _script(kind), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = getattr(script, "parse_arguments", script.build_parser().parse_args)(words)
    except SystemExit as error:
        message = complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise InputError(f"{SCRIPTS[kind]}.py: {message}") from error
    return parsed[0] if isinstance(parsed, tuple) else parsed


def _words(flags: Flags) -> list[str]:
    return [word for flag, values in flags.items() for word in (flag, *values)]


@dataclass
class _Planner:
    """Makes the cells of one table."""

    table: Table
    folder: Path
    cells: dict[str, Cell] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Return the whole plan."""
        table, rows = self.table, []
        self.known = {kind: set(parser_of(kind)._option_string_actions) for kind in self._kinds()}
        self.zoo = self._open_zoo()
        attacks = [*table.networks, *table.attacks]
        for title, stages in {BEFORE: [], **table.defenses}.items():
            made = [
                Row(title, label, {attack: self._runs(attack, title, stages, swept) for attack in attacks})
                for label, swept in table.sweep[1].items()
            ]
            same = len(made) > 1 and all(row.runs == made[0].runs for row in made)
            rows += [Row(title, "", made[0].runs)] if same else made
        folder = str(self.folder)
        return Plan(table.title, table.sweep[0], attacks, rows, self.cells, table.published, table.seconds, folder)

    def _kinds(self) -> list[str]:
        """Return the kinds of commands that the table needs."""
        methods = {stage.method for stages in self.table.defenses.values() for stage in stages}
        kinds = {"evaluate", *(("train",) if self.table.attacks else ())}
        kinds |= {"masks", "prune"} if "anp" in methods else set()
        kinds |= {"defend"} if methods - {"anp"} else set()
        return [kind for kind in SCRIPTS if kind in kinds]

    def _open_zoo(self) -> Zoo:
        given = {flag: values[0] for flag, values in self.table.flags.items() if values}
        return open_zoo(ZooConfig(zoo_index=given.get("--zoo-index"), cache_dir=given.get("--cache-dir")))

    def _runs(self, attack: str, title: str, stages: list[Stage], swept: Flags) -> list[list[str]]:
        """Return the runs of one cell of the table; those that come out the same count once."""
        runs = []
        for seed in self.table.seeds:
            for subject in self._subjects(attack, seed, swept):
                try:
                    runs.append(self._defend(subject, stages, seed, swept))
                except InputError as error:
                    raise InputError(f"{title}: {error}") from error
        return [run for number, run in enumerate(runs) if run not in runs[:number]]

    def _subjects(self, attack: str, seed: int, swept: Flags) -> list[_Subject]:
        if attack in self.table.attacks:
            return [self._trained(attack, self.table.attacks[attack], seed, swept)]
        return [each for given in self.table.networks[attack] for each in self._found(attack, given)]

    def _found(self, attack: str, given: Network) -> Iterable[_Subject]:
        """Yield the networks that a name or a pattern of the zoo, a path or an address stands for."""
        name = given.checkpoint
        if (
            Path(name).exists()
            or re.match(r"(https?://|doi:|drive:|hf:)", name)
            or name.split("/")[0] in self.zoo.folders
        ):
            yield _Subject(Path(name).parent.name + "-" + Path(name).stem, name, given.trigger)
            return
        try:
            names = fnmatch.filter(self.zoo.entries, name) or [self.zoo.find(name).name]
        except InputError as error:
            raise InputError(f"networks: {attack}: {error}; and no file {quote(name)} is there") from error
        for each in names:
            trigger = each if "trigger" in self.zoo.entries[each].files else None
            yield _Subject(each, each, given.trigger or trigger)

    def _trained(self, attack: str, flags: Flags, seed: int, swept: Flags) -> _Subject:
        """Return the network that a training makes."""
        flags = {**self.table.training, **flags}
        needs: tuple[str, ...] = ()
        if flags.get("--clb-surrogate") == ("surrogate",):
            if self.table.surrogate is None:
                raise InputError(f"attacks: {attack}: the table has no surrogate to build a set against")
            surrogate = self._trained("surrogate", self.table.surrogate, seed, swept)
            flags["--clb-surrogate"], needs = (surrogate.checkpoint,), surrogate.needs
        try:
            name, args = self._cell("train", "", {}, flags, seed, swept, needs)
        except InputError as error:
            raise InputError(f"attacks: {attack}: {error}") from error
        place = self.folder / name
        trigger = None if args.poison_type == "benign" else str(place / "trigger_info.th")
        return _Subject(f"{args.poison_type}-seed{seed}", str(place / "last_model.th"), trigger, (name,))

    def _defend(self, subject: _Subject, stages: list[Stage], seed: int, swept: Flags) -> list[str]:
        """Return the cells of one run."""
        if not stages:
            return [self._cell("evaluate", subject.slug, self._inputs(subject), {}, seed, swept, subject.needs)[0]]
        run: list[str] = []
        for stage in stages:
            kinds = ["masks", "prune"] if stage.method == "anp" else ["defend"]
            for kind in kinds:
                flags = dict(stage.flags)
                inputs = self._inputs(subject)
                if kind == "masks" and "--mask-file" in flags:
                    continue
                if kind == "defend":
                    inputs["--defense"] = (stage.method,)
                if kind == "prune":
                    self._add_masks(inputs, flags, subject, run)
                own = {flag: values for flag, values in flags.items() if self._takes(kind, kinds, flag)}
                needs = (*subject.needs, *run[-1:])
                run.append(self._cell(kind, subject.slug, inputs, own, seed, swept, needs)[0])
            repaired = str(self.folder / run[-1] / "repaired_model.th")
            subject = _Subject(f"{subject.slug}-{stage.method}", repaired, subject.trigger, (*subject.needs, run[-1]))
        return run

    def _add_masks(self, inputs: Flags, flags: Flags, subject: _Subject, run: list[str]) -> None:
        """Say where the masks of a network come from: from the zoo, or else from the cell before."""
        if "--mask-file" not in flags:
            inputs["--mask-file"] = (str(self.folder / run[-1] / "mask_values.txt"),)
        elif flags["--mask-file"] == ZOO_MASKS:
            self._check_masks(subject.checkpoint)
            flags["--mask-file"] = (subject.checkpoint,)

    def _check_masks(self, name: str) -> None:
        if name not in self.zoo.entries or "masks" not in self.zoo.entries[name].files:
            raise InputError(f"--mask-file zoo: the zoo has no masks of {quote(name)}; leave the flag out")

    def _takes(self, kind: str, kinds: list[str], flag: str) -> bool:
        """Say whether a script gets a flag; one that none of the kinds takes goes to all, which refuse it."""
        return flag in self.known[kind] or not any(flag in self.known[each] for each in kinds if each in self.known)

    @staticmethod
    def _inputs(subject: _Subject) -> Flags:
        trigger = {"--trigger-info": (subject.trigger,)} if subject.trigger else {}
        return {"--checkpoint": (subject.checkpoint,), **trigger}

    def _cell(
        self, kind: str, slug: str, inputs: Flags, flags: Flags, seed: int, swept: Flags, needs: Iterable[str]
    ) -> tuple[str, argparse.Namespace]:
        """Add a cell unless it is there; return its name and its parsed command."""
        common, swept = (
            {flag: values for flag, values in given.items() if self._takes(kind, list(self.known), flag)}
            for given in (self.table.flags, swept)
        )
        seeds = {"--seed": (str(seed),)} if "--seed" in self.known[kind] else {}
        flags = {**common, **flags, **swept, **seeds}
        words = _words({**inputs, **flags, "--threads": ("1",)})
        output = ["--json", RESULTS[kind]] if kind == "evaluate" else ["--output-dir", kind]
        args = parse(kind, output + words)
        name = f"{_slug(kind, slug, inputs, flags)}-{self._digest(kind, {**inputs, **flags}, args)}"
        place = self.folder / name
        output = (
            ["--json", str(place / RESULTS[kind])] if kind == "evaluate" else ["--output-dir", str(place), "--resume"]
        )
        self.cells[name] = Cell(name, kind, ["python", f"{SCRIPTS[kind]}.py", *output, *words], sorted(set(needs)))
        return name, args

    def _digest(self, kind: str, flags: Flags, args: argparse.Namespace) -> str:
        """Return what tells a cell from others: its settings and the content of its inputs."""
        files, folders = input_files(args), input_folders(args)
        settings = []
        for flag, values in flags.items():
            option = {"checkpoints": "checkpoint"}.get(flag[2:].replace("-", "_"), flag[2:].replace("-", "_"))
            if option in files or option in folders:
                values = (self._content(option, values[0], (files | folders)[option]),)
            if option not in FREE_OPTIONS:
                settings.append([flag, *values])
        return hashlib.sha256(json.dumps([kind, sorted(settings)]).encode()).hexdigest()[:10]

    def _content(self, option: str, given: str, path: Path) -> str:
        """Return what stands for an input: the name of the cell that makes it, or else the digest of its content."""
        if path.is_relative_to(self.folder):
            return str(path.relative_to(self.folder))
        if path.is_dir():
            return sha256_of_folder(path)
        if path.exists():
            card = card_path(path)
            return sha256_of(path) + (sha256_of(card) if card.is_file() else "")
        entry = self.zoo.entries.get(given)
        return entry.files[PARTS[option]]["sha256"] if entry and PARTS.get(option) in entry.files else given


def _slug(kind: str, subject: str, inputs: Flags, flags: Flags) -> str:
    """Return a name that tells a reader what a cell is about; files are left out."""
    words = [kind, subject, *inputs.get("--defense", ()), *flags.get("--poison-type", ())]
    for flag, values in flags.items():
        if flag[2:].replace("-", "_") not in {*FREE_OPTIONS, *PARTS, "poison_type", "split_file"}:
            words.append("=".join((flag[2:], *values)))
    text = re.sub(r"[^\w.=-]+", "_", "-".join(filter(None, words)))
    return text[:SLUG].rstrip("-.")
