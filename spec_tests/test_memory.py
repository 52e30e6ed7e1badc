"""MEM: what is remembered, compressed and forgotten."""

from collections.abc import Iterator

import torch
from torch import Tensor

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
    simulate,
    tokens,
)


def newest(x: Tensor, n: int) -> Tensor:
    return x[:, max(0, x.size(1) - n) :]


def layer_by_layer(
    impl: Implementation, case: Case
) -> Iterator[tuple[torch.nn.Module, int, str, Tensor, Slots, Slots]]:
    """Run a stream; for each step and layer the model, the layer, where this is, what memory holds
    once the layer's input has joined, and the memories before and after."""
    settings, schedule = case
    model, text = impl.build(settings), tokens(settings, 2, sum(schedule))
    long, state = longer_memory(impl, model, case), impl.start(model, 2)
    for n, segment in enumerate(text.split(schedule, dim=1)):
        before, step = impl.read(state), impl.step(model, segment, state)
        held = joined(impl, long, segment, state, step.state)
        state = step.state
        for i, after in enumerate(impl.read(state)):
            where = f"in layer {i} after step {n} of segments of {schedule}"
            yield model, i, where, held[i], before[i], after


@check(case=cases(readable=True))
def test_MEM_1_memory_is_the_newest_slots_oldest_first(impl: Implementation, case: Case):
    for _, _, where, held, before, after in layer_by_layer(impl, case):
        blocks, leave = evicted(impl.declared, case.settings, held.size(1))
        kept = held.size(1) - leave
        was = held[:, : before.mem.size(1)]
        close(f"what was in memory before, {where}", was, before.mem, impl.tolerance)
        causes = {
            "the newest were evicted instead of the oldest": held[:, :kept],
            "the newest slot comes first": held[:, leave:].flip(1),
            "it begins one slot too early": held[:, max(0, leave - 1) :][:, :kept],
        }
        close(f"memory {where}", after.mem, held[:, leave:], impl.tolerance, causes)
        old = newest(before.c_mem, case.settings.c_mem_len - len(blocks))
        old = old if len(blocks) < case.settings.c_mem_len else old[:, :0]
        causes = {
            "new compressed slots are put before the old ones": newest(after.c_mem, old.size(1))
        }
        found = after.c_mem[:, : old.size(1)]
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
    model = impl.build(settings)
    text = tokens(settings, 1, sum(schedule))
    for n, step in enumerate(impl.run(model, text, schedule)):
        for i, slots in enumerate(impl.read(step.state)):
            for name, part, most in zip(Slots._fields, slots, settings[5:7], strict=True):
                what = f"slots of {name} in layer {i} after step {n} of segments of {schedule}"
                holds(part.size(1) <= most, what, f"at most {most}", part.size(1))


def carried_by_slots(impl: Implementation, case: Case) -> Iterator[tuple[Slots, Slots]]:
    """After each step the slots of the first layer, for a text and, row by row, for the text with
    one other token."""
    settings, schedule = case
    model, length = impl.build(settings), sum(schedule)
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
        for part, name in enumerate(Slots._fields):
            slots = expected[n][1 + part][0]
            what = f"{name} after step {n} of segments of {case.schedule}"
            holds(
                plain[part].size(1) == len(slots),
                f"number of slots of {what}",
                len(slots),
                plain[part].size(1),
            )
            differs = (plain[part] != other[part]).any(dim=-1)  # [token, slot]
            for k, tokens_in in enumerate(slots):
                found = set(differs[:, k].nonzero().flatten().tolist())
                holds(
                    found == tokens_in,
                    f"tokens in slot {k} of {what}",
                    tokens_in or "none",
                    found or "none",
                )


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
    settings, _ = fit(impl.declared, settings._replace(mem_len=max(T, settings.mem_len)), [T])
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

        def compressed(held: Tensor, layer: int, blocks: list = blocks, model=model) -> Tensor:
            old = block_of(held, blocks)
            new = impl.compress(model, layer, old, old.new_zeros(old.shape[:2]))
            return newest(new, settings.c_mem_len)

        new = compressed(held, i)
        causes = {"f_c is another layer's": compressed(held, (i + 1) % settings.n_layers)}
        if held.size(1) >= 2 * leave:
            causes["the memories that stay are compressed"] = compressed(held[:, leave:], i)
        found = after.c_mem[:, after.c_mem.size(1) - new.size(1) :]
        close(f"new compressed slots {where}", found, new, impl.tolerance, causes)


