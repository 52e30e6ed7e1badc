"""MOD: the model as a whole."""

import io
from collections.abc import Callable

import torch

from .implementation import Implementation, not_claimed
from .support import (
    Broken,
    Case,
    cases,
    check,
    close,
    fit,
    holds,
    random_slots,
    simulate,
    supported,
    tokens,
)


@check(case=cases(zeros=True, c_mem_len=0))
def test_MOD_1_without_compressed_memory_it_is_transformer_xl(impl: Implementation, case: Case):
    """Memory is the newest mem_len inputs and nothing is compressed; the logits are those of a
    model that compresses, handed that memory."""
    settings, schedule = case
    model = impl.build(settings)
    other = settings._replace(mem_len=settings.mem_len + 3, c_mem_len=2)
    compressing = impl.twin(model, fit(impl.declared, other, schedule).settings)
    expected = simulate(impl.declared, case)
    state = impl.start(model, 2)
    text = tokens(settings, 2, sum(schedule))
    for n, segment in enumerate(text.split(schedule, dim=1)):
        step = impl.step(model, segment, state)
        where = f"in step {n} of segments of {schedule}"
        if compressing is not None and impl.declared.start == "empty":
            same = impl.step(compressing, segment, state)
            close(f"logits {where}", step.logits, same.logits, impl.tolerance)
        state = step.state
        what = f"slots of memory and compressed memory {where}"
        lengths = [len(expected[n].mem[0]), 0]
        for mem, c_mem in impl.read(state):
            found = [mem.size(1), c_mem.size(1)]
            holds(found == lengths, what, lengths, found)


@check(case=cases(mem_len=0, c_mem_len=0))
def test_MOD_1_without_memory_it_is_a_causal_transformer(impl: Implementation, case: Case):
    settings, schedule = case
    model = impl.build(settings)
    text = tokens(settings, 2, sum(schedule))
    steps = impl.run(model, text, schedule)
    for n, segment in enumerate(text.split(schedule, dim=1)):
        fresh = impl.step(model, segment, impl.start(model, 2))
        close(f"logits of segment {n}, of {schedule}", steps[n].logits, fresh.logits)


@check(gradients=True, case=cases())
def test_MOD_2_training_and_evaluation_mode_agree(impl: Implementation, case: Case):
    """And steps that keep their graph and steps that do not."""
    settings, schedule = case
    model = impl.build(settings)
    text = tokens(settings, 2, sum(schedule))
    evaluated = impl.run(model, text, schedule)
    for mode in ("evaluation", "training"):
        training = mode == "training"
        model.train(training)
        with torch.set_grad_enabled(training):
            others = impl.run(model, text, schedule)
        for n, (one, other) in enumerate(zip(evaluated, others, strict=True)):
            where = f"in step {n}, once more in {mode} mode"
            if not training:
                where += " without gradients"
            close(f"logits {where}", other.logits, one.logits)
            if training and impl.declared.loss_in_eval:
                close(f"compression loss {where}", other.loss, one.loss)
            for was, found in zip(impl.read(one.state), impl.read(other.state), strict=True):
                close(f"memories {where}", found.mem, was.mem)
                close(f"memories {where}", found.c_mem, was.c_mem)


@check(case=cases(dropout=0.5))
def test_MOD_2_evaluation_drops_nothing_out(impl: Implementation, case: Case):
    settings, schedule = case
    model = impl.build(settings)
    twin = impl.twin(model, settings._replace(dropout=0.0))
    if twin is None:
        not_claimed("there is no model with the same parameters that drops nothing out")
    text = tokens(settings, 2, sum(schedule))
    steps = impl.run(model, text, schedule)
    for n, (one, other) in enumerate(zip(impl.run(twin, text, schedule), steps, strict=True)):
        where = f"in step {n}, in evaluation mode, with dropout of 0.5 instead of 0"
        close(f"logits {where}", other.logits, one.logits, impl.tolerance)
        close(f"compression loss {where}", other.loss, one.loss, impl.tolerance)


@check(case=cases(steps=(5, 5)))
def test_MOD_3_a_saved_and_loaded_state_continues(impl: Implementation, case: Case):
    settings, schedule = case
    model = impl.build(settings)
    text = tokens(settings, 2, sum(schedule))
    steps = impl.run(model, text, schedule)
    file = io.BytesIO()
    torch.save((model.state_dict(), steps[2].state), file)
    file.seek(0)
    parameters, state = torch.load(file, weights_only=False)
    other = impl.build(settings)
    other.load_state_dict(parameters)
    segments = text.split(schedule, dim=1)
    for n in (3, 4):
        step = impl.step(other, segments[n], state)
        close(f"logits of step {n}, saved and loaded after step 2", step.logits, steps[n].logits)
        state = step.state


