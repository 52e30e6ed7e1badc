"""ATT: what attention sees, and at which distance."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import oracle
from .adapter import OTHER, Settings
from .implementation import Implementation, Slots, Step, not_claimed
from .support import (
    PARAMETRIC,
    WHOLE,
    Broken,
    Case,
    cases,
    changed,
    check,
    close,
    counts,
    filled,
    fit,
    holds,
    in_some_draw,
    newest,
    random_slots,
    round_up,
    same,
    tokens,
)


class Logits(NamedTuple):
    """Those of one text, row by row, and of the text with another token, token i in row i."""

    plain: Tensor
    other: Tensor


def of_changed_tokens(impl: Implementation, case: Case, full: bool = True) -> Logits:
    """For a segment after full memories, or for the first of all."""
    settings, (T,) = case
    model = impl.build(settings)
    text = tokens(settings, 1, T)
    state = filled(impl, model, settings, T, batch=T) if full else impl.start(model, T)
    plain = impl.step(model, text.expand(T, T), state)
    other = impl.step(model, changed(text, settings.vocab_size), state)
    return Logits(plain.logits, other.logits)


@check(case=cases(steps=(1, 1), shortest=2), full=st.booleans())
def test_ATT_1_a_changed_token_changes_nothing_before_it(
    impl: Implementation, case: Case, full: bool
):
    _, (T,) = case
    plain, other = of_changed_tokens(impl, case, full)
    behind = "full memories" if full else "the start"
    for i in range(T):
        what = f"logits before position {i} of {T} after {behind}, the token there another"
        close(what, other[i, :i], plain[i, :i])


@check(
    gradients=True,
    case=cases(steps=(1, 1), shortest=2, vocab_size=30),
    full=st.booleans(),
)
def test_ATT_1_the_derivative_by_later_tokens_is_zero(impl: Implementation, case: Case, full: bool):
    """By what the embedding gives, or, where that is not to be had, by the rows of its table."""
    settings, (T,) = case
    model = impl.build(settings)
    state = filled(impl, model, settings, T) if full else impl.start(model, 2)
    text = torch.randperm(settings.vocab_size)[:T]
    given = impl.give(text.expand(2, T))
    embedded: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        if isinstance(module, nn.Embedding) and output.shape[:2] == given.shape:
            embedded.append(output)

    with nn.modules.module.register_module_forward_hook(keep):
        logits = impl.step(model, text.expand(2, T), state).logits
    layout = None
    if len(embedded) == 1 and is_source(embedded[0], logits):
        (source,) = embedded
    else:
        source, layout = table_of(impl, model, settings)
    for t in range(T):
        square = logits[0, t].square().sum()
        (gradient,) = torch.autograd.grad(square, source, retain_graph=True)
        if layout is None:
            by_tokens = impl.take(gradient)[0]
        else:
            by_tokens = gradient.contiguous().as_strided(*layout)[text]
        of_later = by_tokens[t + 1 :]
        close(f"derivative of the logits at {t} by later tokens", of_later, 0 * of_later)


def is_source(x: Tensor, logits: Tensor) -> bool:
    """Whether the logits are made of x (behind a bridge they are made of the parameters alone)."""
    if not x.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(logits.sum(), x, retain_graph=True, allow_unused=True)
    return gradient is not None


def table_of(
    impl: Implementation, model: nn.Module, settings: Settings
) -> tuple[nn.Parameter, tuple]:
    """The embedding as a parameter, and the shape and strides under which its row i is that of
    token i."""
    table = None
    if impl.has("weights"):
        table = impl.weights(model).get("embedding")
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == settings.vocab_size:
            table = module.weight
    if table is None:
        not_claimed("has no nn.Embedding of its tokens, and weights() names none")
    users = [module for module in model.modules() if getattr(module, "weight", None) is table]
    if len(users) > 1:
        not_claimed("the embedding has another use")
    for parameter in model.parameters():
        if parameter.data_ptr() == table.data_ptr():
            return parameter, (table.shape, table.stride())
    return not_claimed("the embedding that weights() names is no parameter")


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
        before = impl.step(model, text, impl.replace(start, plain)).logits
        after = impl.step(model, text, impl.replace(start, other)).logits
        return (before != after).any(dim=-1)

    reached = in_some_draw(torch.ones(rows, T, dtype=torch.bool), differs)
    for row, (i, part, k) in enumerate(places):
        what = f"logits after slot {k} of layer {i}'s {part} was changed"
        for t in range(T):
            holds(reached[row, t], f"{what}, at position {t}", "others", "the same")


@check(case=cases(steps=(1, 1), longest=1, n_layers=1))
def test_ATT_2_a_token_sees_itself(impl: Implementation, case: Case):
    """If it did not, it would get the same from a slot that is there once as from two of it."""
    short = case.settings._replace(mem_len=1, c_mem_len=1)
    settings, schedule = fit(impl.declared, short, case.schedule)
    lengths = (settings.mem_len, settings.mem_len + 1)
    if impl.declared.start == "empty":
        settings, _ = fit(impl.declared, settings._replace(mem_len=50), schedule)  # none leaves

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, *schedule)
        slot = torch.randn(1, 1, settings.d_model, dtype=impl.dtype)
        c_mem = slot.expand(-1, settings.c_mem_len, -1)
        found = []
        for mem in lengths:
            if impl.has("replace"):
                slots = Slots(slot.expand(-1, mem, -1), c_mem)
                one, state = behind(impl, model, settings, [slots])
            else:
                one = model
                state = after_one_token(impl, model, settings, *schedule, mem)
            found.append(impl.step(one, text, state).logits[:, 0])
        return (found[0] - found[1]).abs().amax().reshape(1) > impl.tolerance

    seen = in_some_draw(torch.ones(1, dtype=torch.bool), differs)
    what = "logits of a first token behind a slot, once that slot is there twice"
    holds(seen.all(), what, "others", "the same", "the token is hidden from itself")


def after_one_token(
    impl: Implementation, model: nn.Module, settings: Settings, T: int, count: int
) -> Any:
    """The state after the same token so many times: of one layer equal slots."""
    if impl.declared.start == "zeros":
        impl.needs("replace")
    state = impl.start(model, 1)
    for _ in range(count):
        state = impl.step(model, torch.zeros(1, T, dtype=torch.int64), state).state
    return state


def behind(
    impl: Implementation, model: nn.Module, settings: Settings, slots: list[Slots]
) -> tuple[nn.Module, Any]:
    """The model and a state with these memories, which nothing has to fit but where memories are
    always full: there a twin whose lengths they have."""
    rows, mem_len, _ = slots[0].mem.shape
    c_mem_len = slots[0].c_mem.size(1)
    if impl.declared.start == "zeros":
        settings = settings._replace(mem_len=mem_len, c_mem_len=c_mem_len)
        if fit(impl.declared, settings, [settings.segment]).settings != settings:
            not_claimed("there is no model with memories of such lengths")
        model = impl.twin(model, settings)
        if model is None:
            not_claimed("parameters depend on the lengths of the memories")
    return model, impl.replace(impl.start(model, rows), slots)


@check(case=cases(steps=(1, 1)), c_mem=counts(0, 8), mem=counts(0, 8))
def test_ATT_3_MEM_1_compressed_memory_stands_before_memory_a_position_a_slot(
    impl: Implementation, case: Case, c_mem: int, mem: int
):
    """The same slots, divided otherwise between the memories, stand at the same distances."""
    if impl.declared.positions == "separate":
        not_claimed("compressed memory has positions of its own")
    settings, (T,) = case
    fewest = 0
    if impl.declared.start == "zeros":  # then models of those lengths, which differ by one at least
        fewest = 1
        c_mem = max(c_mem, 2)
        mem = max(mem, T, settings.compression_rate)
    settings, _ = fit(impl.declared, settings._replace(mem_len=99, c_mem_len=99), [T])
    model = impl.build(settings)
    text = tokens(settings, 2, T)
    slots = [layer.mem for layer in random_slots(impl, settings, 2, c_mem + mem, 0)]
    turned = [torch.cat([x[:, c_mem:], x[:, :c_mem]], dim=1) for x in slots]

    def logits(n: int, slots: list[Tensor]) -> Tensor:
        """With n of the slots in compressed memory."""
        divided = [Slots(mem=x[:, n:], c_mem=x[:, :n]) for x in slots]
        one, state = behind(impl, model, settings, divided)
        return impl.step(one, text, state).logits

    what = f"logits with {c_mem} slots of compressed memory before {mem} of memory"
    causes = {"memory is read before compressed memory": logits(fewest, turned)}
    try:
        close(what, logits(c_mem, slots), logits(fewest, slots), impl.tolerance, causes)
    except Broken as broken:
        broken.rule = "MEM-1" if broken.cause in causes else "ATT-3"
        raise


@check(case=cases(steps=(2, 5)), c_mem=counts(0, 8), mem=counts(0, 8))
def test_ATT_3_a_token_is_as_far_away_in_memory_as_in_the_segment(
    impl: Implementation, case: Case, c_mem: int, mem: int
):
    """Behind memories of any lengths a text in one segment and the same text in several, each
    behind the memory of those before it, give the same logits."""
    if impl.declared.segments == "full":
        not_claimed("every segment has the length that the model is built for")
    if impl.declared.positions == "separate":
        c_mem = 0  # its distances may be counted as if there were no memory between
    settings, schedule = case
    length = sum(schedule)
    longer = settings._replace(mem_len=mem + length, c_mem_len=max(c_mem, 1))
    if impl.declared.start == "zeros":  # long enough to read a step's inputs from it
        mem += max(schedule) + settings.compression_rate
        longer = settings._replace(mem_len=mem, c_mem_len=c_mem)
    settings, _ = fit(impl.declared, longer, [length])
    model = impl.build(settings)
    text = tokens(settings, 2, length)
    slots = random_slots(impl, settings, 2, mem, c_mem)

    def logits(lengths: list[int]) -> Tensor:
        before = slots
        one, state = behind(impl, model, settings, before)
        found = []
        for segment in text.split(lengths, dim=1):
            step = impl.step(one, segment, state)
            found.append(step.logits)
            state = step.state
            if impl.declared.start == "zeros" and len(lengths) > 1:
                after = impl.read(state)
                before = with_inputs(before, after, segment.size(1))
                one, state = behind(impl, model, settings, before)
        return torch.cat(found, dim=1)

    what = f"logits of segments of {schedule}, behind {c_mem} + {mem} slots"
    close(what, logits(schedule), logits([length]), impl.tolerance)


def with_inputs(before: list[Slots], after: list[Slots], T: int) -> list[Slots]:
    """The memories before a step of T tokens, once its inputs have joined them."""
    joined = []
    for old, new in zip(before, after, strict=True):
        joined.append(Slots(torch.cat([old.mem, newest(new.mem, T)], dim=1), old.c_mem))
    return joined


@check(
    case=cases(steps=(1, 1), longest=1, n_layers=1, n_heads=1, d_model=8),
    c_mem=counts(0, 5),
    mem=counts(0, 5),
)
def test_ATT_3_a_slot_without_attention_may_as_well_not_be_there(
    impl: Implementation, case: Case, c_mem: int, mem: int
):
    """An oldest slot so large that softmax gives it nothing (of it and its negative it is one)
    moves no other slot to another distance, however full the memories are."""
    if impl.declared.storage == "raw" and case.settings.norm_first:
        not_claimed("memories are normalised when they are read")
    c = case.settings.compression_rate
    settings = case.settings._replace(mem_len=50, c_mem_len=7)  # from which none leaves
    in_memory = impl.declared.positions == "separate"  # the slot; if not, in compressed memory
    if in_memory:
        c_mem = 0
        settings = settings._replace(c_mem_len=0)
    if impl.declared.start == "zeros":
        mem = max(mem, c)
    settings, (T,) = fit(impl.declared, settings, [1])
    model = impl.build(settings)
    text = tokens(settings, 1, T)
    (slots,) = random_slots(impl, settings, 1, mem, c_mem)
    large = 1e8 * torch.randn(1, 1, settings.d_model, dtype=impl.dtype)

    def logits(*oldest: Tensor) -> Tensor:
        more = Slots(slots.mem, torch.cat([*oldest, slots.c_mem], dim=1))
        if in_memory:
            more = Slots(torch.cat([*oldest, slots.mem], dim=1), slots.c_mem)
        one, state = behind(impl, model, settings, [more])
        return impl.step(one, text, state).logits[:, 0]  # each query has a sign of its own

    without = logits()
    found = logits(large)
    of_negative = logits(-large)
    if (of_negative - without).abs().max() < (found - without).abs().max():
        found = of_negative
    what = f"logits with a slot that gets no attention before {c_mem} + {mem} others"
    close(what, found, without, impl.tolerance)


@check(case=cases(shortest=2, compression=WHOLE, divisible=True), before=counts(1, 4))
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


@check(gradients=True, case=cases(zeros=True, steps=(1, 5)))
def test_ATT_3_MEM_5_LOSS_5_every_step_equals_the_loops(impl: Implementation, case: Case):
    """The whole step in plain Python (oracle.py), for an implementation that names its weights: in
    the order in which a step makes them, so that what differs first is told."""
    if impl.declared.positions == "separate":
        not_claimed("the loops have no positions apart for compressed memory")
    settings, schedule = case
    if settings.compression == OTHER:
        not_claimed("the loops have no other compression functions than the paper's")
    model = impl.build(settings).train()
    named = impl.weights(model, *needed_names(settings))
    unnamed = parameters_without_name(impl, settings, model, named)
    if unnamed:
        not_claimed(f"weights() does not name what is in {', '.join(unnamed)}")
    weights = oracle.lists(named)
    text = tokens(settings, 2, sum(schedule))
    state = impl.start(model, 2)
    mem = []  # for each row, for each layer
    c_mem = []
    for row in range(2):
        mem.append([layer.mem[row].tolist() for layer in impl.read(state)])
        c_mem.append([layer.c_mem[row].tolist() for layer in impl.read(state)])
    for n, segment in enumerate(text.split(schedule, dim=1)):
        step = impl.step(model, segment, state)
        state = step.state
        by_loops = partial(rows_by_loops, impl, settings, weights, segment, mem, c_mem)
        results = by_loops()
        equal_so_far = "nothing yet"
        for stage in stages(impl, settings, step):
            equal_to_the_loops(impl, n, stage, results, by_loops, equal_so_far)
            equal_so_far = stage.name
        mem = [result.mem for result in results]
        c_mem = [result.c_mem for result in results]


def parameters_without_name(
    impl: Implementation, settings: Settings, model: nn.Module, named: dict
) -> list[str]:
    """The parameters of which weights() gives no view: what they do the loops do not know."""
    viewed = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(named)}
    ignored: set[int] = set()
    if settings.compression not in PARAMETRIC:
        ignored = {id(p) for layer in impl.compression_parameters(model) for p in layer}
    found = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in ignored and parameter.untyped_storage().data_ptr() not in viewed:
            found.append(name)
    return found


def tensors_in(named: Any) -> Iterator[Tensor]:
    """Those of a dict or list, and of the dicts and lists in it."""
    if isinstance(named, Tensor):
        yield named
        return
    for part in named.values() if isinstance(named, dict) else named:
        yield from tensors_in(part)


def rows_by_loops(
    impl: Implementation,
    settings: Settings,
    weights: dict,
    segment: Tensor,
    mem: list,
    c_mem: list,
    mistake: str = "",
) -> list[oracle.Result]:
    """The step of each row."""
    rows = []
    for tokens_of, mem_of, c_mem_of in zip(segment.tolist(), mem, c_mem, strict=True):
        found = oracle.step(impl.declared, settings, weights, tokens_of, mem_of, c_mem_of, mistake)
        rows.append(found)
    return rows


def needed_names(settings: Settings) -> list[str]:
    """Of the weights, those that the loops read."""
    names = ["norm1_weight", "norm1_bias", "query", "key", "value", "relative_key"]
    names += ["content_bias", "position_bias", "output", "norm2_weight", "norm2_bias"]
    names += ["ff1_weight", "ff1_bias", "ff2_weight", "ff2_bias"]
    names += ["embedding", "logits_weight", "logits_bias"]
    if settings.norm_first:
        names += ["norm_weight", "norm_bias"]
    if settings.compression in ("conv", "dilated_conv"):
        names += ["convolution"]
        if settings.compression_loss == "autoencoding":
            names += ["transposed_convolution"]
    if settings.compression == "dilated_conv":
        names += ["dilated"]
    return names


class Stage(NamedTuple):
    """Something that a step makes, and where it stands in the loops' results of all rows."""

    name: str
    rule: str
    got: Tensor
    of: Callable[[list[oracle.Result]], Any]


