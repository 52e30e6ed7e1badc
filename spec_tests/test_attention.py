"""ATT: what attention sees, and at which distance."""

import torch
from hypothesis import strategies as st
from torch import nn

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
    tokens,
)


@check(case=cases(steps=(1, 1)))
def test_ATT_1_a_changed_token_changes_nothing_before_it(impl: Implementation, case: Case):
    settings, (T,) = case
    model, text = impl.build(settings), tokens(settings, 1, T)
    state = filled(impl, model, settings, T, batch=T)
    with torch.no_grad():
        plain = impl.step(model, text.expand(T, T), state).logits
        other = impl.step(model, changed(text, settings.vocab_size), state).logits
    for i in range(T):
        what = f"logits before position {i}, once the token there is another, of a segment of {T}"
        close(what, other[i, :i], plain[i, :i])


@check(case=cases(steps=(1, 1), vocab_size=30))
def test_ATT_1_the_derivative_by_later_tokens_is_zero(impl: Implementation, case: Case):
    """By the rows of the embedding, if there is one."""
    settings, (T,) = case
    model = impl.build(settings)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    embeddings = [m for m in embeddings if m.num_embeddings == settings.vocab_size]
    if not embeddings:
        not_claimed("has no nn.Embedding of its tokens")
    state = filled(impl, model, settings, T)
    text = torch.randperm(settings.vocab_size)[None, :T].expand(2, T)
    logits = impl.step(model, text, state).logits
    for t in range(T):
        (gradient,) = torch.autograd.grad(
            logits[0, t].square().sum(), embeddings[0].weight, retain_graph=True
        )
        of_later = gradient[text[0, t + 1 :]]
        close(f"derivative of the logits at {t} by later tokens", of_later, 0 * of_later)


