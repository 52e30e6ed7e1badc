"""benchmarks/evidence.py: its tasks are what it says, and all of it runs and goes on. What it found
is in benchmarks/evidence.md, and no test's business."""

import contextlib
import io
import random
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from pytest import approx

from benchmarks import evidence, evidence_report

from .processes import process_context


def test_recall_asks_for_what_was_written():
    symbols, distances = evidence.recall_row(random.Random(0), 20_000)
    values: dict[int, tuple[int, int]] = {}  # of the keys that wait: value, place of the write
    asked = 0
    for at, symbol in enumerate(symbols[:-1]):
        if evidence.WRITE <= symbol < evidence.QUERY:
            key, value = divmod(symbol - evidence.WRITE, evidence.VALUES)
            assert key not in values
            values[key] = value, at
        if evidence.QUERY <= symbol < evidence.ANSWER:
            value, written = values.pop(symbol - evidence.QUERY)
            assert distances[at] == at - written >= evidence.NEAREST
            assert symbols[at + 1] == evidence.ANSWER + value
            asked += 1
        else:
            assert distances[at] == 0
    assert asked > 1000
    assert max(distances) <= evidence.FURTHEST + 2 * evidence.KEYS


def test_recall_has_distances_that_are_log_uniform():
    _, distances = evidence.recall_row(random.Random(1), 200_000)
    drawn = [distance for distance in distances if distance]
    middle = (evidence.NEAREST * evidence.FURTHEST) ** 0.5
    assert sum(distance < middle for distance in drawn) / len(drawn) == approx(0.5, abs=0.03)


def test_recall_counts_answers_alone():
    symbols, distances, targets = evidence.recall_rows(seed=0, rows=3, segments=9)
    assert symbols.shape == distances.shape == targets.shape == (3, 9 * evidence.SEGMENT)
    counted = targets != evidence.NOT_COUNTED
    assert counted.any() and counted.equal(distances > 0)
    assert (targets[counted] >= evidence.ANSWER).all()
    assert (symbols[counted] >= evidence.QUERY).all() and (symbols[counted] < evidence.ANSWER).all()


def test_words_are_sorted_by_how_far_back_they_stood():
    row = b"spam " + b"eggs " + b"." * 40 + b"spam eggs on"
    bits = torch.arange(len(row) - 1.0)[None]  # byte i costs i - 1
    totals = evidence.bits_of_words(bits, [row])
    assert totals["32-64"] == [49 + 50 + 51 + 52 + 54 + 55 + 56 + 57, 8]
    assert totals["not before"] == [4 + 5 + 6 + 7, 4]  # the row's first byte is nobody's
    assert sum(count for _, count in totals.values()) == 12


def test_a_bucket_begins_with_its_edge():
    assert evidence.bucket(31) == "0-32"
    assert evidence.bucket(32) == "32-64"
    assert evidence.bucket(4095) == "1024-4096"
    assert evidence.bucket(4096) == "4096 or more"
    assert evidence.bucket(None) == "not before"


def test_rows_of_text_go_on_behind_its_end():
    job = evidence.text_job("stdlib", "", {}, seed=3, quick=True, steps=2)
    data = bytes(range(100))
    rows = evidence.text_rows(data, job)
    assert rows.shape == (job.batch_size, 2 * evidence.SEGMENT + 1)
    assert ((rows[:, 1:] - rows[:, :-1]) % 100 == 1).all()
    assert len(rows[:, 0].unique()) == job.batch_size


def test_intervals_are_students():
    mean, error = evidence_report.mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert error == approx(3.182 * (5 / 3) ** 0.5 / 2, rel=1e-3)


def run(*options: str) -> str:
    """evidence.py's main in this process and forks that have torch loaded already, on few rows:
    what it prints."""
    printed = io.StringIO()

    def make_jobs(*choices, original=evidence.make_jobs) -> list[evidence.Job]:
        return [replace(job, batch_size=2) for job in original(*choices)]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(evidence, "make_jobs", make_jobs)
        patch.setattr(evidence, "get_context", lambda kind: process_context())
        patch.setattr(sys, "argv", [evidence.__file__, *options])
        evidence.main()
    return printed.getvalue()


@pytest.mark.elsewhere
def test_evidence_runs_goes_on_and_has_its_tables():
    with TemporaryDirectory() as folder:
        page = Path(folder, "evidence.md")
        lines = Path(folder, "evidence.jsonl")
        page.write_text("before\n<!-- text -->\nreplaced\n<!-- end -->\nafter\n")
        options = "--quick --steps 20 --texts stdlib --processes 1 --out".split()
        options.append(folder)
        run(*options)
        records = lines.read_text().split("\n")[1:]
        assert len(records) == 2 * (10 + 3)
        text = page.read_text()
        assert text.startswith("before\n<!-- text -->\n| text ") and "replaced" not in text
        assert "<!-- end -->\nafter\n" in text
        for arm in evidence.RECALL_ARMS:
            assert f"\n| {arm} | " in section(text, "recall")
        for arm in evidence_report.PAPER:
            assert f"\n| {arm} | " in section(text, "order")
        for name in ("text", "c_mem_len", "attention", "compression loss"):
            assert "\n| stdlib | Compressive, 48 + 48 | " in section(text, name)
        for bucket in evidence.bucket_names():
            assert f"\n| {bucket} | " in section(text, "repeats")
        assert "nan" not in text

        # One run was not there yet, one half written: these two alone are run again.
        lines.write_text("\n".join(records[:-2]) + "\n" + records[-1][:50])
        assert run(*options).count(" min left") == 2
        whole = [line for line in lines.read_text().splitlines() if line.endswith("}")]
        assert len(whole) == len(records)
        assert run(*options).count(" min left") == 0


def section(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", "19"), "--steps must be at least 20, got 19"),
        (("--processes", "0"), "--processes must be at least 1, got 0"),
        (("--out", __file__), "test_evidence.py: File exists"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence.py", *options])
    with pytest.raises(SystemExit) as stop:
        evidence.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