def stages(impl: Implementation, settings: Settings, step: Step) -> list[Stage]:
    """In the order in which they are made. A layer's output is seen in the next one's memory."""
    made = []
    for i, layer in enumerate(impl.read(step.state)):
        rule = "MEM-5"
        what = "the embedding or how it is stored"
        if i > 0:
            rule = "ATT-3"
            what = f"layer {i - 1}'s output (attention, feed-forward) or how it is stored"
        name = f"{what}, in layer {i}'s memory"
        made.append(Stage(name, rule, layer.mem, partial(slots_of, "mem", i)))
        name = f"layer {i}'s compressed slots"
        made.append(Stage(name, "MEM-5", layer.c_mem, partial(slots_of, "c_mem", i)))
    last = f"layer {settings.n_layers - 1}'s output (attention, feed-forward) or what follows it"
    logits = step.logits.log_softmax(dim=-1)  # log-probabilities do as well
    made.append(Stage(f"{last}, in the logits", "ATT-3", logits, log_probabilities_of))
    if settings.compression in PARAMETRIC:
        loss = partial(loss_of, impl)
        made.append(Stage("the compression loss", "LOSS-5", step.loss, loss))
    return made


def slots_of(name: str, layer: int, rows: list[oracle.Result]) -> list:
    return [getattr(row, name)[layer] for row in rows]


