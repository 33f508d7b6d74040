from __future__ import annotations

import json
import math

from benchmarks.serving.answers import Answer, Ending, Slo, figures
from benchmarks.serving.overhead import Steps
from benchmarks.serving.page import page
from benchmarks.serving.results import Results, Turn, markdown

SLO = Slo(1.0, 0.5)


def _turn(name: str, tokens_per_s: float, streams: int | None = None, rate: float | None = None) -> Turn:
    times = tuple((i + 1) / tokens_per_s for i in range(10))
    answers = [Answer(0.0, times, Ending.WHOLE, times[-1]), Answer(0.0, (), Ending.SHED, 0.002)]
    return Turn(name, streams, rate, answers, figures(answers, (0.0, times[-1] + 1e-9), SLO))


def _results() -> Results:
    results = Results("ours", SLO)
    for ours, theirs in ((40, 20), (30, 20)):
        results.turns += [_turn("ours", ours, streams=8), _turn("theirs", theirs, streams=8)]
    results.turns += [_turn("ours", 40, rate=1.0), _turn("ours", 38, rate=3.0)]
    results.ready_s, results.peak_bytes = {"ours": 5.0}, {"ours": 2**30}
    results.steps = {8: Steps(100, 9.0, 10.0)}
    results.idle_steps = {8: Steps(50, 1.0, 2.0, 0.1)}
    results.parts = {"8 answers": {"products": 0.03, "host": 0.01}}
    return results


def test_ratios_are_of_rounds_and_answers_are_compared() -> None:
    (line,) = [x for x in markdown(_results()).splitlines() if x.startswith("| theirs")]
    assert "1.75 (1.50 to 2.00)" in line and "4 of 4" in line


def test_the_table_says_what_is_left_past_saturation() -> None:
    (line,) = [x for x in markdown(_results()).splitlines() if x.startswith("| ours") and "1.00/s" in x]
    assert "40.0 at 1.00/s" in line and "38.0 at 3.00/s" in line and "95%" in line
    assert "2 ms" in line  # the longest refusal


def test_overhead_is_a_share_of_a_step() -> None:
    text = markdown(_results())
    (line,) = [x for x in text.splitlines() if x.startswith("| 8 ") and "10.0%" in x]
    # 10 ms of 100 between two steps, and 2 ms of work in a step of 100 ms.
    assert ["90.0", "10.00", "10.0%", "2.00", "2.0%"] == [c.strip() for c in line.split("|")[2:7]]
    assert "30.0 (75%)" in text


def test_every_table_is_markdown_with_columns() -> None:
    for table in markdown(_results()).strip().split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert len({len(line) for line in table.splitlines()}) == 1


def test_what_was_left_out_has_no_table() -> None:
    results = Results("ours", SLO, turns=[_turn("ours", 40, streams=1)])
    assert "past saturation" not in markdown(results) and "1 stream " in markdown(results)


def test_the_page_needs_no_other_file() -> None:
    text = page(_results(), "| <a> |", "about")
    assert "data:image/png;base64," in text and "&lt;a&gt;" in text and 'src="http' not in text


def test_rows_are_json() -> None:
    rows = _turn("ours", 40, streams=8).rows(3)
    assert [row["kind"] for row in rows] == ["request", "request", "figures"]
    assert "NaN" not in json.dumps(rows) and not math.isnan(rows[-1]["shed_s"])
