"""MEM: what is remembered, compressed and forgotten."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .implementation import Implementation, Slots, not_claimed
from .support import (
    PARAMETRIC,
    WHOLE,
    Case,
    block_of,
    cases,
    changed,
    check,
    close,
    evicted,
    filled,
    fit,
    holds,
    in_some_draw,
    joined,
    longer_memory,
    newest,
    simulate,
    tokens,
)


class Seen(NamedTuple):
    """A layer in a step: what memory holds once the layer's input has joined, and the memories
    before and after."""

    model: nn.Module
    layer: int
    where: str
    held: Tensor
    before: Slots
    after: Slots


def layer_by_layer(impl: Implementation, case: Case) -> Iterator[Seen]:
    """Run a stream."""
    settings, schedule = case
    model = impl.build(settings)
    text = tokens(settings, 2, sum(schedule))
    long = longer_memory(impl, model, case)
    state = impl.start(model, 2)
    for n, segment in enumerate(text.split(schedule, dim=1)):
        before = impl.read(state)
        step = impl.step(model, segment, state)
        after = impl.read(step.state)
        held = joined(impl, long, segment, state, step.state)
        state = step.state
        for i in range(len(after)):
            where = f"in layer {i} after step {n} of segments of {schedule}"
            yield Seen(model, i, where, held[i], before[i], after[i])


@check(case=cases(readable=True))
def test_MEM_1_memory_is_the_newest_slots_oldest_first(impl: Implementation, case: Case):
    for _, _, where, held, before, after in layer_by_layer(impl, case):
        blocks, leave = evicted(impl.declared, case.settings, held.size(1))
        stay = held.size(1) - leave
        was = held[:, : before.mem.size(1)]
        close(f"what was in memory before, {where}", was, before.mem, impl.tolerance)
        causes = {
            "the newest were evicted instead of the oldest": held[:, :stay],
            "the newest slot comes first": held[:, leave:].flip(1),
            "it begins one slot too early": held[:, max(0, leave - 1) :][:, :stay],
        }
        close(f"memory {where}", after.mem, held[:, leave:], impl.tolerance, causes)
        room = max(0, case.settings.c_mem_len - len(blocks))
        old = newest(before.c_mem, room)
        found = after.c_mem[:, : old.size(1)]
        causes = {
            "new compressed slots are put before the old ones": newest(after.c_mem, old.size(1))
        }
        close(f"compressed memory kept from before, {where}", found, old, causes=causes)


@check(case=cases())
def test_MEM_2_memories_never_exceed_their_lengths(impl: Implementation, case: Case):
    never_too_long(impl, case)


@check(case=cases(steps=(2, 6), c_mem_len=0))
def test_MEM_2_nothing_is_compressed_into_a_length_of_zero(impl: Implementation, case: Case):
    never_too_long(impl, case)


@check(case=cases(steps=(2, 6), mem_len=0, compression_rate=1))
def test_MEM_2_nothing_is_kept_in_a_memory_of_length_zero(impl: Implementation, case: Case):
    never_too_long(impl, case)


def never_too_long(impl: Implementation, case: Case) -> None:
    settings, schedule = case
    longest = Slots(settings.mem_len, settings.c_mem_len)
    model = impl.build(settings)
    text = tokens(settings, 1, sum(schedule))
    for n, step in enumerate(impl.run(model, text, schedule)):
        for i, slots in enumerate(impl.read(step.state)):
            for name, part, most in zip(Slots._fields, slots, longest, strict=True):
                what = f"slots of {name} in layer {i} after step {n} of segments of {schedule}"
                holds(part.size(1) <= most, what, f"at most {most}", part.size(1))


def carried_by_slots(impl: Implementation, case: Case) -> Iterator[tuple[Slots, Slots]]:
    """After each step the slots of the first layer, for a text and, row by row, for the text with
    one other token."""
    settings, schedule = case
    length = sum(schedule)
    model = impl.build(settings)
    text = tokens(settings, 1, length)
    with torch.no_grad():
        plain = impl.run(model, text.expand(length, length), schedule)
        other = impl.run(model, changed(text, settings.vocab_size), schedule)
    for one, two in zip(plain, other, strict=True):
        yield impl.read(one.state)[0], impl.read(two.state)[0]


@check(case=cases(compression=WHOLE, n_layers=1, rest=True))
def test_MEM_3_every_token_is_in_one_slot_or_forgotten(impl: Implementation, case: Case):
    """A token is in the slots that change when it does: the first layer's inputs are the tokens."""
    expected = simulate(impl.declared, case)
    for n, (plain, other) in enumerate(carried_by_slots(impl, case)):
        first_layer = Slots(expected[n].mem[0], expected[n].c_mem[0])
        for name in Slots._fields:
            what = f"{name} after step {n} of segments of {case.schedule}"
            slots = getattr(first_layer, name)
            one = getattr(plain, name)
            two = getattr(other, name)
            came = one.size(1)
            holds(came == len(slots), f"number of slots of {what}", len(slots), came)
            differs = (one != two).any(dim=-1)  # [token, slot]
            for k, tokens_in in enumerate(slots):
                found = set(differs[:, k].nonzero().flatten().tolist())
                where = f"tokens in slot {k} of {what}"
                holds(found == tokens_in, where, tokens_in or "none", found or "none")


