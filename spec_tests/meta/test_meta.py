"""Every fault is caught by the rule that names it; what is right in another way passes."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from torch import Tensor, nn

from .. import oracle, test_losses
from ..adapter import Settings
from ..adapters import reference
from ..implementation import Implementation, not_claimed
from ..replay import checks
from ..report import rules_of
from ..rules import RULES
from ..support import Broken, check, holds
from .designs import designs, failures
from .faults import FAULTS, PAST, Fault
from .variants import VARIANTS, TimeFirst

SOURCE = open(reference.compressive.__file__).read()
QUICK = hypothesis.settings.get_profile("quick")
hypothesis.settings.register_profile("few", QUICK, max_examples=3)
hypothesis.settings.register_profile("many", QUICK, max_examples=100)


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


def fault(what: str) -> Fault:
    (found,) = (fault for fault in FAULTS if fault.what == what)
    return found


BY_LOOPS = "test_ATT_3_MEM_5_LOSS_5_every_step_equals_the_loops"
LOSS = "test_LOSS_5_equals_the_definition_by_loops"
OF_GRADIENTS = "test_LOSS_2_leaves_the_language_model_loss_alone_in_every_step"


@pytest.mark.parametrize(("turns", "fails"), [((1e-6,), False), ((1e-6, 1e-8), True)])
def test_a_relu_that_turns_within_a_difference_is_no_fault(monkeypatch, turns: tuple, fails: bool):
    def with_a_turn(loss: Any, steps: Any, size: float) -> Tensor:
        slope = quotient(loss, steps, size)
        return slope + 1 if size in turns else slope

    quotient = test_losses.quotient
    monkeypatch.setattr(test_losses, "quotient", with_a_turn)
    with profile("few"):
        error = failure(
            test_losses.test_LOSS_2_its_gradients_are_the_derivatives,
            Implementation(reference.Adapter(), "right"),
        )
    assert (error is not None) == fails


@pytest.mark.parametrize(
    ("what", "check", "rule", "cause"),
    [
        ("scaled by the whole width", BY_LOOPS, "ATT-3", oracle.WIDE_SCALE),
        ("no shift", BY_LOOPS, "ATT-3", None),
        ("the block is one slot late", BY_LOOPS, "MEM-5", None),
        ("no scale", LOSS, None, oracle.NO_SCALE),
        ("a sum over layers", LOSS, None, "it is that of loss_reduction 'mean_square', loss_over_"),
        ("a parameter is not used", OF_GRADIENTS, None, "it is not used: no logits move with it"),
        ("keys and values are frozen", OF_GRADIENTS, None, "it was frozen"),
        ("a query does not see itself", "test_ATT_2_a_token_sees_itself", None, "the token is hid"),
        (
            "nothing ever leaves memory",
            "test_LOSS_6_falls_with_a_small_step_of_f_c_against_its_gradient",
            None,
            None,
        ),
    ],
)
def test_a_failure_says_what_surely_is_wrong(what: str, check: str, rule: str, cause: str | None):
    impl = Implementation(reference.Adapter(changed(fault(what).changes)), what)
    with profile("quick"):
        error = failure(checks()[check], impl)
    assert isinstance(error, Broken)
    assert error.rule == rule
    if cause is None:
        assert error.cause is None
    else:
        assert error.cause.startswith(cause)


SCALES = ("scale = q.size(-1) ** -0.5", "scale = q.size(-1) ** 0.5")
FEW_SCALES = ("scale = K**-0.5", "scale = K**0.5")
READS = (PAST, PAST.replace("c_mem, mem", "c_mem.flip(1), mem.flip(1)"))
SWAPPED = (
    ("scale * (q + content_bias[:, None, None])", "scale * (q + position_bias[:, None, None])"),
    (
        "q_position = scale * (q + position_bias[:, None, None])",
        "q_position = scale * (q + content_bias[:, None, None])",
    ),
    (
        "q_content = scale * (q + self.content_bias[:, None, None])",
        "q_content = scale * (q + self.position_bias[:, None, None])",
    ),
    (
        "q_position = scale * (q + self.position_bias[:, None, None])",
        "q_position = scale * (q + self.content_bias[:, None, None])",
    ),
)
WITH_BIAS = (
    (
        "q = attention.heads(attention.query(h))",
        "q = (attention.heads(attention.query(h)) + attention.content_bias[:, None, None])",
    ),
)
PROJECTED = (
    (
        "return scores.softmax(dim=-1, dtype=scores.dtype) @ v\n\n    # Lines 3",
        "read = scores.softmax(dim=-1, dtype=scores.dtype) @ v\n"
        "        weight = attention.output.weight.detach()\n"
        "        return read.movedim(0, 2).flatten(2) @ weight.T\n\n    # Lines 3",
    ),
)
AFTER = "self.__dict__['between'] = h.detach()"
PRE = "            h = h + self.dropout(attended)\n"
POST = "            h = self.attention_norm(h + self.dropout(attended))\n"
QUERIES = (
    (PRE, f"{PRE}            {AFTER}\n"),
    (POST, f"{POST}            {AFTER}\n"),
    ("(self.attention, x, old", "(self.attention, self.__dict__['between'], old"),
)


class OutputByInput(reference.Adapter):
    """Its matrices are those of nn.Linear."""

    def weights(self, model: nn.Module) -> dict:
        named = super().weights(model)
        for layer in named["layers"]:
            for name in ("query", "key", "value", "relative_key", "output"):
                layer[name] = layer[name].T
        return named


BIASES = (
    ("self.query = nn.Linear(D, D, bias=False)", "self.query = nn.Linear(D, D)"),
    ("self.key_value = nn.Linear(D, 2 * D, bias=False)", "self.key_value = nn.Linear(D, 2 * D)"),
    ("self.output = nn.Linear(D, D, bias=False)", "self.output = nn.Linear(D, D)"),
)


class WithBiases(reference.Adapter):
    """It names the biases of attention's projections, too."""

    def weights(self, model: nn.Module) -> dict:
        named = super().weights(model)
        for layer, weights in zip(model.layers, named["layers"], strict=True):
            weights["query_bias"] = layer.attention.query.bias
            key_bias, value_bias = layer.attention.key_value.bias.chunk(2)
            weights["key_bias"] = key_bias
            weights["value_bias"] = value_bias
            weights["output_bias"] = layer.attention.output.bias
        return named


