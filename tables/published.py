"""The tables that others published, as results/published.json quotes them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.files import read_json

PUBLISHED = Path(__file__).parents[1] / "results" / "published.json"
BEFORE = "before"  # the row of the networks as they are


def published_tables() -> dict[str, dict[str, Any]]:
    """Return the published tables by name: ``cite``, ``setting`` and ``rows``."""
    content = read_json(PUBLISHED)
    paper = [
        {"defense": defense, "attack": row["attack"], **row[entry]}
        for row in content["rows"]
        for defense, entry in ((BEFORE, "before"), ("ANP", "after"))
    ]
    known = {name: content[name] for name in ("cite", "setting_in_words")}
    return {"paper": {**known, "runs": content["setting"]["runs"], "rows": paper}, **content["tables"]}


def base(title: str) -> str:
    """Return a defence's name without its settings: ``FT`` of ``FT, lr 0.01``."""
    return title.partition(",")[0]


def rows_beside(table: dict[str, Any], titles: Iterable[str], attacks: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of a published table that are of the attacks and the defences, by title, of one's own."""
    names, attacks = set(map(base, titles)), set(attacks)
    return [row for row in table["rows"] if row["defense"] in names and row["attack"] in attacks]