@check(case=cases(rest=True, readable=True))
def test_MEM_4_c_n_memories_become_n_slots_and_only_on_overflow(impl: Implementation, case: Case):
    settings = case.settings
    for _, _, where, held, before, after in layer_by_layer(impl, case):
        blocks, leave = evicted(impl.declared, settings, held.size(1))
        total = before.c_mem.size(1) + len(blocks)
        expected = [held.size(1) - leave, min(total, settings.c_mem_len)]
        got = [after.mem.size(1), after.c_mem.size(1)]
        what = f"slots of memory and compressed memory {where}, of {held.size(1)} held"
        holds(got == expected, what, expected, got)


@check(case=cases(steps=(1, 1)))
def test_MEM_4_the_loss_is_zero_while_nothing_overflows(impl: Implementation, case: Case):
    if impl.declared.start == "zeros":
        not_claimed("memories overflow from the start")
    settings, (T,) = case
    enough = settings._replace(mem_len=max(T, settings.mem_len))
    settings, _ = fit(impl.declared, enough, [T])
    model = impl.build(settings).train()
    step = impl.step(model, tokens(settings, 2, T), impl.start(model, 2))
    holds(step.loss == 0, f"compression loss after {T} tokens", 0, step.loss.item())
    for layer in impl.read(step.state):
        holds(layer.c_mem.size(1) == 0, "compressed slots", 0, layer.c_mem.size(1))


@check(case=cases(compression=(*WHOLE, "max_pool", "dilated_conv"), readable=True))
def test_MEM_5_new_slots_are_the_layers_own_compression_of_what_left(
    impl: Implementation, case: Case
):
    settings = case.settings
    for model, i, where, held, _, after in layer_by_layer(impl, case):
        blocks, leave = evicted(impl.declared, settings, held.size(1))
        if not blocks:
            continue

        def compressed(layer: int, old: Tensor, model: nn.Module = model) -> Tensor:
            unused = old.new_zeros(old.shape[:2])
            new = impl.compress(model, layer, old, unused)
            return newest(new, settings.c_mem_len)

        old = block_of(held, blocks)
        new = compressed(i, old)
        another = (i + 1) % settings.n_layers
        causes = {"f_c is another layer's": compressed(another, old)}
        if held.size(1) >= 2 * leave:
            staying = block_of(held[:, leave:], blocks)
            causes["the memories that stay are compressed"] = compressed(i, staying)
        found = newest(after.c_mem, new.size(1))
        close(f"new compressed slots {where}", found, new, impl.tolerance, causes)


@check(case=cases(steps=(1, 1), compression=PARAMETRIC))
def test_MEM_6_slots_made_in_a_step_are_first_read_in_the_next(impl: Implementation, case: Case):
    """With another f_c a step is the same and the next one another."""
    settings, (T,) = case
    model = impl.build(settings)
    state = filled(impl, model, settings, T)
    text = tokens(settings, 2, T)
    after = tokens(settings, 2, T)
    with torch.no_grad():
        step = impl.step(model, text, state)
        following = impl.step(model, after, step.state)
        for layer in impl.compression_parameters(model):
            for parameter in layer:
                parameter.mul_(-2)
        again = impl.step(model, text, state)
        close("logits of a step with another f_c", again.logits, step.logits)
        other = impl.step(model, after, again.state)
    differs = (other.logits != following.logits).any()
    holds(differs, "logits of the step after", "others", "the same")


@check(case=cases(steps=(1, 1), n_layers=3))
def test_MEM_7_layers_remember_their_own_inputs(impl: Implementation, case: Case):
    """A layer's parameters move the memories of the layers above it and no others: change each
    parameter of the model by itself, and look which memories change."""
    settings, (T,) = case
    enough = settings._replace(mem_len=max(T, settings.mem_len) + 3)
    settings, _ = fit(impl.declared, enough, [T])
    model = impl.build(settings)
    text = tokens(settings, 2, T)

    def memories() -> list[Tensor]:
        step = impl.step(model, text, impl.start(model, 2))
        return [layer.mem for layer in impl.read(step.state)]

    lowest = set()
    with torch.no_grad():
        before = memories()
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(-1.5)
            after = memories()
            parameter.copy_(kept)
            moved = [i for i in range(3) if not torch.equal(before[i], after[i])]
            if moved:
                lowest.add(moved[0])
                above = list(range(moved[0], 3))
                holds(moved == above, f"layers whose memory moves with {name}", above, moved)
    what = "lowest layers whose memory moves with a parameter"
    holds(lowest == {0, 1, 2}, what, [0, 1, 2], lowest)


