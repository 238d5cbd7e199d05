"""results.json: what an evaluation found, with the weights it judged."""

import json
import math
from pathlib import Path
from typing import Any

from util.files import write_output


def without_nan(facts: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as None: JSON has no word for them."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` as JSON; a reader never sees half of it. Raises: LocalInputError where that
    is not possible."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_output(path, lambda target: target.write_text(text, encoding="utf-8"))


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