@check(case=cases(steps=(1, 1)))
def test_ATT_2_every_token_up_to_t_reaches_the_logits_at_t(impl: Implementation, case: Case):
    settings, (T,) = case

    def differs() -> torch.Tensor:
        model, text = impl.build(settings), tokens(settings, 1, T)
        state = filled(impl, model, settings, T, batch=T)
        with torch.no_grad():
            plain = impl.step(model, text.expand(T, T), state).logits
            other = impl.step(model, changed(text, settings.vocab_size), state).logits
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
    M, C, L = settings.mem_len, settings.c_mem_len, settings.n_layers
    slots = [(i, part, k) for i in range(L) for part in (0, 1) for k in range((M, C)[part])]
    rows = len(slots)

    def differs() -> torch.Tensor:
        model, text = impl.build(settings), tokens(settings, 1, T).expand(rows, T)
        plain = random_slots(impl, settings, 1, M, C)
        plain = [Slots(*(part.expand(rows, -1, -1).clone() for part in layer)) for layer in plain]
        other = [Slots(*(part.clone() for part in layer)) for layer in plain]
        for row, (i, part, k) in enumerate(slots):
            other[i][part][row, k] += torch.randn(settings.d_model, dtype=impl.dtype)
        start = impl.start(model, rows)
        with torch.no_grad():
            before, after = (
                impl.step(model, text, impl.replace(start, x)).logits for x in (plain, other)
            )
        return (before != after).any(dim=-1)

    reached = in_some_draw(torch.ones(rows, T, dtype=torch.bool), differs)
    for row, (i, part, k) in enumerate(slots):
        what = f"logits after slot {k} of layer {i}'s {Slots._fields[part]} was changed"
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
    if full:  # then a model of those lengths, which differ in one slot at least
        c_mem, mem = max(c_mem, 2), max(mem, T, settings.compression_rate)
    settings = settings._replace(mem_len=99, c_mem_len=99, segment=T)
    model, text = impl.build(settings), tokens(settings, 2, T)
    both = random_slots(impl, settings, 2, c_mem + mem, 0)

    def logits(n: int, slots: list[Slots]) -> torch.Tensor:
        divided = [Slots(x[:, n:], x[:, :n]) for x, _ in slots]
        found = model
        if full:
            lengths = {"c_mem_len": n, "mem_len": c_mem + mem - n}
            found = impl.twin(model, settings._replace(**lengths))
            found = found or not_claimed("parameters depend on the lengths of the memories")
        return impl.step(found, text, impl.replace(impl.start(found, 2), divided)).logits

    other = [Slots(torch.cat([x[:, c_mem:], x[:, :c_mem]], dim=1), y) for x, y in both]
    close(
        f"logits with {c_mem} slots of compressed memory before {mem} of memory",
        logits(c_mem, both),
        logits(int(full), both),
        impl.tolerance,
        {"memory is read before compressed memory": logits(int(full), other)},
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
    settings = fit(
        impl.declared, settings._replace(mem_len=mem + length, c_mem_len=9), [length]
    ).settings
    model, text = impl.build(settings), tokens(settings, 2, length)
    slots = random_slots(impl, settings, 2, mem, c_mem)
    found = []
    for lengths in ([length], schedule):
        state, logits = impl.replace(impl.start(model, 2), slots), []
        for segment in text.split(lengths, dim=1):
            step = impl.step(model, segment, state)
            state = step.state
            logits.append(step.logits)
        found.append(torch.cat(logits, dim=1))
    what = f"logits of segments of {schedule}, behind {c_mem} + {mem} slots"
    close(what, found[1], found[0], impl.tolerance)


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
    model, text = impl.build(settings), tokens(settings, 1, 1)
    (slots,) = random_slots(impl, settings, 1, mem, c_mem)
    large = 1e8 * torch.randn(1, 1, settings.d_model, dtype=impl.dtype)
    start = impl.start(model, 1)

    def logits(*oldest: torch.Tensor) -> torch.Tensor:
        c_mem = torch.cat([*oldest, slots.c_mem], dim=1)
        state = impl.replace(start, [Slots(slots.mem, c_mem)])
        return impl.step(model, text, state).logits

    without, found = logits(), [logits(large), logits(-large)]
    error = [(x - without).abs().max().item() for x in found]
    what = f"logits with a slot that gets no attention before {c_mem} + {mem} others"
    close(what, found[error[0] > error[1]], without, impl.tolerance)


@check(case=cases(longest=2, compression=WHOLE, divisible=True), before=st.integers(1, 4))
def test_ATT_4_the_same_context_gives_the_same_logits_anywhere_in_the_stream(
    impl: Implementation, case: Case, before: int
):
    """Two streams with one ending, which is longer than the reach: at the end nothing of what was
    before, nor of how long ago it began, is left."""
    settings, (T, *_) = case
    c, model = settings.compression_rate, impl.build(settings)
    held = settings.mem_len + c * settings.c_mem_len
    ending = tokens(settings, 1, T * (-(-settings.n_layers * (held + T) // T) + 1))
    fill = T * -(-held // T)  # the memories are full by then
    last = []
    for n in (fill, fill + T * before):
        text = torch.cat([tokens(settings, 1, n), ending], dim=1)
        last.append(impl.logits(model, text, [T] * (text.size(1) // T))[:, -T:])
    what = f"logits at the end of two streams, one {before} segments longer than the other"
    close(what, last[1], last[0], impl.tolerance)


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
    settings = fit(impl.declared, settings._replace(mem_len=length), [length]).settings
    model, text = impl.build(settings), tokens(settings, 2, length)
    whole = impl.logits(model, text, [length])
    split = impl.logits(model, text, schedule)
    close(f"logits of segments of {schedule}", split, whole, impl.tolerance)


@check(case=cases())
def test_ATT_6_rows_do_not_see_each_other(impl: Implementation, case: Case):
    settings, schedule = case
    model, text = impl.build(settings), tokens(settings, 3, sum(schedule))
    others = text.clone()
    others[1:] = (others[1:] + 1) % settings.vocab_size
    together, changed_steps = (impl.run(model, x, schedule) for x in (text, others))
    for i, (step, other) in enumerate(zip(together, changed_steps, strict=True)):
        what = f"logits of row 0 in step {i}, once the other rows are others"
        close(what, other.logits[0], step.logits[0])
    for row in range(3):
        alone = impl.run(model, text[row : row + 1], schedule)
        for i, (step, single) in enumerate(zip(together, alone, strict=True)):
            what = f"of row {row} alone in step {i}"
            close(f"logits {what}", single.logits[0], step.logits[row], impl.tolerance)
            for both, one in zip(impl.read(step.state), impl.read(single.state), strict=True):
                for a, b in zip(both, one, strict=True):
                    close(f"memories {what}", b[0], a[row], impl.tolerance)


@check(case=cases(zeros=True, steps=(1, 5)))
def test_ATT_3_MEM_5_LOSS_5_every_step_equals_the_loops(impl: Implementation, case: Case):
    """The whole step in plain Python (oracle.py), for an implementation that names its weights."""
    settings, schedule = case
    model = impl.build(settings).train()
    weights = oracle.lists(impl.weights(model))
    if "embedding" not in weights:
        not_claimed("weights() does not name all of them")
    text, state = tokens(settings, 2, sum(schedule)), impl.start(model, 2)
    memories = [
        [[getattr(x, part)[row].tolist() for x in impl.read(state)] for part in Slots._fields]
        for row in range(2)
    ]
    for i, segment in enumerate(text.split(schedule, dim=1)):
        step = impl.step(model, segment, state)
        losses = []
        for row in range(2):
            text = segment[row].tolist()
            result = oracle.step(impl.declared, settings, weights, text, *memories[row])
            place = f"of row {row} in step {i}"
            near(impl, f"logits {place}", step.logits[row], result.logits)
            for k, layer in enumerate(impl.read(step.state)):
                near(impl, f"memory {place}, layer {k}", layer.mem[row], result.mem[k])
                near(
                    impl, f"compressed memory {place}, layer {k}", layer.c_mem[row], result.c_mem[k]
                )
            memories[row] = result.mem, result.c_mem
            losses.append(result.squares)
        if settings.compression in PARAMETRIC:
            loss = oracle.reduce(impl.declared, losses)
            near(impl, f"compression loss in step {i}", step.loss, loss)
        state = step.state


def near(impl: Implementation, what: str, got: torch.Tensor, expected: object) -> None:
    loops = torch.tensor(expected, dtype=impl.dtype)
    loops = loops if loops.numel() else loops.reshape(0, *got.shape[1:])
    close(what, got, loops, 10 * impl.tolerance)