def test_biases_are_compared_where_they_are_named():
    model = changed(BIASES)
    with profile("few"):
        for check in (BY_LOOPS, LOSS):
            checks()[check](Implementation(WithBiases(model), "with biases"))
        with pytest.raises(pytest.skip.Exception, match="does not name what is in layers.0.*query"):
            checks()[BY_LOOPS](Implementation(reference.Adapter(model), "without their names"))


@pytest.mark.elsewhere
def test_a_window_as_long_as_the_memories_is_no_fault_of_what_is_remembered():
    """A model with a longer memory has another window, and is no twin to read inputs from."""
    count = "check_input(self, tokens, memory)\n        if memory"
    hidden = "scores[..., S - T :].masked_fill_(future, -math.inf)"
    changes = (
        (
            count,
            f"globals()['WINDOW'] = self.config.mem_len + self.config.c_mem_len\n        {count}",
        ),
        (
            hidden,
            f"{hidden}\n        scores.masked_fill_(torch.ones(T, S).tril(S - T - WINDOW).bool(), -1e30)",
        ),
    )
    impl = Implementation(reference.Adapter(changed(changes)), "with a window")
    with profile("quick"):
        for name, check in checks().items():
            if name.startswith(("test_MEM_1_memory", "test_MEM_5_new", "test_LOSS_5")):
                check(impl)


def test_another_rate_is_no_other_f_c_where_positions_may_change_with_it():
    """Each compressed slot stands for c positions."""
    positions = "positions = sinusoid(distance"
    far = "distance[:C].add_((self.config.compression_rate - 1) * torch.arange(C, 0, -1))"
    changes = ((positions, f"C = c_mem[0].size(1)\n        {far}\n        {positions}"),)
    adapter = reference.Adapter(changed(changes))
    adapter.declares = {"positions": "separate", "compressions": ("mean_pool",)}
    with profile("few"), pytest.raises(pytest.skip.Exception, match="with the rate positions may"):
        checks()["test_MEM_6_slots_made_in_a_step_are_first_read_in_the_next"](
            Implementation(adapter, "c positions a slot")
        )


