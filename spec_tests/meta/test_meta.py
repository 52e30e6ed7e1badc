"""Every fault is caught by the rule that names it; what is right in another way passes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import hypothesis
import pytest

from ..adapters import reference
from ..implementation import Implementation
from ..replay import checks
from ..report import rules_of
from ..rules import RULES
from .faults import FAULTS, Fault
from .variants import VARIANTS, TimeFirst

SOURCE = open(reference.compressive.__file__).read()
QUICK = hypothesis.settings.get_profile("quick")
hypothesis.settings.register_profile("few", QUICK, max_examples=8)


def changed(changes: tuple[tuple[str, str], ...]) -> ModuleType:
    """`compressive.py` with other text in some places."""
    source = SOURCE
    for old, new in changes:
        assert old in source, f"compressive.py has no {old!r} any more"
        source = source.replace(old, new)
    module = sys.modules["compressive_changed"] = ModuleType("compressive_changed")
    exec(compile(source, "compressive_changed.py", "exec"), module.__dict__)
    return module


@contextmanager
def profile(name: str) -> Iterator[None]:
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.load_profile(name)
    yield
    hypothesis.settings.load_profile(before)


def failure(check: Callable[[Implementation], None], impl: Implementation) -> Exception | None:
    """What a check raises if it fails."""
    try:
        check(impl)
    except pytest.skip.Exception:
        return None
    except Exception as error:
        return error
    return None


@pytest.mark.elsewhere
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.rule}: {fault.what}")
def test_a_fault_is_caught_by_the_rule_that_names_it(fault: Fault):
    impl = Implementation(reference.Adapter(changed(fault.changes)), fault.what)
    of_the_rule = [check for name, check in checks().items() if fault.rule in rules_of(name)]
    of_the_rule.reverse()  # a file's later checks are the quicker ones
    with profile("quick"):
        caught = any(failure(check, impl) is not None for check in of_the_rule)
    assert caught, f"{fault.rule} holds"


def test_there_is_a_fault_for_every_rule():
    assert {fault.rule for fault in FAULTS} == set(RULES)


@pytest.mark.elsewhere
@pytest.mark.parametrize("name", VARIANTS)
def test_a_right_implementation_of_another_design_passes(name: str):
    declares, lacks, changes = VARIANTS[name]
    kind = TimeFirst if declares.get("layout") == "time_first" else reference.Adapter
    adapter = kind(changed(changes))
    adapter.declares = {**adapter.declares, "name": name, **declares}
    for call in lacks:
        setattr(adapter, call, None)
    impl = Implementation(adapter, name)
    with profile("few"):
        found = {test: failure(check, impl) for test, check in checks().items()}
    failed = [f"{test}: {error}" for test, error in found.items() if error is not None]
    assert not failed, "\n".join(failed)
