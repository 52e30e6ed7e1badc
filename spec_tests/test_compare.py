"""benchmarks/compare.py: takes turns, and prints all its tables. What it measures is in
benchmarks/README.md, and no test's business."""

import contextlib
import io
import re
import sys
from argparse import Namespace
from collections.abc import Callable

import pytest

from benchmarks import compare

from .processes import process_context


def run(*options: str, peers: tuple[str, ...] = ()) -> str:
    """compare.py's main in this process, but for memory, which is counted in forks that have torch
    loaded already; without the packages of others, if these are not named: what it prints."""
    printed = io.StringIO()
    context = process_context()

    def afresh(call: Callable, *args: object, original=compare.afresh) -> object:
        return original(call, *args) if call is compare.peak else call(*args)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(compare, "PEERS", peers)
        patch.setattr(compare, "LENGTHS", (16, 32))
        patch.setattr(compare, "afresh", afresh)
        patch.setattr(compare, "get_context", lambda kind: context)
        patch.setattr(sys, "argv", [compare.__file__, *options])
        compare.main()
    return printed.getvalue()


def test_compare_prints_all_its_tables():
    options = "--plain --dtypes float32 --settings tiny --rounds 1 --seconds 0.01"
    printed = run(*options.split())
    conditions, *tables = printed.split("\n\n")
    assert "1 rounds" in conditions
    titles = [table.partition(":")[0].strip() for table in tables[::2]]
    assert titles == list(compare.TITLES.values())
    for table in tables[1::2]:
        header, rule, *rows = table.splitlines()
        assert rule.count("---") == header.count("|") - 1
        assert rows
        for row in rows:
            assert row.count("|") == header.count("|")
            assert not re.search(r"\b(nan|inf)\b", row)
    assert "| settings | dtype | reference | plain | x plain | limit | share of it |" in printed


def test_compare_has_the_dtypes_of_the_device_and_the_peers_that_are_asked_for():
    options = "--tables memory --settings tiny --peers"
    printed = run(*options.split(), peers=("labml", "lucidrains"))
    assert "left out" not in printed
    conditions, _, table = printed.split("\n\n")
    assert "; no peers; " in conditions
    assert re.findall(r"^\| tiny \| (\w+) \|", table, re.MULTILINE) == ["float32", "bfloat16"]


def test_compare_takes_turns():
    """Each in every round, with as many steps as a turn has time for, and two at least."""
    calls = []

    def measure(subject: str, count: int) -> float:
        calls.append((subject, count))
        return {"fast": 0.25, "slow": 3.0}[subject]

    args = Namespace(rounds=2, seconds=1.0)
    found = compare.alternate(args, {"a": "fast", "b": "slow"}, measure)
    assert calls[:4] == [("fast", 3), ("fast", 1), ("slow", 3), ("slow", 1)]
    assert calls[4:] == [("fast", 4), ("slow", 2)] * 2
    assert found == {"a": [0.25, 0.25], "b": [3.0, 3.0]}


def test_compare_shows_medians_and_ranges():
    assert compare.shown([0.5, 0.125, 0.25], 2) == "8 (4-16)"
    assert compare.ratio([1.0, 2.0, 4.0], [4.0, 4.0, 4.0]) == "2.00 (1.00-4.00)"


def test_compare_divides_by_the_others(monkeypatch):
    """Rates by the reference's, memory by that of the smallest package of others."""
    found = {"reference": [1.0], "plain": [2.0], "labml": [4.0]}
    cells = ["8 (8-8)", "4 (4-4)", "2 (2-2)", "2.00 (2.00-2.00)", "4.00 (4.00-4.00)"]
    assert compare.rates_and_ratios(found, 8) == cells
    mib = {"reference": 150.0, "plain": 100.0, "labml": 300.0, "lucidrains": 200.0}
    monkeypatch.setattr(compare, "afresh", lambda peak, name, *settings: mib[name])
    cells = ["150", "100", "300", "200", "0.75"]
    assert compare.memory(Namespace(), list(mib), "tiny", "float32") == cells


@pytest.mark.parametrize("name", ["reference", "plain"])
def test_compare_recomputes_in_both_of_ours(name):
    settings, batch = compare.settings_of("tiny")
    subject = compare.Subject(name, settings, batch, "cpu", "float32", recompute=True)
    for part in (subject.model, *subject.model.layers):
        assert part.config.recompute == (part is subject.model)


@pytest.mark.parametrize(
    "options, line",
    [
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--seconds nan", "--seconds must be above 0 and finite, got nan"),
        ("--seconds -1", "--seconds must be above 0 and finite, got -1.0"),
        ("--seconds inf", "--seconds must be above 0 and finite, got inf"),
        ("--settings huge", "argument --settings: invalid choice: 'huge'"),
        ("--dtypes float32 tf32", "--dtypes tf32 needs --device cuda"),
        ("--peers nobody", "argument --peers: invalid choice: 'nobody'"),
        ("--settings transformer-xl", "transformer-xl has no compressed memory: give --peers, and"),
    ],
)
def test_compare_refuses_in_one_line(options, line, capsys, monkeypatch):
    monkeypatch.setattr(compare, "load", lambda name: None)  # as if the package were there
    monkeypatch.setattr(compare, "conditions", None)  # what is not refused ends here
    with pytest.raises(SystemExit) as end:
        run(*options.split(), peers=("labml",))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert line in error and error.count("\n") == 1
