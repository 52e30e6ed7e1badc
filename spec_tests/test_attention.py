"""ATT: what attention sees, and at which distance."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import oracle
from .implementation import Implementation, Slots, not_claimed
from .support import (
    PARAMETRIC,
    WHOLE,
    Case,
    cases,
    changed,
    check,
    close,
    filled,
    fit,
    holds,
    in_some_draw,
    random_slots,
    round_up,
    tokens,
)


class Logits(NamedTuple):
    """Those of one text, row by row, and of the text with another token, token i in row i."""

    plain: Tensor
    other: Tensor


def of_changed_tokens(impl: Implementation, case: Case) -> Logits:
    """For a segment after full memories."""
    settings, (T,) = case
    model = impl.build(settings)
    text = tokens(settings, 1, T)
    state = filled(impl, model, settings, T, batch=T)
    with torch.no_grad():
        plain = impl.step(model, text.expand(T, T), state)
        other = impl.step(model, changed(text, settings.vocab_size), state)
    return Logits(plain.logits, other.logits)


@check(case=cases(steps=(1, 1)))
def test_ATT_1_a_changed_token_changes_nothing_before_it(impl: Implementation, case: Case):
    _, (T,) = case
    plain, other = of_changed_tokens(impl, case)
    for i in range(T):
        what = f"logits before position {i}, once the token there is another, of a segment of {T}"
        close(what, other[i, :i], plain[i, :i])


@check(case=cases(steps=(1, 1), vocab_size=30))
def test_ATT_1_the_derivative_by_later_tokens_is_zero(impl: Implementation, case: Case):
    """By the rows of the embedding, if there is one."""
    settings, (T,) = case
    model = impl.build(settings)
    embedding = None
    for module in model.modules():
        is_one = isinstance(module, nn.Embedding) and module.num_embeddings == settings.vocab_size
        if is_one and embedding is None:
            embedding = module
    if embedding is None:
        not_claimed("has no nn.Embedding of its tokens")
    state = filled(impl, model, settings, T)
    text = torch.randperm(settings.vocab_size)[:T]
    logits = impl.step(model, text.expand(2, T), state).logits
    for t in range(T):
        (gradient,) = torch.autograd.grad(
            logits[0, t].square().sum(), embedding.weight, retain_graph=True
        )
        of_later = gradient[text[t + 1 :]]
        close(f"derivative of the logits at {t} by later tokens", of_later, 0 * of_later)


@check(case=cases(steps=(1, 1)))
def test_ATT_2_every_token_up_to_t_reaches_the_logits_at_t(impl: Implementation, case: Case):
    _, (T,) = case

    def differs() -> Tensor:
        plain, other = of_changed_tokens(impl, case)
        return (plain != other).any(dim=-1)

    expected = torch.ones(T, T, dtype=torch.bool).triu()
    reached = in_some_draw(expected, differs)  # [changed token, position]
    for i in range(T):
        for t in range(i, T):
            what = f"logits at {t} of a segment of {T} after token {i} was changed"
            holds(reached[i, t], what, "others", "the same")


@check(case=cases(steps=(1, 1)))
def test_ATT_2_every_slot_reaches_every_logit(impl: Implementation, case: Case):
    """Row by row another slot of another layer is changed."""
    settings, (T,) = case
    places = []
    for i in range(settings.n_layers):
        places += [(i, "mem", k) for k in range(settings.mem_len)]
        places += [(i, "c_mem", k) for k in range(settings.c_mem_len)]
    rows = len(places)

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, T).expand(rows, T)
        plain = []
        other = []
        for mem, c_mem in random_slots(impl, settings, 1, settings.mem_len, settings.c_mem_len):
            slots = Slots(mem.expand(rows, -1, -1).clone(), c_mem.expand(rows, -1, -1).clone())
            plain.append(slots)
            other.append(Slots(slots.mem.clone(), slots.c_mem.clone()))
        for row, (i, part, k) in enumerate(places):
            slot = getattr(other[i], part)[row, k]
            slot += torch.randn(settings.d_model, dtype=impl.dtype)
        start = impl.start(model, rows)
        with torch.no_grad():
            before = impl.step(model, text, impl.replace(start, plain)).logits
            after = impl.step(model, text, impl.replace(start, other)).logits
        return (before != after).any(dim=-1)

    reached = in_some_draw(torch.ones(rows, T, dtype=torch.bool), differs)
    for row, (i, part, k) in enumerate(places):
        what = f"logits after slot {k} of layer {i}'s {part} was changed"
        for t in range(T):
            holds(reached[row, t], f"{what}, at position {t}", "others", "the same")


@check(case=cases(steps=(1, 1)), c_mem=st.integers(0, 8), mem=st.integers(0, 8))
def test_ATT_3_MEM_1_compressed_memory_stands_before_memory_a_position_a_slot(
    impl: Implementation, case: Case, c_mem: int, mem: int
):
    """The same slots, divided otherwise between the memories, stand at the same distances."""
    if impl.declared.positions == "separate":
        not_claimed("compressed memory has positions of its own")
    settings, (T,) = case
    full = impl.declared.start == "zeros"
    fewest = 0
    if full:  # then a model of those lengths, which differ in one slot at least
        fewest = 1
        c_mem = max(c_mem, 2)
        mem = max(mem, T, settings.compression_rate)
    settings = settings._replace(mem_len=99, c_mem_len=99, segment=T)
    model = impl.build(settings)
    text = tokens(settings, 2, T)
    slots = [layer.mem for layer in random_slots(impl, settings, 2, c_mem + mem, 0)]
    turned = [torch.cat([x[:, c_mem:], x[:, :c_mem]], dim=1) for x in slots]

    def logits(n: int, slots: list[Tensor]) -> Tensor:
        """With n of the slots in compressed memory."""
        twin = model
        if full:
            lengths = settings._replace(c_mem_len=n, mem_len=c_mem + mem - n)
            twin = impl.twin(model, lengths)
            if twin is None:
                not_claimed("parameters depend on the lengths of the memories")
        divided = [Slots(mem=x[:, n:], c_mem=x[:, :n]) for x in slots]
        state = impl.replace(impl.start(twin, 2), divided)
        return impl.step(twin, text, state).logits

    close(
        f"logits with {c_mem} slots of compressed memory before {mem} of memory",
        logits(c_mem, slots),
        logits(fewest, slots),
        impl.tolerance,
        {"memory is read before compressed memory": logits(fewest, turned)},
    )


@check(case=cases(steps=(2, 5)), c_mem=st.integers(0, 8), mem=st.integers(0, 8))
def test_ATT_3_a_token_is_as_far_away_in_memory_as_in_the_segment(
    impl: Implementation, case: Case, c_mem: int, mem: int
):
    """Behind memories of any lengths, and with nothing overflowing, a text in one segment and the
    same text in several give the same logits."""
    if impl.declared.segments == "full":
        not_claimed("every segment has the length that the model is built for")
    if impl.declared.start == "zeros":
        not_claimed("memories are always full")
    settings, schedule = case
    length = sum(schedule)
    longer = settings._replace(mem_len=mem + length, c_mem_len=9)
    settings, _ = fit(impl.declared, longer, [length])
    model = impl.build(settings)
    text = tokens(settings, 2, length)
    slots = random_slots(impl, settings, 2, mem, c_mem)

    def logits(lengths: list[int]) -> Tensor:
        state = impl.replace(impl.start(model, 2), slots)
        found = []
        for segment in text.split(lengths, dim=1):
            step = impl.step(model, segment, state)
            state = step.state
            found.append(step.logits)
        return torch.cat(found, dim=1)

    what = f"logits of segments of {schedule}, behind {c_mem} + {mem} slots"
    close(what, logits(schedule), logits([length]), impl.tolerance)


@check(
    case=cases(steps=(1, 1), longest=1, n_layers=1, n_heads=1, d_model=8),
    c_mem=st.integers(0, 5),
    mem=st.integers(0, 5),
)
def test_ATT_3_a_slot_without_attention_may_as_well_not_be_there(
    impl: Implementation, case: Case, c_mem: int, mem: int
):
    """An oldest slot so large that softmax gives it nothing (of it and its negative it is one)
    moves no other slot to another distance, however full the memories are."""
    if impl.declared.storage == "raw":
        not_claimed("memories are normalised when they are read")
    if impl.declared.positions == "separate" or impl.declared.start == "zeros":
        not_claimed("the number of compressed slots is not free")
    settings = case.settings._replace(mem_len=7, c_mem_len=7, segment=1)
    model = impl.build(settings)
    text = tokens(settings, 1, 1)
    (slots,) = random_slots(impl, settings, 1, mem, c_mem)
    large = 1e8 * torch.randn(1, 1, settings.d_model, dtype=impl.dtype)
    start = impl.start(model, 1)

    def logits(c_mem: Tensor) -> Tensor:
        state = impl.replace(start, [Slots(slots.mem, c_mem)])
        return impl.step(model, text, state).logits

    without = logits(slots.c_mem)
    found = logits(torch.cat([large, slots.c_mem], dim=1))
    of_negative = logits(torch.cat([-large, slots.c_mem], dim=1))
    if (of_negative - without).abs().max() < (found - without).abs().max():
        found = of_negative
    what = f"logits with a slot that gets no attention before {c_mem} + {mem} others"
    close(what, found, without, impl.tolerance)


@check(case=cases(longest=2, compression=WHOLE, divisible=True), before=st.integers(1, 4))
def test_ATT_4_the_same_context_gives_the_same_logits_anywhere_in_the_stream(
    impl: Implementation, case: Case, before: int
):
    """Two streams with one ending, which is longer than the reach: at the end nothing of what was
    before, nor of how long ago it began, is left."""
    settings, (T, *_) = case
    model = impl.build(settings)
    held = settings.mem_len + settings.compression_rate * settings.c_mem_len
    reach = settings.n_layers * (held + T)
    ending = tokens(settings, 1, round_up(reach, T) + T)
    fill = round_up(held, T)  # the memories are full by then

    def last(start: int) -> Tensor:
        """The last segment's logits, of a stream with so many tokens before the ending."""
        text = torch.cat([tokens(settings, 1, start), ending], dim=1)
        count = text.size(1) // T
        return impl.logits(model, text, [T] * count)[:, -T:]

    one = last(fill)
    other = last(fill + T * before)
    what = f"logits at the end of two streams, one {before} segments longer than the other"
    close(what, other, one, impl.tolerance)


