"""The table at the end of a run."""

from __future__ import annotations

from hsft.report.table import gain_table


def test_gains_are_relative_and_what_a_row_lacks_is_named() -> None:
    before = {"Recall@5": 0.2, "PopularityLift@5": -0.5, "Novelty@5": 3.0}
    after = {"Recall@5": 0.25, "PopularityLift@5": 0.5, "Coverage@5": 0.0}
    lines = gain_table([("untrained", before), ("fine-tuned", after)]).splitlines()
    assert [line.split() for line in (lines[0], *lines[2:])] == [
        ["metric", "untrained", "fine-tuned", "gain"],
        ["Recall@5", "0.200000", "0.250000", "+25.0%"],
        ["PopularityLift@5", "-0.500000", "0.500000", "n/a"],
        ["Novelty@5", "3.000000", "n/a", "n/a"],
        ["Coverage@5", "n/a", "0.000000", "n/a"],
    ]
    assert gain_table([("pop", {"Recall@5": 0.5})]).split() == [
        *("metric", "pop", "--------", "--------", "Recall@5", "0.500000"),
    ]
