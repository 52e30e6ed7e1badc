"""The suite's options, the implementation under test, and the profiles of Hypothesis."""

from importlib.util import find_spec

import pytest

from . import elsewhere
from .implementation import Implementation, Unusable, check_usable, load
from .report import SpecReport
from .support import PROFILES, prepare, supported, torch_random

REFERENCE = "spec_tests.adapters.reference"
collect_ignore = []


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("spec", "the rules of the Compressive Transformer").addoption
    add("--impl", metavar="ADAPTER", help="path/to/adapter.py or module.path, and :Name if need be")
    add("--spec-profile", choices=list(PROFILES), default="default", help="how many examples")
    add("--spec-seed", type=int, default=0, metavar="N", help="other random examples")
    add("--spec-report", metavar="FILE", help="write the verdicts as JSON")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.impl is None and find_spec("compressive") is None:
        raise pytest.UsageError("--impl: name your adapter (there is no compressive.py here)")
    if option.impl is not None:  # the files that are about compressive.py alone
        collect_ignore.extend(["test_golden.py", "test_reference.py", "meta"])
        collect_ignore.extend(["test_train.py", "test_train_runs.py"])
    else:
        config.pluginmanager.register(elsewhere, "elsewhere")
    spec = option.impl or REFERENCE
    try:
        impl = load(spec)
        prepare(option.spec_profile, option.spec_seed, impl.dtype)
        check_usable(impl, supported(impl))
    except Unusable as error:
        raise pytest.UsageError(f"--impl {spec}: the adapter cannot be used: {error}") from None
    config.pluginmanager.register(SpecReport(config, impl), "spec_report")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch_random.seed(0)


@pytest.fixture(scope="session")
def impl(pytestconfig: pytest.Config) -> Implementation:
    return pytestconfig.pluginmanager.get_plugin("spec_report").impl
