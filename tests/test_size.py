"""The counts of `tests/size.py`, on a sample that was counted by hand."""

from size import BUDGET, MAX_LINE, main, measure

FILES = {
    "main_pretrain.py": '''
"""Text."""
from typing import Any

from engine import helper


def main(cfg: Any) -> dict[str, Any]:
    """Text."""
    from util import far

    return far.value  # fmt: skip
''',
    "engine/helper.py": "import engine.optim\n",
    "engine/optim.py": "import torch\n\nx = 1\n",
    "util/far.py": f"value = '{'x' * MAX_LINE}'\n",
    "tools/alone.py": "a = 1\nb = '# fmt: skip'\n",
    "tests/test_it.py": "def test_it():\n    assert True\n",
    ".venv/other.py": "a = 1\n",
}


def test_a_sample_is_counted_right(tmp_path, capsys):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    counts = (11, 2, 9, 2, 1, 2, 1, 1)
    assert measure(tmp_path) == dict(zip(BUDGET, counts, strict=True))
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--root", str(tmp_path), "--check"]) == 1  # a line too long
    assert capsys.readouterr().out.count("too much") == 2 * 3
