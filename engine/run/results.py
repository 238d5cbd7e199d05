"""results.json: what an evaluation measured, and of which weights."""

import json
import math
from pathlib import Path
from typing import Any

from util.files import write_output


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for numbers that are not finite, which JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` as JSON; a reader never sees half of it. Raises: LocalInputError if it
    cannot be written."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_output(
        path, lambda target: target.write_text(text, encoding="utf-8", errors="backslashreplace")
    )


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
