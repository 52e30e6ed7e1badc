"""MEM: what is remembered, compressed and forgotten."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Settings
from .implementation import Implementation, Slots, copies, not_claimed
from .support import (
    PARAMETRIC,
    WHOLE,
    Broken,
    Case,
    block_of,
    cases,
    changed,
    check,
    close,
    counts,
    evicted,
    fit,
    holds,
    in_some_draw,
    joined,
    longer_memory,
    newest,
    overflowing,
    random_slots,
    same,
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
        held = joined(impl, model, settings, long, segment, state, step)
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
    rest = 0
    if impl.declared.overflow == "keep" and settings.c_mem_len > 0:
        rest = settings.compression_rate - 1
    longest = Slots(settings.mem_len + rest, settings.c_mem_len)
    model = impl.build(settings)
    text = tokens(settings, 1, sum(schedule))
    for n, step in enumerate(impl.stream(model, text, schedule)):
        for i, slots in enumerate(impl.read(step.state)):
            for name, part, most in zip(Slots._fields, slots, longest, strict=True):
                what = f"slots of {name} in layer {i} after step {n} of segments of {schedule}"
                holds(part.size(1) <= most, what, f"at most {most}", part.size(1))


@check(case=cases(compression=WHOLE, n_layers=1, rest=True))
def test_MEM_3_every_token_is_in_one_slot_or_forgotten(impl: Implementation, case: Case):
    """A token is in the slots that change when it does: the first layer's inputs are the tokens."""
    settings, schedule = case
    length = sum(schedule)
    simulated = simulate(impl.declared, case)
    expected = []  # of every slot after every step the tokens in it
    places = []
    for n, carried in enumerate(simulated):
        for name in Slots._fields:
            (slots,) = getattr(carried, name)
            for k, tokens_in in enumerate(slots):
                expected.append(tokens_in)
                places.append(f"slot {k} of {name} after step {n} of segments of {schedule}")

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, length)
        plain = impl.run(model, text.expand(length, length), schedule)
        other = impl.run(model, changed(text, settings.vocab_size), schedule)
        found = []
        for n, (one, two) in enumerate(zip(plain, other, strict=True)):
            carried = simulated[n]
            for name in Slots._fields:
                slots = getattr(impl.read(one.state)[0], name)
                others = getattr(impl.read(two.state)[0], name)
                right = len(getattr(carried, name)[0])
                what = f"number of slots of {name} after step {n} of segments of {schedule}"
                holds(slots.size(1) == right, what, right, slots.size(1))
                found.append((slots != others).any(dim=-1))
        return torch.cat(found, dim=1)  # [token, slot]

    moves = torch.zeros(length, len(expected), dtype=torch.bool)
    for column, tokens_in in enumerate(expected):
        moves[list(tokens_in), column] = True
    moved = in_some_draw(moves, differs)
    for column, (place, tokens_in) in enumerate(zip(places, expected, strict=True)):
        found = set(moved[:, column].nonzero().flatten().tolist())
        holds(found == tokens_in, f"tokens in {place}", tokens_in or "none", found or "none")


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
        full = before.c_mem.size(1) == settings.c_mem_len
        of_something = True
        for block in blocks:  # of zeros f_c may make zeros
            old = block_of(held, [block])
            of_something &= bool(old.flatten(1).any(dim=1).all())
        if full and of_something:
            made = min(len(blocks), settings.c_mem_len)
            stay = before.c_mem.size(1) - made
            # Not counted: the same token twice makes equal slots, and fewer seem to have left.
            moved = torch.equal(before.c_mem[:, made:], after.c_mem[:, :stay])
            what = f"compressed slots that others replaced {where}"
            holds(moved, what, made, forgotten(before.c_mem, after.c_mem))


def forgotten(before: Tensor, after: Tensor) -> int:
    """How many of the oldest slots are no longer there, of as many slots before as after."""
    length = before.size(1)
    for n in range(length):
        if torch.equal(before[:, n:], after[:, : length - n]):
            return n
    return length


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


POOLS = {"mean_pool": torch.mean, "max_pool": torch.amax}


@check(case=cases(compression=(*WHOLE, "max_pool", "dilated_conv"), readable=True))
def test_MEM_5_new_slots_are_the_layers_own_compression_of_what_left(
    impl: Implementation, case: Case
):
    settings = case.settings
    c = settings.compression_rate
    for model, i, where, held, _, after in layer_by_layer(impl, case):
        blocks, leave = evicted(impl.declared, settings, held.size(1))
        if not blocks:
            continue

        def compressed(layer: int, old: Tensor, model: nn.Module = model) -> Tensor:
            if settings.compression in POOLS and not impl.has("compress"):
                new = POOLS[settings.compression](old.unflatten(1, (-1, c)), dim=2)
            else:
                new = impl.compress(model, layer, old, old.new_zeros(old.shape[:2]))
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


