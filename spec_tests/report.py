"""What the suite says: an explanation of every failure, a table of the rules, and JSON."""

import json
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any

import hypothesis
import pytest
import torch

from .adapter import Settings
from .implementation import Implementation, Unusable, place_of
from .rules import DESIGN, RULES, SHARPEST_FIRST, VERSION
from .summary import VERDICTS, badge, markdown
from .support import Broken, Case

SCHEMA = 1
COLOURS = {"PASS": {"green": True}, "FAIL": {"red": True}, "UNEXPECTED PASS": {"red": True}}


def rules_of(test: str) -> list[str]:
    """The rules that a test is named after: test_ATT_3_MEM_1_... -> ATT-3, MEM-1."""
    prefix = re.match(r"test_((?:[A-Z]+_[0-9]_)*)", test)
    found = re.findall(r"[A-Z]+_[0-9]", prefix[1] if prefix else "")
    return [rule.replace("_", "-") for rule in found]


def bluntness(name: str) -> tuple[bool, int]:
    """How little the failure of a test says where others fail, too."""
    rules = rules_of(name.split("::")[-1])
    ranks = [SHARPEST_FIRST.index(rule) for rule in rules]
    return len(rules) > 2, min(ranks, default=len(RULES))


def code(value: Any) -> str:
    """A drawn value as one would type it."""
    if isinstance(value, Case):
        return f"Case({code(value.settings)}, {value.schedule})"
    if isinstance(value, Settings):
        changed = {k: v for k, v in value._asdict().items() if v != Settings._field_defaults[k]}
        return f"Settings({', '.join(f'{k}={v!r}' for k, v in changed.items())})"
    return repr(value)


def broken_rules(name: str, error: BaseException) -> list[str]:
    """Those of a test's rules that its failure is about."""
    rule = getattr(error, "rule", None)
    return [rule] if rule else rules_of(name)


def explain(
    name: str, error: BaseException, impl: Implementation, options: Mapping[str, Any]
) -> str:
    """Everything that helps: the rule, what was expected and what came, the settings, the likely
    causes, and how to see it again, with these options."""
    drawn = getattr(error, "drawn", {})
    rules = broken_rules(name, error)
    lines = [f"{rule} ({RULES[rule].level}): {RULES[rule].sentence}" for rule in rules]
    if isinstance(error, Broken):
        lines += [f"  looked at  {error.what}", f"  expected   {error.expected}"]
        lines += [f"  got        {error.got}"]
    elif isinstance(error, Unusable):
        lines += [f"  raised     {error}"]
    else:
        said = str(error).strip().splitlines() or [""]
        lines += [f"  raised     {type(error).__name__}: {said[0]}"]
        lines += [f"  in         {place_of(error) or 'an unknown place'}"]
    lines += [f"  with       {name} = {code(value)}" for name, value in drawn.items()]
    if isinstance(error, Broken) and error.cause:
        lines.append(f"  cause      {error.cause} (that is exactly what came)")
    elif isinstance(error, Unusable):
        lines.append("  or         the adapter has a mistake: adapter.py says what is expected")
    elif not isinstance(error, Broken) and place_of(error):  # it has its place, and no perhaps
        lines.append("  or         no model can have these settings: then build() may say so")
    else:
        causes = [cause for rule in rules for cause in RULES[rule].causes]
        lines += [f"  perhaps    {cause}" for cause in causes]
        fields: list[str] = []
        for rule in rules:
            fields += DESIGN.get(rule, ())
        if fields:
            named = ", ".join(dict.fromkeys(fields))
            lines += [f"  or         it is meant so: then declare {named}"]
    arguments = [repr(name), repr(impl.path), *(f"{k}={code(v)}" for k, v in drawn.items())]
    arguments += [f"{option}={value!r}" for option, value in options.items()]
    lines += [
        "  again      from spec_tests.replay import Case, Settings, replay",
        f"             replay({', '.join(arguments)})",
    ]
    return "\n".join(lines)


NOWHERE: Mapping[str, IO[str]] = {}