@check(case=cases(steps=(1, 1), compression=PARAMETRIC))
def test_MEM_6_slots_made_in_a_step_are_first_read_in_the_next(impl: Implementation, case: Case):
    """With another f_c a step is the same and the next one another."""
    settings, (T,) = case
    model = impl.build(settings)
    state = filled(impl, model, settings, T)
    text, after = tokens(settings, 2, T), tokens(settings, 2, T)
    with torch.no_grad():
        step = impl.step(model, text, state)
        following = impl.step(model, after, step.state)
        for layer in impl.compression_parameters(model):
            for parameter in layer:
                parameter.mul_(-2)
        again = impl.step(model, text, state)
        close("logits of a step with another f_c", again.logits, step.logits)
        other = impl.step(model, after, again.state).logits
    holds((other != following.logits).any(), "logits of the step after", "others", "the same")


@check(case=cases(steps=(1, 1), n_layers=3))
def test_MEM_7_layers_remember_their_own_inputs(impl: Implementation, case: Case):
    """A layer's parameters move the memories of the layers above it and no others: change each
    parameter of the model by itself, and look which memories change."""
    settings, (T,) = case
    settings, _ = fit(impl.declared, settings._replace(mem_len=max(T, settings.mem_len) + 3), [T])
    model, text = impl.build(settings), tokens(settings, 2, T)

    def memories() -> list[Tensor]:
        return [x.mem for x in impl.read(impl.step(model, text, impl.start(model, 2)).state)]

    with torch.no_grad():
        before, firsts = memories(), set()
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(-1.5)
            pairs = zip(before, memories(), strict=True)
            moved = [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
            parameter.copy_(kept)
            if moved:
                firsts.add(moved[0])
                above = list(range(moved[0], 3))
                holds(moved == above, f"layers whose memory moves with {name}", above, moved)
    holds(
        firsts == {0, 1, 2}, "lowest layers whose memory moves with a parameter", [0, 1, 2], firsts
    )


@check(case=cases(steps=(1, 1)))
def test_MEM_1_MEM_7_the_first_layer_remembers_the_tokens_in_order(
    impl: Implementation, case: Case
):
    """Its slots depend on their own token alone, the other layers' on those before, too."""
    settings, (T,) = case
    settings, _ = fit(impl.declared, settings._replace(mem_len=T + 3, n_layers=2), [T])
    model, text = impl.build(settings), tokens(settings, 1, T)
    with torch.no_grad():
        plain, other = (
            impl.read(impl.step(model, x, impl.start(model, T)).state)
            for x in (text.expand(T, T), changed(text, settings.vocab_size))
        )
    for i in range(2):
        moved = (newest(plain[i].mem, T) != newest(other[i].mem, T)).any(dim=-1)  # [token, slot]
        expected = torch.eye(T, dtype=torch.bool) if i == 0 else torch.ones(T, T).triu().bool()
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
    state = impl.start(model, 2)
    for n, segment in enumerate(tokens(settings, 2, sum(schedule)).split(schedule, dim=1)):
        handed = impl.read(state)
        copies = [Slots(*(part.clone() for part in layer)) for layer in handed]
        step = impl.step(model, segment, state)
        (step.logits.sum() + step.loss).backward()
        for i, (was, now) in enumerate(zip(copies, impl.read(state), strict=True)):
            for name, a, b in zip(Slots._fields, was, now, strict=True):
                close(f"{name} handed to layer {i}, after step {n}", b, a)
        state = step.state
        for i, layer in enumerate(impl.read(state)):
            for name, part in zip(Slots._fields, layer, strict=True):
                what = f"{name} that layer {i} handed back in step {n}"
                holds(not part.requires_grad, f"{what}, its gradient", "none", part.grad_fn)
                expected = [segment.device, dtype]
                holds(
                    [part.device, part.dtype] == expected, what, expected, [part.device, part.dtype]
                )


@check(case=cases(steps=(2, 8), compression=WHOLE))
def test_MEM_9_a_token_reaches_exactly_what_the_memories_carry_it_to(
    impl: Implementation, case: Case
):
    """Change token i in row i of a batch: logits change where, and only where, sets of tokens in
    the place of vectors say (the same row of the unchanged batch is the same arithmetic)."""
    settings, schedule = case
    length = sum(schedule)
    reached = [tokens for step in simulate(impl.declared, case) for tokens in step.positions]
    expected = torch.tensor([[i in tokens for tokens in reached] for i in range(length)])

    def differs() -> Tensor:
        model, text = impl.build(settings), tokens(settings, 1, length)
        plain = impl.logits(model, text.expand(length, length), schedule)
        other = impl.logits(model, changed(text, settings.vocab_size), schedule)
        return (plain != other).any(dim=-1)

    seen = in_some_draw(expected, differs)  # [changed token, position]
    for t in range(length):
        found = set(seen[:, t].nonzero().flatten().tolist())
        what = f"tokens that reach the logits at {t} of segments of {schedule}"
        holds(found == reached[t], what, reached[t], found)
