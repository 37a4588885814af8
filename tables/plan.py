"""From a table file to its cells: which command of the project runs in which folder, and what it waits for."""

import argparse
import difflib
import fnmatch
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attacks.flags import DEFAULT_ATTACK
from formats.zoo import Zoo, ZooConfig, is_address, open_zoo
from tables.cells import CELLS, Cell, make_cell, taken
from tables.published import BEFORE, published_tables, rows_beside
from tables.table_file import SURROGATE, Flags, Network, Stage, Table, read_table_file
from utils.errors import InputError, quote

ZOO_MASKS = ("zoo",)  # of --mask-file: the masks that the zoo has of the network


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
        InputError: the file is wrong, an input is nowhere, or a script would refuse one of the commands.
    """
    table = read_table_file(path)
    try:
        return _Planner(table, cells).plan()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@dataclass
class _Planner:
    """Makes the cells of one table."""

    table: Table
    folder: Path
    cells: dict[str, Cell] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # the flags that some command takes

    def plan(self) -> Plan:
        """Return the whole plan."""
        table, rows = self.table, []
        self.zoo = self._open_zoo()
        attacks = [*table.networks, *table.attacks]
        for title, stages in {BEFORE: [], **table.defenses}.items():
            made = [
                Row(title, label, {attack: self._runs(attack, title, stages, swept) for attack in attacks})
                for label, swept in table.sweep[1].items()
            ]
            same = len(made) > 1 and all(row.runs == made[0].runs for row in made)
            rows += [Row(title, "", made[0].runs)] if same else made
        self._refuse_useless()
        self._check_published(attacks)
        folder = str(self.folder)
        return Plan(table.title, table.sweep[0], attacks, rows, self.cells, table.published, table.seconds, folder)

    def _refuse_useless(self) -> None:
        """Raise ``InputError`` where a flag of the whole table goes to no command."""
        for where, flags in {"flags": self.table.flags, "training": self.table.training, **self.table.sweep[1]}.items():
            for flag in flags.keys() - self.used:
                close = difflib.get_close_matches(flag, self.used, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise InputError(f"{where}: no command of this table takes {quote(flag)}{hint}")

    def _check_published(self, attacks: list[str]) -> None:
        """Raise ``InputError`` where a published table is not known, or has no row to stand beside those here."""
        known = published_tables()
        for name in self.table.published:
            if name not in known:
                raise InputError(f"published: no table {quote(name)}; there are {', '.join(known)}")
            if not rows_beside(known[name], [BEFORE, *self.table.defenses], attacks):
                raise InputError(f"published: {name} has no figures of these attacks and defences; leave it out")

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
        if Path(name).exists() or is_address(name) or name.split("/")[0] in self.zoo.folders:
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
        flags = dict(flags)
        needs: tuple[str, ...] = ()
        if flags.get("--clb-surrogate") == SURROGATE:
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
                    _refuse_flags_of_masks(flags)
                    continue
                if kind == "defend":
                    inputs["--defense"] = (stage.method,)
                if kind == "prune":
                    self._add_masks(inputs, flags, subject, run)
                own = {flag: values for flag, values in flags.items() if _goes_to(flag, kind, kinds)}
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

    @staticmethod
    def _inputs(subject: _Subject) -> Flags:
        trigger = {"--trigger-info": (subject.trigger,)} if subject.trigger else {}
        return {"--checkpoint": (subject.checkpoint,), **trigger}

    def _cell(
        self, kind: str, slug: str, inputs: Flags, flags: Flags, seed: int, swept: Flags, needs: Iterable[str]
    ) -> tuple[str, argparse.Namespace]:
        """Add a cell unless it is there; return its name and its parsed command."""
        method = inputs.get("--defense") or flags.get("--poison-type") or (DEFAULT_ATTACK,)
        known = taken(kind, method[0])
        self.used |= known
        common = {**self.table.flags, **(self.table.training if kind == "train" else {})}
        common, swept = ({flag: given[flag] for flag in given if flag in known} for given in (common, swept))
        seeds = {"--seed": (str(seed),)} if "--seed" in known else {}
        flags = {**common, **flags, **swept, **seeds}
        cell, args = make_cell(kind, slug, inputs, flags, sorted(set(needs)), self.folder, self.zoo)
        self.cells[cell.name] = cell
        return cell.name, args


def _refuse_flags_of_masks(flags: Flags) -> None:
    """Raise ``InputError`` where a flag is for learning masks, as none are learned."""
    for flag in flags:
        if flag in taken("masks", "") - taken("prune", ""):
            raise InputError(f"{flag} has no effect with --mask-file; leave one of them out")


def _goes_to(flag: str, kind: str, kinds: list[str]) -> bool:
    """Say whether a script of a stage gets a flag; what none of them takes goes to all, which say so."""
    takers = [each for each in kinds if flag in taken(each, "")]
    return kind in (takers or kinds) or kinds == ["defend"]