class SpecReport:
    """The pytest plugin that gathers the verdicts."""

    def __init__(
        self, config: pytest.Config, impl: Implementation, files: Mapping[str, IO[str]] = NOWHERE
    ) -> None:
        self.config = config
        self.impl = impl
        self.files = files
        self.checks: dict[str, list[dict]] = {rule: [] for rule in RULES}

    def header(self) -> dict[str, str]:
        return {
            "name": self.impl.declared.name,
            "version": self.impl.declared.version,
            "adapter": self.impl.path,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypothesis": hypothesis.__version__,
            "device": str(self.impl.device),
            "dtype": self.impl.declared.dtype,
            "profile": self.config.option.spec_profile,
            "seed": self.config.option.spec_seed,
        }

    def pytest_report_header(self) -> str:
        about = self.header()
        title = f"{about.pop('name')} {about.pop('version')}".strip()
        return f"rules {VERSION} of {title}: " + ", ".join(f"{k} {v}" for k, v in about.items())

    def other_options(self) -> dict[str, Any]:
        """Those that change what is tested, where they are given."""
        options = {}
        for name, default in (("spec_seed", 0), ("spec_device", "cpu"), ("spec_dtype", None)):
            value = getattr(self.config.option, name)
            if value != default:
                options[name] = value
        return options

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        rules = rules_of(item.name)
        declared = self.impl.declared.not_claimed
        reasons = [self.reason(declared, item.name, rule) for rule in rules]
        if rules and all(reasons):
            pytest.skip(reasons[0])

    @staticmethod
    def reason(declared: Mapping[str, str], test: str, rule: str) -> str | None:
        """What is declared of a test by its name, or of the rule."""
        return declared.get(test) or declared.get(rule)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        rules = rules_of(item.name)
        if not rules or (report.when != "call" and report.outcome == "passed"):
            return report
        seconds = round(call.duration, 3)
        if report.outcome == "failed":
            error = call.excinfo.value
            message = explain(item.name, error, self.impl, self.other_options())
            report.longrepr = message
            about = broken_rules(item.name, error)
            not_claimed = self.impl.declared.not_claimed
            excused = {rule: self.reason(not_claimed, item.name, rule) for rule in about}
            for rule in rules:
                if rule in about and not excused[rule]:
                    self.add(rule, item.name, "failed", seconds, message)
                else:
                    first = f"where {about[0]} fails first, it does not come to this"
                    self.add(rule, item.name, "skipped", seconds, excused.get(rule) or first)
            known = [self.reason(self.impl.declared.known, item.name, rule) for rule in about]
            if all(known):
                report.outcome = "skipped"
                report.wasxfail = known[0]
            if all(excused.values()):
                report.outcome = "skipped"
                report.longrepr = (str(item.path), None, excused[about[0]])
        elif report.outcome == "skipped":
            for rule in rules:
                reason = self.reason(self.impl.declared.not_claimed, item.name, rule)
                self.add(rule, item.name, "skipped", seconds, reason or call.excinfo.value.msg)
        else:
            for rule in rules:
                self.add(rule, item.name, "passed", seconds, self.impl.left_out)
        self.impl.left_out = ""
        return report

    def add(self, rule: str, name: str, outcome: str, seconds: float, message: str) -> None:
        check = {"name": name, "outcome": outcome, "seconds": seconds, "message": message}
        self.checks[rule].append(check)

    def verdict(self, rule: str) -> tuple[str, str]:
        """The verdict on a rule, and its reason."""
        checks = self.checks[rule]
        declared = self.impl.declared.known
        if not checks:
            return "NOT RUN", ""
        messages: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
        for check in sorted(checks, key=lambda check: bluntness(check["name"])):
            messages[check["outcome"]][check["name"]] = check["message"]
        passed = messages["passed"]
        failed = messages["failed"]
        skipped = messages["skipped"]
        known = {name: declared.get(name) or declared.get(rule) for name in failed}
        for name, message in failed.items():
            if not known[name]:
                return "FAIL", in_short(message)
        as_known = [declared[name] for name in passed if name in declared]
        if not failed and passed and rule in declared:
            as_known.append(declared[rule])
        if as_known:
            return "UNEXPECTED PASS", f"declared as known: {as_known[0]}"
        if failed:
            return "KNOWN", "; ".join(dict.fromkeys(known.values()))
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        if not passed:
            return "NOT CLAIMED", reasons
        said = []
        if skipped:
            said.append(f"{len(skipped)} of {len(checks)} checks not claimed: {reasons}")
        for left_out in passed.values():
            if left_out:
                said.append(f"without {left_out}")
        return "PASS", "; ".join(said)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        verdicts = {rule: self.verdict(rule) for rule in RULES if self.checks[rule]}
        if not verdicts:
            return
        about = self.header()
        terminalreporter.section(f"rules {VERSION} of {about['name']} {about['version']}".rstrip())
        width = None
        if terminalreporter.isatty:
            width = shutil.get_terminal_size().columns
        for rule, (verdict, reason) in verdicts.items():
            sentence, _, level = RULES[rule]
            line = f"{rule:<7} {level:<6} {verdict:<15} {reason or sentence}"
            terminalreporter.write_line(line[:width], **COLOURS.get(verdict, {}))
        totals = self.totals()
        for level in ("MUST", "SHOULD"):
            counts = [f"{n} {verdict}" for verdict, n in totals[level].items() if n]
            terminalreporter.write_line(f"{level}: " + ", ".join(counts))

    def totals(self) -> dict[str, dict[str, int]]:
        totals = {level: dict.fromkeys(VERDICTS, 0) for level in ("MUST", "SHOULD")}
        for rule in RULES:
            totals[RULES[rule].level][self.verdict(rule)[0]] += 1
        return totals

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.stats.get("failed", []).sort(key=lambda report: bluntness(report.nodeid))
        unexpected = any(self.verdict(rule)[0] == "UNEXPECTED PASS" for rule in RULES)
        if unexpected and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        report = self.as_json(session)
        texts = {
            "spec_report": json.dumps(report, indent=1) + "\n",
            "spec_markdown": markdown(report),
            "spec_badge": json.dumps(badge(report)) + "\n",
        }
        for option, file in self.files.items():
            with file:
                file.write(texts[option])

    def as_json(self, session: pytest.Session) -> dict[str, Any]:
        """The verdicts as README.md documents them."""
        rules = []
        for rule, (sentence, _, level) in RULES.items():
            verdict, reason = self.verdict(rule)
            rules.append(
                {"id": rule, "level": level, "sentence": sentence, "verdict": verdict}
                | {"reason": reason, "checks": self.checks[rule]}
            )
        return {
            "schema": SCHEMA,
            "rules_version": VERSION,
            "implementation": self.header(),
            "exit_status": int(session.exitstatus),
            "totals": self.totals(),
            "rules": rules,
        }


def in_short(message: str) -> str:
    """Of an explanation the place, what was expected and what came, or what was raised."""
    said = {line[2:12].strip(): line[13:] for line in reversed(message.splitlines())}
    if "raised" in said:
        return said["raised"]
    return f"{said['looked at']}: expected {said['expected']}, got {said['got']}"
