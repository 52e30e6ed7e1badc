"""The verdicts of the suite on the shipped adapters, side by side:

python -m spec_tests.meta.verdicts                         the table of spec_tests/README.md
python -m spec_tests.meta.verdicts --write                 puts it there
python -m spec_tests.meta.verdicts --seeds 25 --profile quick --jobs 2    are all the same?
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..rules import RULES, VERSION

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- verdicts -->\n", "<!-- end -->"
ADAPTERS = ("reference", "labml", "lucidrains")


def verdicts(adapter: str, profile: str, seed: int) -> dict:
    """The report of one run, or {} where the adapter's package is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "spec_tests", "-q", "-p", "no:cacheprovider"]
        command += ["--impl", f"spec_tests.adapters.{adapter}", "--spec-report", str(report)]
        command += ["--spec-profile", profile, "--spec-seed", str(seed)]
        ran = subprocess.run(command, cwd=README.parents[1], capture_output=True, text=True)
        if report.exists():
            return json.loads(report.read_text())
        print(f"{adapter} left out: {(ran.stderr or ran.stdout).strip()}", file=sys.stderr)
        return {}


def table(reports: list[dict]) -> str:
    """The reports as a table in Markdown, a column for each."""
    columns = [
        [f"{report['implementation']['name']} {report['implementation']['version']}".strip()]
        + ["---"]
        + [rule["verdict"] for rule in report["rules"]]
        for report in reports
    ]
    sentences = [f"{rule.sentence} ({rule.level})" for rule in RULES.values()]
    columns = [[f"rules {VERSION}", "---", *RULES], ["", "---", *sentences], *columns]
    return "".join(f"| {' | '.join(row)} |\n" for row in zip(*columns, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="The verdicts on the shipped adapters.")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--profile", default="default", help="--spec-profile")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    reports, differ = [], False
    with ThreadPoolExecutor(args.jobs) as pool:
        for adapter in ADAPTERS:
            runs = pool.map(lambda n, a=adapter: verdicts(a, args.profile, n), range(args.seeds))
            runs = [run for run in runs if run]
            reports += runs[:1]
            for n, run in enumerate(runs):
                for one, other in zip(runs[0]["rules"], run["rules"], strict=True):
                    if one["verdict"] != other["verdict"]:
                        differ = True
                        verdict = f"{other['verdict']} with seed {n}, {one['verdict']} with seed 0"
                        print(f"{adapter} {one['id']}: {verdict}", flush=True)
    text = table(reports)
    print(text)
    if args.seeds > 1:
        print(f"seeds 0 to {args.seeds - 1}: {'they differ' if differ else 'the same verdicts'}")
    if args.write:
        if len(reports) < len(ADAPTERS):
            sys.exit("README.md is left as it was: a column is missing")
        readme = README.read_text()
        before, rest = readme.split(START)
        README.write_text(before + START + text + END + rest.split(END, 1)[1])
    sys.exit(differ)


if __name__ == "__main__":
    main()
