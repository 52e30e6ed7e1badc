"""A report (README.md has its fields) in a line, as a badge, and as Markdown."""

from collections import Counter
from html import escape
from typing import Any

VERDICTS = ("PASS", "FAIL", "KNOWN", "UNEXPECTED PASS", "NOT CLAIMED", "NOT RUN")
COLOURS = {  # of a badge: that of the first of these that there is
    "FAIL": "red",
    "UNEXPECTED PASS": "red",
    "NOT RUN": "lightgrey",
    "KNOWN": "yellow",
    "NOT CLAIMED": "green",
    "PASS": "brightgreen",
}


def label(report: dict[str, Any]) -> str:
    return f"compressive-transformer rules {report['rules_version']}"


def in_a_line(report: dict[str, Any]) -> str:
    """How many rules pass, and what is with the others: `28/30, 2 not claimed`."""
    counts = Counter(rule["verdict"] for rule in report["rules"])
    line = f"{counts['PASS']}/{counts.total()}"
    for verdict in VERDICTS[1:]:
        if counts[verdict]:
            line += f", {counts[verdict]} {verdict.lower()}"
    return line


def badge(report: dict[str, Any]) -> dict[str, Any]:
    """What an endpoint of shields.io answers (https://shields.io/badges/endpoint-badge)."""
    found = {rule["verdict"] for rule in report["rules"]}
    worst = next(verdict for verdict in COLOURS if verdict in found)
    return {
        "schemaVersion": 1,
        "label": label(report),
        "message": in_a_line(report),
        "color": COLOURS[worst],
    }


def markdown(report: dict[str, Any]) -> str:
    """For a pull request: a table of the rules that were tested, and behind it the failures."""
    about = dict(report["implementation"])
    name = f"{about.pop('name')} {about.pop('version')}".strip()
    with_what = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = [f"### {label(report)}: {in_a_line(report)}", ""]
    lines += [cell(f"{name}: {with_what}"), ""]
    lines += ["| rule | level | verdict | |", "| --- | --- | --- | --- |"]
    failures = {}
    for rule in report["rules"]:
        if rule["verdict"] == "NOT RUN":
            continue
        said = cell(rule["reason"] or rule["sentence"])
        lines.append(f"| {rule['id']} | {rule['level']} | {rule['verdict']} | {said} |")
        if rule["verdict"] == "FAIL":
            failed = [check for check in rule["checks"] if check["outcome"] == "failed"]
            failures.update({check["name"]: check["message"] for check in failed})
    for test, message in failures.items():
        lines += ["", f"<details><summary>{test}</summary>", ""]
        lines += ["```text", message, "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """On one line, with nothing that Markdown reads as other than text."""
    line = " ".join(text.split())
    return escape(line, quote=False).replace("|", "\\|")
