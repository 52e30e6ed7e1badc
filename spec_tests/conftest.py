"""The suite's options, the implementation under test, and the profiles of Hypothesis."""

import argparse
import os
import shlex
from importlib.util import find_spec
from typing import IO

import pytest
import torch

from . import elsewhere
from .adapter import CHOICES
from .implementation import Implementation, Unusable, check_usable, load
from .replay import checks
from .report import SpecReport
from .rules import RULES
from .support import PROFILES, prepare, supported, torch_random

REFERENCE = "spec_tests.adapters.reference"
SEEDS = range(2**32)
OUTPUTS = {
    "spec_report": "write the verdicts as JSON",
    "spec_markdown": "write the verdicts as Markdown, for a pull request",
    "spec_badge": "write the verdicts as a badge: JSON for an endpoint of shields.io",
}
collect_ignore = []


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("spec", "the rules of the Compressive Transformer").addoption
    add("--impl", metavar="ADAPTER", help="path/to/adapter.py or module.path, and :Name if need be")
    add("--spec-profile", choices=list(PROFILES), default="default", help="how many examples")
    add("--spec-seed", type=int, default=0, metavar="N", help="other random examples")
    add("--spec-device", default="cpu", metavar="DEVICE", help="where models run: cpu, cuda, ...")
    add("--spec-dtype", choices=CHOICES["dtype"], help="instead of the one declared")
    for name, what in OUTPUTS.items():
        add(flag(name), metavar="FILE", help=what)


def flag(name: str) -> str:
    """spec_report -> --spec-report"""
    return "--" + name.replace("_", "-")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.impl is None and find_spec("compressive") is None:
        raise pytest.UsageError("--impl: name your adapter (there is no compressive.py here)")
    if option.spec_seed not in SEEDS:
        expected = f"expected a number from 0 to {SEEDS[-1]}"
        raise pytest.UsageError(f"--spec-seed {option.spec_seed}: {expected}")
    device = tried(option.spec_device)
    if option.impl is not None or device.type != "cpu" or option.spec_dtype is not None:
        # without the files that are about compressive.py alone, and as it is
        collect_ignore.extend(["test_golden.py", "test_reference.py", "meta"])
        collect_ignore.extend(["test_train.py", "test_train_runs.py"])
        collect_ignore.extend(["test_compare.py", "test_evidence.py"])
    else:
        config.pluginmanager.register(elsewhere, "elsewhere")
    spec = option.impl or REFERENCE
    try:
        impl = load(spec, device, option.spec_dtype)
        check_names(impl)
        prepare(option.spec_profile, option.spec_seed, impl.dtype, device)
        check_usable(impl, supported(impl))
    except Unusable as error:
        raise pytest.UsageError(f"--impl {spec}: the adapter cannot be used: {error}") from None
    config.pluginmanager.register(SpecReport(config, impl, opened(option)), "spec_report")


def check_names(impl: Implementation) -> None:
    """Raise Unusable for a test that is declared of and does not exist."""
    for field in ("known", "not_claimed"):
        for name in getattr(impl.declared, field):
            if name not in RULES and name not in checks():
                raise Unusable(f"declares[{field!r}] names {name!r}, no rule and no test")


def tried(name: str) -> torch.device:
    """The device of this name, once a number was there and back."""
    try:
        number = torch.ones(1, device=name)
        number.item()
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise pytest.UsageError(f"--spec-device {shlex.quote(name)}: {why}") from None
    return number.device


def opened(option: argparse.Namespace) -> dict[str, IO[str]]:
    """The files that are to be written at the end, opened now: what cannot be is found out before
    the first test, and verdicts of an earlier run are gone even if this one does not end."""
    files: dict[str, IO[str]] = {}
    options: dict[str, str] = {}
    for name in OUTPUTS:
        path = getattr(option, name)
        if path is None:
            continue
        said = f"{flag(name)} {shlex.quote(path)}"
        other = options.setdefault(os.path.realpath(path), name)
        if other != name:
            raise pytest.UsageError(f"{said}: {flag(other)} has the same file")
        try:
            files[name] = open(path, "w", encoding="utf-8")
        except OSError as error:
            raise pytest.UsageError(f"{said}: {error.strerror}") from None
    return files


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch_random.seed(0)


@pytest.fixture(scope="session")
def impl(pytestconfig: pytest.Config) -> Implementation:
    return pytestconfig.pluginmanager.get_plugin("spec_report").impl