@check(case=cases(steps=(1, 1), shortest=3, compression=PARAMETRIC, n_layers=3, d_model=24))
def test_MEM_5_a_layers_slots_move_with_its_own_f_c(impl: Implementation, case: Case):
    """From one state, with the parameters of one f_c after another changed."""
    settings, (T,) = case
    enough = settings._replace(mem_len=max(T, settings.mem_len))  # what leaves was there before
    settings, _ = fit(impl.declared, enough, [T])
    model = impl.build(settings)
    state = overflowing(impl, model, settings, T)
    text = tokens(settings, 2, T)

    def compressed() -> list[Tensor]:
        return [layer.c_mem for layer in impl.read(impl.step(model, text, state).state)]

    before = compressed()
    for k, parameters in enumerate(impl.compression_parameters(model)):
        for parameter in parameters:
            parameter.mul_(-1.5)
        after = compressed()
        moved = [i for i in range(3) if not torch.equal(before[i], after[i])]
        what = f"layers whose new slots move with the parameters of layer {k}'s f_c"
        holds(moved == [k], what, [k], moved)
        before = after


@check(case=cases(steps=(1, 1)), c=counts(2, 4))
def test_MEM_6_slots_made_in_a_step_are_first_read_in_the_next(
    impl: Implementation, case: Case, c: int
):
    """With another f_c a step is the same and the next one another."""
    settings = case.settings._replace(compression_rate=c)
    if impl.declared.c_mem_len == "block":  # with a rate of 1, too
        settings = settings._replace(c_mem_len=max(settings.c_mem_len, settings.mem_len))
    own_way = impl.declared.overflow in ("pad", "drop")  # with a rest
    settings, (T,) = fit(impl.declared, settings, case.schedule, divisible=own_way)

    def differs() -> Tensor:
        model = impl.build(settings)
        other = with_another_f_c(impl, model, Case(settings, [T]))
        state = overflowing(impl, model, settings, T)
        text = tokens(settings, 2, T)
        after = tokens(settings, 2, T)
        step = impl.step(model, text, state)
        again = impl.step(other, text, state)
        close("logits of a step with another f_c", again.logits, step.logits, impl.tolerance)
        following = impl.step(model, after, step.state).logits
        moved = impl.step(model, after, again.state).logits
        return (moved != following).any().reshape(1)

    seen = in_some_draw(torch.ones(1, dtype=torch.bool), differs)
    holds(seen.all(), "logits of the step after one with another f_c", "others", "the same")


def with_another_f_c(impl: Implementation, model: nn.Module, case: Case) -> nn.Module:
    """A twin with other parameters of f_c, or, where it has none, with a rate of 1."""
    settings, schedule = case
    if not any(impl.compression_parameters(model)):
        if impl.declared.positions == "separate":
            not_claimed("f_c has no parameters, and with the rate positions may change")
        settings = settings._replace(compression_rate=1)
        if fit(impl.declared, settings, schedule).settings != settings:
            not_claimed("f_c has no parameters, and no other rate is possible")
    other = impl.twin(model, settings)
    if other is None:
        not_claimed("parameters depend on the compression rate")
    for layer in impl.compression_parameters(other):
        for parameter in layer:
            parameter.mul_(-2)
    return other


@check(share=3, case=cases(steps=(1, 1), n_layers=3))
def test_MEM_7_layers_remember_their_own_inputs(impl: Implementation, case: Case):
    """A layer's parameters move the memories of the layers above it and no others: change each
    parameter of the model by itself, and look which memories change."""
    settings, (T,) = case
    enough = settings._replace(mem_len=max(T, settings.mem_len) + 3)
    settings, _ = fit(impl.declared, enough, [T])
    two_layers = settings._replace(n_layers=2)
    model = impl.build(settings)
    text = tokens(settings, 2, T)

    def memories() -> list[Tensor]:
        step = impl.step(model, text, impl.start(model, 2))
        return [layer.mem for layer in impl.read(step.state)]

    lowest = set()
    before = memories()
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.mul_(-1.5)
        after = memories()
        parameter.copy_(kept)
        # A gain that meets zeros may still move the last digit below.
        clearly = [not same(after[i], before[i], impl.tolerance) for i in range(3)]
        if any(clearly):
            first = clearly.index(True)
            lowest.add(first)
            above = list(range(first, 3))
            moved = [i for i in above if not torch.equal(before[i], after[i])]
            holds(moved == above, f"layers whose memory moves with {name}", above, moved)
    if language_model_size(impl, settings) > language_model_size(impl, two_layers):
        what = "lowest layers whose memory moves with a parameter"
        holds(lowest == {0, 1, 2}, what, [0, 1, 2], lowest)


