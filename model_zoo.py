"""The model zoo: networks that --checkpoint, --trigger-info and --mask-file of the scripts take by name.

What there is, and what was measured of it:
    python model_zoo.py list

Measure networks again and compare with their cards (exit status 1 where one differs):
    python model_zoo.py verify badnets-0 blend-0

Fetch files that are elsewhere; train one again from its card; add a run of one's own; make a folder to upload, which
others then use with --zoo-index:
    python model_zoo.py fetch badnets-0 --zoo-index https://example.org/my-zoo/index.json
    python model_zoo.py retrain badnets-0 --output-dir save/again
    python model_zoo.py add save/mine mine --zoo-index my-zoo
    python model_zoo.py export upload/ badnets-0 blend-0
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
import shlex
from functools import partial
from pathlib import Path

import train_backdoor_cifar
from data.datasets import FolderConfig, load_dataset
from formats.cards import read_card
from formats.zoo import INDEX, Entry, Zoo, ZooConfig, check_name, folder_of, open_zoo
from formats.zoo_upkeep import add, export, reindex, training_flags, verify
from utils.config import Range, add_flags, from_flags, make_parser, number
from utils.console import announce, leave
from utils.guard import guard

ROW = "{:<16} {:<16} {:<11} {:>6} {:>8} {:>8}  {}"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the zoo."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    for name, words in (
        ("list", "what there is"),
        ("fetch", "have the files of networks here"),
        ("verify", "measure networks and compare with their cards"),
        ("retrain", "carry out the command of a card again and compare"),
        ("add", "copy a finished run into a zoo, in half precision"),
        ("index", "write the index of a zoo anew from its folders"),
        ("export", "make a folder to upload"),
    ):
        command = commands.add_parser(name, help=words)
        if name in ("add", "export"):
            command.add_argument("folder", type=Path, help={"add": "output folder of the run"}.get(name, "to be made"))
        if name in ("retrain", "add"):
            command.add_argument("name", help="of the network")
        if name in ("fetch", "verify", "export"):
            command.add_argument("names", nargs="*", help="of networks (default: all)")
        if name == "verify":
            command.add_argument(
                "--images", type=number(int, Range(1)), metavar="N", help="test images to use (default: all)"
            )
        if name == "retrain":
            command.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the run")
        add_flags(command, FolderConfig)
        add_flags(command, ZooConfig)
    return parser


def show(zoo: Zoo) -> None:
    """Print one line for each network and each folder."""
    announce(ROW.format("name", "attack", "network", "width", "C-Acc %", "ASR %", "figures, licence, source"))
    for entry in zoo.entries.values():
        card = entry.card
        attack, metrics = (card.get("attack") or {}).get("poison_type", "-"), card.get("metrics", {})
        figures = (metrics.get(name, "-") for name in ("clean_accuracy", "attack_success_rate"))
        origin = f"{entry.figures}, {entry.licence}, {entry.source}"
        columns = entry.name, attack, card.get("arch", "-"), card.get("widen_factor", "-"), *figures, origin
        announce(ROW.format(*map(str, columns)))
    for folder in zoo.folders.values():
        announce(f"{folder.name}/FILE: {folder.about}; licence: {folder.licence}; fetch {folder.name} fetches it")


def in_words(metrics: dict[str, float]) -> str:
    """Return the figures of a card as text."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f} %" for name, value in metrics.items())


def retrain(entry: Entry, args: argparse.Namespace) -> int:
    """Train a network again as its card says; return the status: 1 where C-Acc or ASR is another by half a point."""
    flags = training_flags(entry, from_flags(ZooConfig, args))
    flags += ["--output-dir", args.output_dir, "--data-dir", args.data_dir, "--resume"]
    announce(f"python train_backdoor_cifar.py {shlex.join(flags)}")
    if status := train_backdoor_cifar.main(flags):
        return status
    found = (read_card(Path(args.output_dir, "last_model.th")) or {})["metrics"]
    said = entry.card.get("metrics_before_rounding", entry.card["metrics"])
    announce(f"{entry.name}: {in_words(found)}; its card says {in_words(said)}")
    return int(found.keys() != said.keys() or any(abs(found[name] - said[name]) > 0.5 for name in found))


def work(args: argparse.Namespace, statuses: list[int]) -> None:
    """Carry out the command; adds 1 to ``statuses`` for a network that is not as its card says."""
    config = from_flags(ZooConfig, args)
    load = partial(load_dataset, root=args.data_dir)
    if args.action in ("add", "index"):
        base = folder_of(config)
        if args.action == "add":
            check_name(args.name)
            announce(f"{base / args.name}: {in_words(add(args.folder, base / args.name, load))}")
        entries = reindex(base, open_zoo(config) if (base / INDEX.name).exists() else None)
        announce(f"{base / INDEX.name}: {len(entries)} networks")
        return
    zoo = open_zoo(config)
    names = getattr(args, "names", None) or [*zoo.entries]
    chosen = [zoo.find(name) for name in names if args.action != "fetch" or name not in zoo.folders]
    if args.action == "list":
        show(zoo)
    elif args.action == "fetch":
        for folder in (zoo.folders[name] for name in names if name in zoo.folders):
            for path in zoo.fetch_folder(folder):
                announce(f"--checkpoint {folder.name}/{path.relative_to(zoo.place_of(folder))}: {path}")
        for entry in chosen:
            announce(f"{entry.name}: {', '.join(str(zoo.file(entry, part)) for part in entry.files)}")
    elif args.action == "verify":
        for entry in chosen:
            found, same = verify(zoo, entry, load, args.images)
            verdict = "as its card says" if same else f"but the card says {in_words(entry.card['metrics'])}"
            part = f" on {args.images} images, to sampling error" if args.images else ""
            announce(f"{entry.name}: {in_words(found)}, {verdict}{part}")
            statuses.append(int(not same))
    elif args.action == "retrain":
        statuses.append(retrain(zoo.find(args.name), args))
    else:
        export(zoo, chosen, args.folder)
        announce(f"{args.folder}: {len(chosen)} networks; use it with --zoo-index {args.folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, statuses = build_parser().parse_args(argv), []
    return guard(partial(work, args, statuses), "zoo") or max(statuses, default=0)


if __name__ == "__main__":
    leave(main())