def log_probabilities_of(rows: list[oracle.Result]) -> list:
    found = []
    for row in rows:
        found.append([[math.log(p) for p in oracle.softmax(logits)] for logits in row.logits])
    return found


def loss_of(impl: Implementation, rows: list[oracle.Result]) -> float:
    return oracle.reduce(impl.declared, [row.squares for row in rows])


def equal_to_the_loops(
    impl: Implementation,
    n: int,
    stage: Stage,
    results: list[oracle.Result],
    by_loops: Callable[..., list[oracle.Result]],
    equal_so_far: str,
) -> None:
    """Raise Broken, of the stage's rule, unless it is what the loops give; a cause is looked for
    among their mistakes."""
    got = stage.got
    tolerance = 10 * impl.tolerance

    def loops(rows: list[oracle.Result]) -> Tensor:
        found = torch.tensor(stage.of(rows), dtype=impl.dtype)
        if found.numel() == 0:  # a list of no slots does not tell their width
            found = found.reshape(2, 0, *got.shape[2:])
        return found

    expected = loops(results)
    causes = {}
    if not same(got, expected, tolerance):
        for mistake in oracle.MISTAKES:
            causes[mistake] = loops(by_loops(mistake))
        if got.dim() > 2:
            causes["read() gives the newest slot first"] = expected.flip(1)
    what = f"{stage.name}, which differs first in step {n} (last equal: {equal_so_far})"
    try:
        close(what, got, expected, tolerance, causes)
    except Broken as broken:
        broken.rule = stage.rule
        raise