def language_model_size(impl: Implementation, settings: Settings) -> int:
    """How many numbers its parameters have: as many with any number of layers, if layers share
    them."""
    model = impl.build(settings)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for layer in impl.compression_parameters(model):
        for parameter in layer:
            sizes.pop(id(parameter), None)
    return sum(sizes.values())


@check(case=cases(steps=(1, 1), n_layers=3))
def test_MEM_7_layers_read_their_own_memories(impl: Implementation, case: Case):
    """Another slot in a layer's memory moves the inputs of the layers above it, and no others."""
    settings, (T,) = case
    enough = settings._replace(mem_len=T + settings.compression_rate + 3)
    settings, _ = fit(impl.declared, enough, [T])
    held = settings.mem_len if impl.declared.start == "zeros" else 3
    c_mem_len = settings.c_mem_len
    rows = []  # of a batch: the layer whose memory is another, and which memory
    for name, length in zip(Slots._fields, (held, c_mem_len), strict=True):
        if length > 0:
            rows += [(i, name) for i in range(3)]
    expected = torch.zeros(len(rows), 3, dtype=torch.bool)  # [row, layer]
    for row, (i, _) in enumerate(rows):
        expected[row, i + 1 :] = True

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, T).expand(len(rows), T)
        plain = []
        other = []
        for mem, c_mem in random_slots(impl, settings, 1, held, c_mem_len):
            slots = Slots(mem.repeat(len(rows), 1, 1), c_mem.repeat(len(rows), 1, 1))
            plain.append(slots)
            other.append(Slots(slots.mem.clone(), slots.c_mem.clone()))
        for row, (i, name) in enumerate(rows):
            slots_of_row = getattr(other[i], name)[row]
            slots_of_row += torch.randn_like(slots_of_row)
        start = impl.start(model, len(rows))
        one = impl.step(model, text, impl.replace(start, plain)).state
        two = impl.step(model, text, impl.replace(start, other)).state
        moved = []
        for before, after in zip(impl.read(one), impl.read(two), strict=True):
            differ = newest(before.mem, T) != newest(after.mem, T)
            moved.append(differ.flatten(1).any(dim=1))
        return torch.stack(moved, dim=1)

    found = in_some_draw(expected, differs)
    for row, (i, name) in enumerate(rows):
        what = f"layers whose inputs move with layer {i}'s {name}"
        wanted = expected[row].nonzero().flatten().tolist()
        got = found[row].nonzero().flatten().tolist()
        holds(got == wanted, what, wanted or "none", got or "none")


@check(case=cases(steps=(1, 1)))
def test_MEM_1_MEM_7_the_first_layer_remembers_the_tokens_in_order(
    impl: Implementation, case: Case
):
    """Its slots depend on their own token alone, the other layers' on those before, too."""
    settings, (T,) = case
    settings, _ = fit(impl.declared, settings._replace(mem_len=T + 3, n_layers=2), [T])

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, T)
        start = impl.start(model, T)
        plain = impl.step(model, text.expand(T, T), start).state
        other = impl.step(model, changed(text, settings.vocab_size), start).state
        moved = []
        for one, two in zip(impl.read(plain), impl.read(other), strict=True):
            held = one.mem.size(1)
            holds(held >= T, f"slots of memory after a step of {T} tokens", f"{T} or more", held)
            differ = newest(one.mem, T) != newest(two.mem, T)
            moved.append(differ.any(dim=-1))
        return torch.stack(moved)  # [layer, token, slot]

    own_token = torch.eye(T, dtype=torch.bool)
    and_those_before = torch.ones(T, T).triu().bool()
    expected = torch.stack([own_token, and_those_before])
    found = in_some_draw(expected, differs)
    for i in range(2):
        what = f"slots of layer {i} that a changed token moves, token by token"
        wanted = expected[i].int().tolist()
        got = found[i].int().tolist()
        try:
            holds(got == wanted, what, wanted, got)
        except Broken as broken:  # in another order, or of other tokens
            in_order = sorted(zip(*wanted, strict=True))
            broken.rule = "MEM-1" if sorted(zip(*got, strict=True)) == in_order else "MEM-7"
            raise


@check(gradients=True, case=cases())
def test_MEM_8_memories_are_not_changed_nor_carry_a_gradient(impl: Implementation, case: Case):
    unchanged_and_cut_off(impl, case, impl.dtype)


@check(gradients=True, case=cases())
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
        before = copies(impl.read(state))
        step = impl.step(model, segment, state)
        holds(step.logits.requires_grad, f"gradient of the logits of step {n}", "some", "none")
        (step.logits.sum() + step.loss).backward()
        for i, (was, now) in enumerate(zip(before, impl.read(state), strict=True)):
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
