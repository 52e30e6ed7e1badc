"""What the tests of the rules are written with: examples to draw, comparisons that explain, and
the bookkeeping of which token is where."""

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from .adapter import COMPRESSIONS, LOSSES, OTHER, Declaration, Settings
from .implementation import (
    CPU,
    Implementation,
    Slots,
    Step,
    Unusable,
    not_claimed,
    raise_unusable,
)

PARAMETRIC = ("conv", "dilated_conv", OTHER)  # the compression functions that a loss trains
STRIDED = ("conv", "mean_pool", "max_pool")  # slot k is a function of block k alone
WHOLE = ("conv", "mean_pool")  # and of all of it

# ------------------------------------------------------------------------------------- examples


class TorchRandom:
    """torch's random numbers as Hypothesis wants them, to seed them before every example."""

    shift = 0  # --spec-seed
    on_cpu = True
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)

    def seed(self, seed: int) -> None:
        if self.on_cpu:  # torch.manual_seed would look for other devices every time, too
            torch.default_generator.manual_seed(seed + self.shift)
        else:
            torch.manual_seed(seed + self.shift)


torch_random = TorchRandom()
hypothesis.register_random(torch_random)

PROFILES = {"quick": 20, "default": 60, "thorough": 600}  # examples of a check

for name, examples in PROFILES.items():
    hypothesis.settings.register_profile(
        name,
        derandomize=True,  # a failure is the code's, never the draw's
        deadline=None,  # machines differ
        database=None,
        max_examples=examples,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * (name != "quick"),
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def prepare(profile: str, seed: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """Set up a process that is to test."""
    torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other
    torch.set_default_dtype(dtype)
    hypothesis.settings.load_profile(profile)
    torch_random.shift = seed
    torch_random.on_cpu = device.type == "cpu"
    if not torch_random.on_cpu:
        compute_exactly()


def compute_exactly() -> None:
    """As a CPU does: the same sums in every run, of all of a number's digits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for the first
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


class Case(NamedTuple):
    """A model's settings and the lengths of the segments that it is fed."""

    settings: Settings
    schedule: list[int]


def allowed(fixed: Mapping, name: str, offered: Sequence, supported: Sequence) -> list:
    """Those of the choices that an implementation supports; none: the check is not claimed."""
    if name in fixed:
        offered = fixed[name]
        if not isinstance(offered, tuple):
            offered = (offered,)
    choices = [choice for choice in offered if choice in supported]
    if not choices:
        not_claimed(f"{name} is not {offered[0]!r}")
    return choices


def cases(
    steps: tuple[int, int] = (1, 6),
    longest: int = 6,
    shortest: int = 1,
    zeros: bool = False,
    divisible: bool = False,
    rest: bool = False,
    readable: bool = False,
    **fixed: Any,
) -> Callable[[Implementation], st.SearchStrategy[Case]]:
    """Settings and schedules that the implementation supports, valid by construction. `fixed`
    settings are not drawn (a tuple: drawn from); `zeros` allows memories of length 0.
    Lengths are multiples of c if `divisible`, and, where an implementation has its own way with
    what c does not divide, in all checks but those of that way (`rest`), where none is. Memories
    are often long enough to read a step's inputs from them if `readable` (see `joined`)."""

    def strategy(impl: Implementation) -> st.SearchStrategy[Case]:
        declared = impl.declared
        offered = (*COMPRESSIONS, OTHER)
        compressions = allowed(fixed, "compression", offered, declared.compressions)
        losses = allowed(fixed, "compression_loss", LOSSES, declared.compression_losses)
        norms = tuple(norm == "pre" for norm in declared.norms)
        norms_first = allowed(fixed, "norm_first", (True, False), norms)
        if fixed.get("mem_len") == 0 and declared.mem_len != "any":
            not_claimed("mem_len is at least 1")
        if fixed.get("c_mem_len") == 0 and declared.c_mem_len == "one":
            not_claimed("c_mem_len is at least 1")
        if fixed.get("c_mem_len") == 0 and not may_lack_blocks(declared):
            not_claimed("c_mem_len is at least a block's slots")
        own_way = declared.overflow in ("pad", "drop")
        only_rests = own_way and rest
        multiples = divisible or (own_way and not rest)

        draw_size = draw_any_size
        draw_schedule = draw_any_schedule
        ways = list(itertools.product(compressions, losses, norms_first))
        if declared.compiled:
            ways = few_ways(compressions, losses, norms_first)
            draw_size = draw_one_of_few_sizes
            draw_schedule = draw_one_of_few_schedules
        lowest = 0 if zeros else 1
        constant = {k: value for k, value in fixed.items() if not isinstance(value, tuple)}

        @st.composite
        def draw_case(draw: st.DrawFn) -> Case:
            size = draw_size(draw, lowest, only_rests)
            compression, loss, norm_first = draw(st.sampled_from(ways))
            settings = size._replace(
                compression=compression,
                compression_loss=loss,
                norm_first=norm_first,
            )
            settings = settings._replace(**constant)
            rate = settings.compression_rate
            lengths = [T for T in range(shortest, longest + 1) if T % rate or not only_rests]
            schedule = draw_schedule(draw, lengths, steps)
            if declared.segments == "full":
                schedule = schedule[:1] * len(schedule)
            only_from_memory = declared.start == "zeros" and declared.segments != "any"
            if readable and (only_from_memory or draw(st.booleans())):
                least = max(schedule) + rate - 1  # so many stay, whatever leaves
                settings = settings._replace(mem_len=max(least, settings.mem_len))
            return fit(declared, settings, schedule, multiples)

        return draw_case()

    return strategy


def counts(least: int, most: int) -> Callable[[Implementation], st.SearchStrategy[int]]:
    """A number from least to most; one of these two where few shapes are to be drawn."""

    def strategy(impl: Implementation) -> st.SearchStrategy[int]:
        if impl.declared.compiled:
            return st.sampled_from([least, most])
        return st.integers(least, most)

    return strategy


def few_ways(*choices: Sequence) -> list[tuple]:
    """Each of the choices once and the first ones twice, beside others."""
    count = max(len(several) for several in choices) + 1
    ways = [tuple(several[k % len(several)] for several in choices) for k in range(count)]
    return list(dict.fromkeys(ways))


def draw_any_size(draw: st.DrawFn, lowest: int, only_rests: bool) -> Settings:
    """Memories of at least the lowest length; with `only_rests` a rate that leaves some."""
    rate = draw(st.integers(3 if only_rests else 1, 4))
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return Settings(
        d_model=n_heads * draw(st.sampled_from([4, 6])),  # of 2 a norm would leave the sign
        n_heads=n_heads,
        n_layers=draw(st.integers(1, 3)),
        d_ff=draw(st.sampled_from([10, 14])),  # so many ReLUs are not all dead
        mem_len=draw(st.integers(lowest, 7)),
        c_mem_len=draw(st.integers(lowest, 4)),
        compression_rate=rate,
    )


def draw_any_schedule(draw: st.DrawFn, lengths: list[int], steps: tuple[int, int]) -> list[int]:
    return draw(st.lists(st.sampled_from(lengths), min_size=steps[0], max_size=steps[1]))


def draw_one_of_few_sizes(draw: st.DrawFn, lowest: int, only_rests: bool) -> Settings:
    few = [
        Settings(mem_len=6, compression_rate=3),  # long enough for `readable`
        Settings(mem_len=2, c_mem_len=2, d_model=4, n_heads=1),  # shorter than a segment
    ]
    if only_rests:
        few = few[:1]
    if lowest == 0:
        few.append(Settings(mem_len=0, c_mem_len=0))
    return draw(st.sampled_from(few))


def draw_one_of_few_schedules(
    draw: st.DrawFn, lengths: list[int], steps: tuple[int, int]
) -> list[int]:
    """One segment of four tokens, several of one and four in turn, if they may be so long."""
    least, most = steps
    few = [T for T in (1, 4) if T in lengths] or lengths[-1:]
    if most == 1:
        return few[-1:]
    first = draw(st.sampled_from(few))
    turns = [first, *(T for T in few if T != first)]
    return (turns * most)[: max(least, min(most, 3))]


def fit(
    declared: Declaration, settings: Settings, schedule: list[int], divisible: bool = False
) -> Case:
    """The nearest settings and schedule that the implementation supports."""
    c = settings.compression_rate
    if declared.segments == "rate":
        schedule = [max(T, c) for T in schedule]
    if divisible or declared.overflow == "divisible":
        schedule = [round_up(T, c) for T in schedule]
        if divisible or declared.start == "empty":  # full ones overflow by T, whatever their length
            settings = settings._replace(mem_len=round_up(settings.mem_len, c))
    settings = settings._replace(segment=max(schedule))
    if declared.c_mem_len == "one" and settings.c_mem_len == 0:
        settings = settings._replace(c_mem_len=1)

    least = {"any": 0, "one": 1, "rate": c, "segment": settings.segment}[declared.mem_len]
    if declared.overflow == "round_up" and settings.c_mem_len > 0:
        least = max(least, c - 1)
    if settings.mem_len < least:
        settings = settings._replace(mem_len=least)

    blocks = settings.mem_len // c
    if declared.c_mem_len == "block" and settings.c_mem_len < blocks:
        if settings.c_mem_len == 0 and may_lack_blocks(declared):
            settings = settings._replace(compression_rate=settings.mem_len + 1)
        else:
            settings = settings._replace(c_mem_len=blocks)
    return Case(settings, schedule)


def may_lack_blocks(declared: Declaration) -> bool:
    """Whether memory can be too short for a block, so that no compressed memory is long enough."""
    if declared.c_mem_len != "block":
        return True
    needs_blocks = "rate" in (declared.segments, declared.mem_len)
    return not needs_blocks and declared.overflow != "divisible"


def round_up(length: int, c: int) -> int:
    """To the next multiple of c."""
    return -(-length // c) * c


def supported(impl: Implementation) -> Settings:
    """Small settings that the implementation can follow, for a step of 4 tokens."""
    declared = impl.declared
    settings = Settings(
        compression=declared.compressions[0],
        compression_loss=declared.compression_losses[0],
        norm_first=declared.norms[0] == "pre",
    )
    settings, _ = fit(declared, settings, [4])
    choices = itertools.product(
        (settings.n_heads, 1),
        (settings.mem_len, 8, 0),
        (settings.c_mem_len, 8),
        (settings.compression_rate, 4, 1),
    )
    for heads, mem_len, c_mem_len, rate in choices:
        another = settings._replace(
            n_heads=heads,
            mem_len=mem_len,
            c_mem_len=c_mem_len,
            compression_rate=rate,
        )
        found, _ = fit(declared, another, [4])
        try:
            if impl.adapter.build(found) is not NotImplemented:
                return found
        except Exception as error:
            raise_unusable("build()", error)
    raise Unusable(f"build() gives NotImplemented, as for {settings} and settings near it")


class Examples:
    """What became of the examples of a check."""

    def __init__(self) -> None:
        self.ran = 0
        self.failed = False
        self.left_out: Counter[str] = Counter()  # why, and how often

    def said(self) -> str:
        """Which were left out, and why."""
        if not self.left_out:
            return ""
        reasons = ", ".join(reason for reason, _ in self.left_out.most_common())
        return f"{self.left_out.total()} of {self.left_out.total() + self.ran} examples: {reasons}"

    def too_few(self) -> bool:
        """Whether what ran is no ground for a verdict."""
        return self.ran < self.left_out.total() / 10


def check(share: int = 1, gradients: bool = False, **strategies: Any) -> Callable:
    """Make a function of an implementation and drawn values a test: Hypothesis's `given`, with
    strategies that may depend on the implementation (`cases`), under the profile loaded when it is
    called; the values of a failing example go with its exception, for the report.

    What is not claimed in an example, or compares nothing there, leaves out that example, and
    another is drawn; a check with too few left is not claimed. One that looks at much in each has
    only a `share` of the examples, a half, a third. No step keeps its graph unless the check is
    about `gradients`."""

    def decorate(body: Callable) -> Callable:
        body = torch.set_grad_enabled(gradients)(body)

        def test(impl: Implementation) -> None:
            examples = Examples()
            count = math.ceil(hypothesis.settings().max_examples / share)
            most = 3 * count

            def example(**drawn: Any) -> None:
                if examples.left_out.total() >= most and not examples.failed:
                    return  # there will be no others
                before = compared.total()
                try:
                    body(impl, **drawn)
                except pytest.skip.Exception as skipped:
                    examples.left_out[skipped.msg] += 1
                    hypothesis.reject()
                except Exception as error:
                    examples.failed = True
                    error.drawn = drawn
                    raise
                if compared.total() == before:
                    examples.left_out["there is nothing to compare"] += 1
                    hypothesis.reject()
                examples.ran += 1

            made = {}
            for name, strategy in strategies.items():
                made[name] = strategy(impl) if callable(strategy) else strategy
            run = hypothesis.given(**made)(example)
            impl.left_out = ""
            try:
                run = hypothesis.settings(max_examples=count)(run)
                hypothesis.seed(torch_random.shift)(run)()
            except hypothesis.errors.Unsatisfiable:
                pass  # all were left out
            impl.left_out = examples.said()
            if examples.too_few():
                reasons = examples.left_out.most_common()
                not_claimed(reasons[0][0] if examples.ran == 0 else examples.said())

        test.__name__ = body.__name__
        test.__doc__ = body.__doc__
        test.__module__ = body.__module__
        test.body = body
        return test

    return decorate


# ---------------------------------------------------------------------------------- comparisons


class Broken(AssertionError):
    """A rule does not hold: what was looked at, what was expected, what came, and the cause if what
    came shows it."""

    def __init__(self, what: str, expected: str, got: str, cause: str | None = None) -> None:
        message = f"{what}: expected {expected}, got {got}"
        if cause:
            message += f" ({cause})"
        super().__init__(message)
        self.what = what
        self.expected = expected
        self.got = got
        self.cause = cause
        self.rule: str | None = None  # of the check's rules the one that it is about, if it is one


ROUNDED = "it is equal in float32's digits: if a part is computed in float32, declare that dtype"
compared: Counter[str] = Counter()  # comparisons made, so that an example without any shows


def holds(ok: object, what: str, expected: object, got: object, cause: str | None = None) -> None:
    """Raise Broken unless `ok`."""
    compared["truths"] += 1
    if not ok:
        raise Broken(what, str(expected), str(got), cause)


def close(
    what: str,
    got: Tensor,
    expected: Tensor,
    tolerance: float = 0,
    causes: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise Broken unless the tensors are equal up to the tolerance, relative to the larger of 1
    and the largest entry expected. `causes` are what a likely fault would have given."""
    if got.shape != expected.shape:
        holds(False, f"{what}, its shape", list(expected.shape), list(got.shape))
    compared["entries"] += got.numel()
    if same(got, expected, tolerance):
        return
    cause = None
    for name, would_give in (causes or {}).items():
        if cause is None and same(got, would_give, max(tolerance, 1e-9)):
            cause = name
    if cause is None and 0 < tolerance < 1e-6 and same(got, expected, 1e-6):
        cause = ROUNDED
    difference = (got - expected).abs().nan_to_num(math.inf)
    differs = difference > bound(expected, tolerance)
    place = tuple(differs.nonzero()[0].tolist())
    wanted = expected[place].item()
    came = got[place].item()
    digits = 9
    if f"{wanted:.9g}" == f"{came:.9g}":
        digits = 17
    said = f"{came:.{digits}g}"
    if place:
        said += f"; {int(differs.sum())} of {got.numel()} entries differ, first at {list(place)}"
    raise Broken(what, f"{wanted:.{digits}g}", said, cause)


def bound(expected: Tensor, tolerance: float) -> float:
    """The difference that is allowed."""
    if expected.numel() == 0:
        return 0.0
    return tolerance * max(1.0, expected.abs().max().item())


def same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if got.shape != expected.shape:
        return False
    near = (got - expected).abs() <= bound(expected, tolerance)
    return bool(near.all())


# ------------------------------------------------------------------------------------- streams


def tokens(settings: Settings, batch: int, length: int) -> Tensor:
    """Text; in a row no token stands beside itself, so that moving it by one shows."""
    steps = torch.randint(1, settings.vocab_size, (batch, length))
    return steps.cumsum(dim=1) % settings.vocab_size


def changed(text: Tensor, vocab_size: int) -> Tensor:
    """For each position a row in which that token is another: `[1, N] -> [N, N]`."""
    return (text + torch.eye(text.size(1), dtype=text.dtype)) % vocab_size


def random_slots(impl: Implementation, settings: Settings, batch: int, mem: int, c_mem: int):
    """Random memories of these lengths for every layer."""

    def one(length: int) -> Tensor:
        return torch.randn(batch, length, settings.d_model, dtype=impl.dtype)

    return [Slots(one(mem), one(c_mem)) for _ in range(settings.n_layers)]


def after_step(
    declared: Declaration, settings: Settings, mem: int, c_mem: int, T: int
) -> tuple[int, int, int]:
    """By the rule: how many slots a layer holds after a step, and how many of them are new ones of
    compressed memory."""
    blocks, leave = evicted(declared, settings, mem + T)
    made = len(blocks)
    return mem + T - leave, min(c_mem + made, settings.c_mem_len), made


def filled(impl: Implementation, model: Any, settings: Settings, T: int, batch: int = 2) -> Any:
    """A state after steps of T tokens, the same in every row: as many as the rule needs for
    memories that are full, and from which the next such step compresses."""
    state = impl.start(model, batch)
    mem = 0
    c_mem = 0
    if impl.declared.start == "zeros":
        mem = settings.mem_len
        c_mem = settings.c_mem_len
    reach = settings.mem_len + settings.compression_rate * (settings.c_mem_len + 1)
    fed = 0
    while fed < reach or evicted(impl.declared, settings, mem + T)[1] == 0:
        segment = tokens(settings, 1, T).expand(batch, T)
        with torch.no_grad():
            state = impl.step(model, segment, state).state
        mem, c_mem, _ = after_step(impl.declared, settings, mem, c_mem, T)
        fed += T
    return state


def overflowing(impl: Implementation, model: Any, settings: Settings, T: int) -> Any:
    """The same, for a check of what is compressed then: memory holds what it should have by now,
    so that the next step overflows."""
    state = filled(impl, model, settings, T)
    most = settings.mem_len
    if impl.declared.overflow == "keep":
        most += settings.compression_rate - 1
    for i, layer in enumerate(impl.read(state)):
        held = layer.mem.size(1)
        what = f"slots of memory in layer {i} after {T} tokens a step, more than memories take"
        holds(held <= most, what, f"at most {most}", held)
        what = f"slots of memory in layer {i}, full by now, so that {T} more overflow"
        holds(held + T > settings.mem_len, what, f"more than {settings.mem_len - T}", held)
    return state


def in_some_draw(expected: Tensor, differs: Callable[[], Tensor]) -> Tensor:
    """What differs in any of several draws of the parameters: where there is an influence, it may
    be lost in one draw (attention of 1e-20, a ReLU that leaves two tokens alike); where there is
    none, none shows in any."""
    found = torch.zeros_like(expected)
    for _ in range(10):
        found |= differs()
        if (found | ~expected).all():
            break
    return found


def longer_memory(impl: Implementation, model: Any, case: Case) -> Any:
    """A twin of the model with a memory that nothing leaves; none where memories are always full
    (those of the model would not be that for it), or where its parameters would differ in shape."""
    if impl.declared.start == "zeros":
        return None
    longer = case.settings._replace(mem_len=1000)
    return impl.twin(model, fit(impl.declared, longer, case.schedule).settings)


def joined(
    impl: Implementation,
    model: Any,
    settings: Settings,
    long: Any,
    segment: Tensor,
    state: Any,
    step: Step,
) -> list[Tensor]:
    """For each layer what memory holds once the layer's input has joined it in this step: read from
    `long`, a twin with a memory that nothing leaves, or, where there can be no twin or its lengths
    change what attention does (a window as long as memory), from what is newest in memory after the
    step."""
    before = [layer.mem for layer in impl.read(state)]
    T = segment.size(1)
    if long is not None:
        longer = impl.step(long, segment, state)
    if long is None or not same(longer.logits, step.logits, impl.tolerance):
        inputs = inputs_from_memory(impl, model, settings, segment, state, step.state)
        return [torch.cat(parts, dim=1) for parts in zip(before, inputs, strict=True)]
    held = [layer.mem for layer in impl.read(longer.state)]
    for i, (old, new) in enumerate(zip(before, held, strict=True)):
        what = f"slots of layer {i}'s memory, {old.size(1)} and {T} more, if nothing leaves it"
        holds(new.size(1) == old.size(1) + T, what, old.size(1) + T, new.size(1))
    return held


def inputs_from_memory(
    impl: Implementation,
    model: Any,
    settings: Settings,
    segment: Tensor,
    state: Any,
    after: Any,
) -> list[Tensor]:
    """For each layer its inputs in a step. Those of the last tokens are the newest slots after it;
    those of earlier ones are so after a shorter step, since no token moves what was before it."""
    before = [layer.mem.size(1) for layer in impl.read(state)]
    missing = segment.size(1)
    inputs: list[list[Tensor]] = [[] for _ in before]
    while missing > 0:
        if missing < segment.size(1):
            if impl.declared.segments != "any":
                not_claimed("memory keeps less than a step's inputs, and no step may be shorter")
            after = impl.step(model, segment[:, :missing], state).state
        kept = missing
        for i, (old, layer) in enumerate(zip(before, impl.read(after), strict=True)):
            expected, _, _ = after_step(impl.declared, settings, old, 0, missing)
            held = layer.mem.size(1)
            what = f"slots of memory in layer {i} after a step of {missing}, of {old} before it"
            holds(held >= expected, what, expected, held)
            kept = min(kept, held)
        if kept == 0:
            not_claimed("memory keeps nothing of a step's inputs")
        for i, layer in enumerate(impl.read(after)):
            inputs[i].insert(0, newest(layer.mem, kept))
        missing -= kept
    return [torch.cat(parts, dim=1) for parts in inputs]


def newest(x: Tensor, n: int) -> Tensor:
    """The last n slots, or all of them if there are fewer."""
    return x[:, max(0, x.size(1) - n) :]


def evicted(
    declared: Declaration, settings: Settings, held: int
) -> tuple[list[list[int | None]], int]:
    """Of the memories that a layer holds after its input joined (numbered from the oldest) those
    that become a slot each, None for padding, and how many leave (SPEC: one step)."""
    overflow = max(0, held - settings.mem_len)
    if settings.c_mem_len == 0:
        return [], overflow
    c = settings.compression_rate
    leave = overflow
    old: list[int | None] = list(range(overflow))
    if declared.overflow == "pad":
        padding = round_up(overflow, c) - overflow
        old = [None] * padding + old
    elif declared.overflow == "drop":
        old = old[: overflow - overflow % c]
    elif declared.overflow == "keep":
        leave = overflow - overflow % c
        old = old[:leave]
    else:
        leave = round_up(overflow, c)
        old = list(range(leave))
    return [old[i : i + c] for i in range(0, len(old), c)], leave


def block_of(held: Tensor, blocks: list[list[int | None]]) -> Tensor:
    """The evicted block `[B, c*n, D]` of what memory holds, padding included."""
    padded = torch.cat([held, torch.zeros_like(held[:, :1])], dim=1)
    chosen = []
    for block in blocks:
        for j in block:
            chosen.append(-1 if j is None else j)  # -1: the zeros behind the newest
    return padded[:, chosen]


class Carried(NamedTuple):
    """Which tokens of the stream reach what after a step: each of its positions, and in every layer
    each slot of memory and of compressed memory."""

    positions: list[set[int]]
    mem: list[list[set[int]]]
    c_mem: list[list[set[int]]]


def simulate(declared: Declaration, case: Case) -> list[Carried]:
    """Follow a stream with sets of tokens in the place of vectors, step by step."""
    settings, schedule = case
    layers = range(settings.n_layers)
    mem: list[list[set[int]]] = [[] for _ in layers]
    c_mem: list[list[set[int]]] = [[] for _ in layers]
    if declared.start == "zeros":
        mem = [[set()] * settings.mem_len for _ in layers]
        c_mem = [[set()] * settings.c_mem_len for _ in layers]
    steps = []
    fed = 0
    for T in schedule:
        h = [{token} for token in range(fed, fed + T)]
        fed += T
        for i in layers:
            x = h
            seen = union(c_mem[i] + mem[i])
            h = [seen | union(x[: t + 1]) for t in range(T)]
            held = mem[i] + x
            blocks, leave = evicted(declared, settings, len(held))
            mem[i] = held[leave:]
            slots = c_mem[i].copy()
            for block in blocks:
                slots.append(union([held[j] for j in block if j is not None]))
            forgotten = max(0, len(slots) - settings.c_mem_len)
            c_mem[i] = slots[forgotten:]
        steps.append(Carried(h, mem.copy(), c_mem.copy()))
    return steps


def union(sets: list[set[int]]) -> set[int]:
    return set().union(*sets)