def test_dropout_that_is_never_off_is_a_fault():
    always = ("self.dropout = nn.Dropout(config.dropout)", "self.dropout = Always(config.dropout)")
    kind = (
        "class Output(NamedTuple)",
        "class Always(nn.Dropout):\n"
        "    def forward(self, x):\n"
        "        return F.dropout(x, self.p)\n\n\n"
        "class Output(NamedTuple)",
    )
    check = checks()["test_MOD_2_evaluation_drops_nothing_out"]
    with profile("few"):
        check(Implementation(reference.Adapter(), "right"))
        error = failure(check, Implementation(reference.Adapter(changed((kind, always))), "wrong"))
    assert isinstance(error, Broken)


def test_a_token_that_is_hidden_from_itself_is_found_without_optional_calls():
    adapter = reference.Adapter(changed(fault("a query does not see itself").changes))
    for call in ("replace", "compress", "weights"):
        setattr(adapter, call, None)
    with profile("quick"):
        error = failure(checks()["test_ATT_2_a_token_sees_itself"], Implementation(adapter, ""))
    assert isinstance(error, Broken)


class NewestFirst(reference.Adapter):
    """It reads memories newest first."""

    def read(self, state: Any) -> list[tuple[Tensor, Tensor]]:
        return [(mem.flip(1), c_mem.flip(1)) for mem, c_mem in super().read(state)]


@pytest.mark.parametrize(
    ("kind", "changes", "check", "cause"),
    [
        (reference.Adapter, (SCALES, FEW_SCALES), BY_LOOPS, oracle.TIMES_ROOT),
        (reference.Adapter, (READS,), BY_LOOPS, oracle.NEWEST_FIRST),
        (reference.Adapter, QUERIES, BY_LOOPS, oracle.AFTER_ATTENTION),
        (reference.Adapter, SWAPPED, BY_LOOPS, oracle.SWAPPED),
        (reference.Adapter, WITH_BIAS, LOSS, oracle.WITH_BIAS),
        (reference.Adapter, PROJECTED, LOSS, oracle.PROJECTED),
        (OutputByInput, (), BY_LOOPS, oracle.TRANSPOSED),
        (OutputByInput, (), LOSS, oracle.TRANSPOSED),
        (NewestFirst, (), BY_LOOPS, "read() gives the newest slot first"),
    ],
)
def test_causes_are_tried_before_they_are_guessed(
    kind: type, changes: tuple, check: str, cause: str
):
    with profile("many"):
        error = failure(checks()[check], Implementation(kind(changed(changes)), "wrong"))
    assert isinstance(error, Broken)
    assert error.cause == cause


class Refuses(reference.Adapter):
    """The reference for models of some numbers of heads alone."""

    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.heads = heads

    def build(self, settings: Settings) -> object:
        if settings.n_heads not in self.heads:
            return NotImplemented
        return super().build(settings)


def test_settings_that_cannot_be_followed_leave_out_the_example():
    """Too many, and the check is not claimed; a fault fails in spite of it."""
    check = checks()["test_MEM_2_memories_never_exceed_their_lengths"]
    with profile("few"):
        some = Implementation(Refuses(1, 2), "some")
        check(some)
        said = r"\d+ of \d+ examples: .*build\(\) gives NotImplemented"
        assert re.match(said, some.left_out)
        none = Implementation(Refuses(), "none")
        with pytest.raises(pytest.skip.Exception, match="NotImplemented"):
            check(none)
        wrong = Refuses(1, 2)
        wrong.module = changed(fault("nothing ever leaves memory").changes)
        assert isinstance(failure(check, Implementation(wrong, "wrong")), Broken)


def test_a_check_without_a_comparison_is_not_claimed():
    @check(n=st.integers(0, 99))
    def empty(impl: Implementation, n: int) -> None:
        if n < 200:
            return
        holds(True, "", "", "")

    @check(n=st.integers(0, 99))
    def of_some(impl: Implementation, n: int) -> None:
        if n % 2:
            not_claimed("odd")
        holds(True, "", "", "")

    impl = Implementation(reference.Adapter(), "reference")
    with profile("few"):
        with pytest.raises(pytest.skip.Exception, match="there is nothing to compare"):
            empty(impl)
        of_some(impl)
    assert re.fullmatch(r"\d+ of \d+ examples: odd", impl.left_out)


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


@pytest.mark.elsewhere
@pytest.mark.parametrize("number", range(3))
def test_a_right_design_passes_with_what_it_declares(number: int):
    """The first of those that have each pair of declarations; `designs.py` is the command for all."""
    design = list(designs())[number]
    with profile("few"):
        failed = failures(design)
    assert not failed, "\n".join([str(design), *failed])