@check(case=cases())
def test_MOD_4_a_segment_may_have_any_length_after_any_other(impl: Implementation, case: Case):
    """A step of a length not seen before is that of a new model of the same parameters, and its
    tokens, and no others, are in the newest slots of memory."""
    if impl.declared.segments == "full":
        not_claimed("every segment has the length that the model is built for")
    settings, schedule = case
    expected = simulate(impl.declared, case)
    model = impl.build(settings)
    rows = 8  # a ReLU may leave two tokens alike, but not in all
    state = impl.start(model, rows)
    text = tokens(settings, rows, sum(schedule))
    fed = 0
    for n, segment in enumerate(text.split(schedule, dim=1)):
        where = f"step {n} of segments of {schedule}"
        fresh = impl.twin(model, settings)
        step = impl.step(model, segment, state)
        same = impl.step(fresh, segment, state)
        close(f"logits of {where}", step.logits, same.logits)
        with_others = impl.step(model, (segment + 1) % settings.vocab_size, state)
        mem = impl.read(step.state)[0].mem
        moved = (mem != impl.read(with_others.state)[0].mem).any(dim=-1).any(dim=0)
        new = [max(tokens_in, default=-1) >= fed for tokens_in in expected[n].mem[0]]
        what = f"slots of the first layer's memory that are of this segment, after {where}"
        holds(moved.tolist() == new, what, new, moved.tolist())
        fed += segment.size(1)
        state = step.state


def refused(what: str, call: Callable[[], object], *words: str) -> None:
    """The call raises an error with these words in it; `a|b` is either."""
    expected = f"an error that says {', '.join(words)}"
    try:
        call()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        raise Broken(what, expected, "no error")
    missing = []
    for word in words:
        if not any(either.lower() in said.lower() for either in word.split("|")):
            missing.append(word)
    holds(not missing, what, expected, f"{said!r}, without {', '.join(missing)}")


def with_tokens(impl: Implementation, tokens: torch.Tensor) -> Callable[[], object]:
    model = impl.build(supported(impl)._replace(vocab_size=17))
    return lambda: impl.step(model, tokens, impl.start(model, 2))


def test_MOD_5_a_token_out_of_range(impl: Implementation):
    if impl.device.type != "cpu":
        not_claimed("off the CPU such a token may end the process")
    bad = torch.tensor([[3, 19, 2, 1], [0, 1, 2, 3]])
    refused("token 19 of a vocabulary of 17", with_tokens(impl, bad), "token|vocab", "17", "19")


def test_MOD_5_tokens_that_are_no_integers(impl: Implementation):
    bad = torch.zeros(2, 4)
    refused("tokens of dtype float32", with_tokens(impl, bad), "token|input|x ", "int", "float")


def test_MOD_5_tokens_of_another_shape(impl: Implementation):
    bad = torch.zeros(2, 4, 7, dtype=torch.int64)
    shape = list(impl.swap(bad).shape)
    either = []
    for one in ([2, 4, 7], shape):  # a model may turn them before it looks
        either += [f"{one}", f"{tuple(one)}"]
    refused(f"tokens of shape {shape}", with_tokens(impl, bad), "token|input|x ", "|".join(either))


def test_MOD_5_a_memory_of_another_batch_size(impl: Implementation):
    settings = supported(impl)
    model = impl.build(settings)
    state = impl.step(model, tokens(settings, 13, 4), impl.start(model, 13)).state
    bad = tokens(settings, 19, 4)

    def call() -> None:
        impl.step(model, bad, state)

    refused("19 rows with the memory of 13", call, "mem", "13", "19")


def test_MOD_5_a_memory_of_another_width(impl: Implementation):
    impl.needs("replace")
    settings = supported(impl)
    model = impl.build(settings)
    wider = settings._replace(d_model=14)
    bad = random_slots(impl, wider, 2, settings.mem_len, settings.c_mem_len)

    def call() -> None:
        state = impl.replace(impl.start(model, 2), bad)
        impl.step(model, tokens(settings, 2, 4), state)

    refused("a memory of width 14, of 8 expected", call, "mem", "14", "8")


def test_MOD_5_a_width_that_heads_do_not_divide(impl: Implementation):
    bad = supported(impl)._replace(d_model=26, n_heads=7)
    refused("d_model = 26 with n_heads = 7", lambda: impl.build(bad), "26", "7")
