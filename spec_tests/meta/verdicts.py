"""The verdicts of the suite on the shipped adapters, side by side:

python -m spec_tests.meta.verdicts --write                  all into the table of spec_tests/README.md
python -m spec_tests.meta.verdicts sonnet --write           this one, in an environment of its own
python -m spec_tests.meta.verdicts --seeds 25 --profile quick --jobs 2    are all the same?
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..rules import RULES

README = Path(__file__).parents[1] / "README.md"
START = "<!-- verdicts -->\n"
END = "<!-- end -->"
COLUMNS = Path(__file__).with_name("verdicts.json")  # what the table is made of
ADAPTERS = ("reference", "labml", "lucidrains", "sonnet", "transformer_sequential")
ADAPTERS += ("long_context_transformers", "calliope", "cs282", "thesis")


def report_on(adapter: str, profile: str, seed: int) -> dict:
    """The report of one run, or {} where the adapter cannot be used here."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "spec_tests", "-q", "-p", "no:cacheprovider"]
        command += ["--impl", f"spec_tests.adapters.{adapter}", "--spec-report", str(file)]
        command += ["--spec-profile", profile, "--spec-seed", str(seed)]
        ran = subprocess.run(command, cwd=README.parents[1], capture_output=True, text=True)
        if file.exists() and file.stat().st_size > 0:
            return json.loads(file.read_text())
        said = (ran.stderr or ran.stdout).strip().splitlines()
        print(f"{adapter} left out: {said[-1] if said else ran.returncode}", file=sys.stderr)
        return {}


def column(report: dict) -> dict:
    """What the table shows of a report."""
    about = report["implementation"]
    return {
        "name": about["name"],
        "version": about["version"],
        "rules": report["rules_version"],
        "profile": about["profile"],
        "date": time.strftime("%Y-%m-%d"),
        "verdicts": {rule["id"]: rule["verdict"] for rule in report["rules"]},
    }


def table(columns: list[dict]) -> str:
    """A column for each implementation, in Markdown."""
    rows = [["", "", *(x["name"] for x in columns)]]
    rows.append(["---"] * len(rows[0]))
    for about in ("version", "rules", "profile", "date"):
        rows.append([about, "", *(x[about] for x in columns)])
    for rule, (sentence, _, level) in RULES.items():
        verdicts = [x["verdicts"].get(rule, "NOT RUN") for x in columns]
        shown = [verdict.replace("NOT CLAIMED", "–") for verdict in verdicts]
        rows.append([rule, f"{sentence} ({level})", *shown])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The verdicts on the shipped adapters.")
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help=", ".join(ADAPTERS))
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--profile", default="default", help="--spec-profile")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="put these into README.md's table")
    args = parser.parse_args()
    found = {}
    differ = False
    with ThreadPoolExecutor(args.jobs) as pool:
        for adapter in args.adapters or ADAPTERS:
            runs = pool.map(lambda n, a=adapter: report_on(a, args.profile, n), range(args.seeds))
            runs = [run for run in runs if run]
            if not runs:
                continue
            found[adapter] = column(runs[0])
            for n, run in enumerate(runs):
                for one, other in zip(runs[0]["rules"], run["rules"], strict=True):
                    if one["verdict"] != other["verdict"]:
                        differ = True
                        verdict = f"{other['verdict']} with seed {n}, {one['verdict']} with seed 0"
                        print(f"{adapter} {one['id']}: {verdict}", flush=True)
    columns = json.loads(COLUMNS.read_text()) | found  # read now: another run may have written
    text = table([columns[adapter] for adapter in ADAPTERS if adapter in columns])
    print(text)
    if args.seeds > 1:
        print(f"seeds 0 to {args.seeds - 1}: {'they differ' if differ else 'the same verdicts'}")
    if args.write:
        COLUMNS.write_text(json.dumps(columns, indent=1) + "\n")
        before, rest = README.read_text().split(START)
        README.write_text(before + START + text + END + rest.split(END, 1)[1])
    sys.exit(differ)


if __name__ == "__main__":
    main()