@check(case=cases(steps=(1, 1)))
def test_MEM_1_MEM_7_the_first_layer_remembers_the_tokens_in_order(
    impl: Implementation, case: Case
):
    """Its slots depend on their own token alone, the other layers' on those before, too."""
    settings, (T,) = case
    settings, _ = fit(impl.declared, settings._replace(mem_len=T + 3, n_layers=2), [T])
    model = impl.build(settings)
    text = tokens(settings, 1, T)

    def after_a_step(text: Tensor) -> list[Slots]:
        with torch.no_grad():
            step = impl.step(model, text, impl.start(model, T))
        return impl.read(step.state)

    plain = after_a_step(text.expand(T, T))
    other = after_a_step(changed(text, settings.vocab_size))
    own_token = torch.eye(T, dtype=torch.bool)
    and_those_before = torch.ones(T, T).triu().bool()
    for i, expected in enumerate((own_token, and_those_before)):
        differs = newest(plain[i].mem, T) != newest(other[i].mem, T)
        moved = differs.any(dim=-1)  # [token, slot]
        what = f"slots of layer {i} that a changed token moves, token by token"
        holds(torch.equal(moved, expected), what, expected.int().tolist(), moved.int().tolist())


@check(case=cases())
def test_MEM_8_memories_are_not_changed_nor_carry_a_gradient(impl: Implementation, case: Case):
    unchanged_and_cut_off(impl, case, impl.dtype)


@check(case=cases())
def test_MEM_8_memories_keep_the_dtype_float32(impl: Implementation, case: Case):
    torch.set_default_dtype(torch.float32)
    try:
        unchanged_and_cut_off(impl, case, torch.float32)
    finally:
        torch.set_default_dtype(impl.dtype)


def unchanged_and_cut_off(impl: Implementation, case: Case, dtype: torch.dtype) -> None:
    settings, schedule = case
    model = impl.build(settings).to(dtype).train()
    text = tokens(settings, 2, sum(schedule))
    state = impl.start(model, 2)
    for n, segment in enumerate(text.split(schedule, dim=1)):
        copies = [Slots(mem.clone(), c_mem.clone()) for mem, c_mem in impl.read(state)]
        step = impl.step(model, segment, state)
        (step.logits.sum() + step.loss).backward()
        for i, (was, now) in enumerate(zip(copies, impl.read(state), strict=True)):
            close(f"mem handed to layer {i}, after step {n}", now.mem, was.mem)
            close(f"c_mem handed to layer {i}, after step {n}", now.c_mem, was.c_mem)
        state = step.state
        expected = [impl.device, dtype]
        for i, layer in enumerate(impl.adapter.read(state)):
            for name, part in zip(Slots._fields, layer, strict=True):
                what = f"{name} that layer {i} handed back in step {n}"
                holds(not part.requires_grad, f"{what}, its gradient", "none", part.grad_fn)
                got = [part.device, part.dtype]
                holds(got == expected, what, expected, got)


@check(case=cases(steps=(2, 8), compression=WHOLE))
def test_MEM_9_a_token_reaches_exactly_what_the_memories_carry_it_to(
    impl: Implementation, case: Case
):
    """Change token i in row i of a batch: logits change where, and only where, sets of tokens in
    the place of vectors say (the same row of the unchanged batch is the same arithmetic)."""
    settings, schedule = case
    length = sum(schedule)
    reached = []  # for each position the tokens that do
    for step in simulate(impl.declared, case):
        reached += step.positions
    expected = torch.zeros(length, length, dtype=torch.bool)  # [changed token, position]
    for position, reaching in enumerate(reached):
        expected[list(reaching), position] = True

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, length)
        plain = impl.logits(model, text.expand(length, length), schedule)
        other = impl.logits(model, changed(text, settings.vocab_size), schedule)
        return (plain != other).any(dim=-1)

    seen = in_some_draw(expected, differs)
    for t in range(length):
        found = set(seen[:, t].nonzero().flatten().tolist())
        what = f"tokens that reach the logits at {t} of segments of {schedule}"
        holds(found == reached[t], what, reached[t], found)