@check(case=cases(steps=(2, 6)))
def test_ATT_5_while_nothing_overflows_any_split_gives_the_same_logits(
    impl: Implementation, case: Case
):
    if impl.declared.segments == "full":
        not_claimed("every segment has the length that the model is built for")
    if impl.declared.start == "zeros":
        not_claimed("memories overflow from the start")
    settings, schedule = case
    length = sum(schedule)
    settings, _ = fit(impl.declared, settings._replace(mem_len=length), [length])
    model = impl.build(settings)
    text = tokens(settings, 2, length)
    whole = impl.logits(model, text, [length])
    split = impl.logits(model, text, schedule)
    close(f"logits of segments of {schedule}", split, whole, impl.tolerance)


@check(case=cases())
def test_ATT_6_rows_do_not_see_each_other(impl: Implementation, case: Case):
    settings, schedule = case
    model = impl.build(settings)
    text = tokens(settings, 3, sum(schedule))
    others = text.clone()
    others[1:] = (others[1:] + 1) % settings.vocab_size
    together = impl.run(model, text, schedule)
    beside_others = impl.run(model, others, schedule)
    for i, (step, other) in enumerate(zip(together, beside_others, strict=True)):
        what = f"logits of row 0 in step {i}, once the other rows are others"
        close(what, other.logits[0], step.logits[0])
    for row in range(3):
        alone = impl.run(model, text[row : row + 1], schedule)
        for i, (step, single) in enumerate(zip(together, alone, strict=True)):
            what = f"of row {row} alone in step {i}"
            close(f"logits {what}", single.logits[0], step.logits[row], impl.tolerance)
            memories = f"memories {what}"
            for both, one in zip(impl.read(step.state), impl.read(single.state), strict=True):
                close(memories, one.mem[0], both.mem[row], impl.tolerance)
                close(memories, one.c_mem[0], both.c_mem[row], impl.tolerance)


