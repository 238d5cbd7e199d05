"""A table of the faults that a session tried, printed at its end: id, fault, tries, lost steps,
verdict.

A test says which rows it shows by `@pytest.mark.fault("R7")`, and by `record_property` how many
`tries` it made (else one) and the most `lost_steps` that had to be computed again.
"""

from typing import Any

import pytest

ROWS = {
    "R1": "stopped after any step, resumed by a new process",
    "R2": "SIGKILL at random times, the same command until done",
    "R3": "R1 with two processes",
    "R4": "resumed on another number of processes",
    "R5": "other loader workers or prefetch on resume",
    "R6": "another total batch on resume",
    "R7": "the process ends at any point of a save",
    "R8": "the newest checkpoint, or all of them, damaged",
    "R9": "disk full while saving or logging",
    "R10": "SIGTERM to the launcher: in a step, a save, a validation; twice",
    "R11": "SIGTERM or SIGUSR1 to one process of two",
    "R12": "a process dies, or a machine of two; the launcher restarts",
    "R13": "one process of two hangs or is frozen",
    "R14": "a data worker is killed",
    "R16": "NaN or Inf in loss or gradient of one process of two",
    "R17": "fp16 loss scaler across a resume and an overflow",
    "R18": "parameters change while a save is under way",
    "R19": "a save in the background fails",
    "R20": "retention, and an old checkpoint that cannot be removed",
    "R21": "two jobs on one output folder; a dead job's lock",
    "R22": "output folder unwritable; run already finished",
    "R24": "golden losses",
    "R25": "one batch, accumulated, two processes",
    "R28": "loader processes cannot hand batches over",
    "R26": "saved by sharded processes, loaded by one, and back",
}


class FaultTable:
    """Collects the properties of tests, which pytest-xdist carries from its workers, and prints
    them."""

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line(
            "markers", "fault(*ids): rows of tests/fault_table.py that the test shows to hold"
        )

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("fault"):
                item.user_properties += [("fault", row) for row in marker.args]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        found: dict[str, list[tuple[str, int, int]]] = {}
        for outcome in ("passed", "failed", "error", "skipped"):
            for report in terminalreporter.stats.get(outcome, []):
                properties = getattr(report, "user_properties", [])
                numbers = dict(properties)
                entry = (outcome, int(numbers.get("tries", 1)), int(numbers.get("lost_steps", 0)))
                for row in [value for name, value in properties if name == "fault"]:
                    found.setdefault(row, []).append(entry)
        if found:
            terminalreporter.section("faults")
            terminalreporter.write_line(
                f"{'id':4} {'fault':64} {'tries':>5} {'lost steps':>10}  verdict"
            )
        for row in sorted(found, key=lambda row: int(row[1:])):
            outcomes = {outcome for outcome, _, _ in found[row]}
            verdict = (
                "FAILS"
                if outcomes & {"failed", "error"}
                else "holds"
                if "passed" in outcomes
                else "skipped"
            )
            tries, lost = (
                sum(entry[1] for entry in found[row]),
                max(entry[2] for entry in found[row]),
            )
            terminalreporter.write_line(f"{row:4} {ROWS[row]:64} {tries:5} {lost:10}  {verdict}")
