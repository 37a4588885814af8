"""The tables that others published, as results/published.json quotes them."""

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