@check(case=cases(zeros=True, steps=(1, 5)))
def test_ATT_3_MEM_5_LOSS_5_every_step_equals_the_loops(impl: Implementation, case: Case):
    """The whole step in plain Python (oracle.py), for an implementation that names its weights."""
    settings, schedule = case
    model = impl.build(settings).train()
    weights = oracle.lists(impl.weights(model))
    if "embedding" not in weights:
        not_claimed("weights() does not name all of them")
    text = tokens(settings, 2, sum(schedule))
    state = impl.start(model, 2)
    mem = []  # for each row, for each layer
    c_mem = []
    for row in range(2):
        mem.append([layer.mem[row].tolist() for layer in impl.read(state)])
        c_mem.append([layer.c_mem[row].tolist() for layer in impl.read(state)])
    for i, segment in enumerate(text.split(schedule, dim=1)):
        step = impl.step(model, segment, state)
        state = step.state
        losses = []
        for row in range(2):
            row_tokens = segment[row].tolist()
            result = oracle.step(impl.declared, settings, weights, row_tokens, mem[row], c_mem[row])
            mem[row] = result.mem
            c_mem[row] = result.c_mem
            losses.append(result.squares)
            place = f"of row {row} in step {i}"
            near(impl, f"logits {place}", step.logits[row], result.logits)
            for k, layer in enumerate(impl.read(state)):
                where = f"{place}, layer {k}"
                near(impl, f"memory {where}", layer.mem[row], result.mem[k])
                near(impl, f"compressed memory {where}", layer.c_mem[row], result.c_mem[k])
        if settings.compression in PARAMETRIC:
            loss = oracle.reduce(impl.declared, losses)
            near(impl, f"compression loss in step {i}", step.loss, loss)


def near(impl: Implementation, what: str, got: Tensor, expected: object) -> None:
    loops = torch.tensor(expected, dtype=impl.dtype)
    if loops.numel() == 0:  # a list of no slots does not tell their width
        loops = loops.reshape(0, *got.shape[1:])
    close(what, got, loops, 10 * impl.tolerance)
