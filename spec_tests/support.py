"""What the tests of the rules are written with: examples to draw, comparisons that explain, and
the bookkeeping of which token is where."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from .adapter import COMPRESSIONS, LOSSES, Declaration, Settings
from .implementation import Implementation, Slots, not_claimed

PARAMETRIC = ("conv", "dilated_conv")  # the compression functions that a loss trains
STRIDED = ("conv", "mean_pool", "max_pool")  # slot k is a function of block k alone
WHOLE = ("conv", "mean_pool")  # and of all of it

# ------------------------------------------------------------------------------------- examples


class TorchRandom:
    """torch's random numbers as Hypothesis wants them, to seed them before every example."""

    shift = 0  # --spec-seed
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)

    def seed(self, seed: int) -> None:
        # torch.manual_seed would also look for devices, which takes longer than many an example.
        torch.default_generator.manual_seed(seed + self.shift)


torch_random = TorchRandom()
hypothesis.register_random(torch_random)


class Case(NamedTuple):
    """A model's settings and the lengths of the segments that it is fed."""

    settings: Settings
    schedule: list[int]


def allowed(fixed: Mapping, name: str, offered: Sequence, supported: Sequence) -> st.SearchStrategy:
    """Those of the choices that an implementation supports; none: the check is not claimed."""
    if name in fixed:
        offered = fixed[name] if isinstance(fixed[name], tuple) else (fixed[name],)
    choices = [choice for choice in offered if choice in supported]
    return st.sampled_from(choices) if choices else not_claimed(f"{name} is not {offered[0]!r}")


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
    are long enough to read a step's inputs from them if `readable` (see `joined`)."""

    def strategy(impl: Implementation) -> st.SearchStrategy[Case]:
        declared = impl.declared
        compression = allowed(fixed, "compression", COMPRESSIONS, declared.compressions)
        loss = allowed(fixed, "compression_loss", LOSSES, declared.compression_losses)
        norms = tuple(norm == "pre" for norm in declared.norms)
        norm_first = allowed(fixed, "norm_first", (True, False), norms)
        lowest = 0 if zeros else 1
        own_way = declared.overflow in ("pad", "drop")
        multiples = divisible or (own_way and not rest)
        if fixed.get("mem_len") == 0 and declared.mem_len != "any":
            not_claimed("mem_len is at least 1")
        if fixed.get("c_mem_len") == 0 and declared.c_mem_len == "one":
            not_claimed("c_mem_len is at least 1")

        @st.composite
        def draw_case(draw: st.DrawFn) -> Case:
            rate = draw(st.integers(3 if own_way and rest else 1, 4))
            heads = draw(st.sampled_from([1, 2, 3]))
            drawn = Settings(
                d_model=heads * draw(st.sampled_from([4, 6])),  # of 2 a norm would leave the sign
                n_heads=heads,
                n_layers=draw(st.integers(1, 3)),
                d_ff=draw(st.sampled_from([10, 14])),  # so many ReLUs are not all dead
                mem_len=draw(st.integers(lowest, 7)),
                c_mem_len=draw(st.integers(lowest, 4)),
                compression_rate=rate,
                compression=draw(compression),
                compression_loss=draw(loss),
                norm_first=draw(norm_first),
            )
            drawn = drawn._replace(**{k: v for k, v in fixed.items() if not isinstance(v, tuple)})
            lengths = st.integers(shortest, longest)
            if own_way and rest:
                lengths = lengths.filter(lambda T: T % rate)
            if declared.segments == "full":
                schedule = [draw(lengths)] * draw(st.integers(*steps))
            else:
                schedule = draw(st.lists(lengths, min_size=steps[0], max_size=steps[1]))
            if readable and declared.start == "zeros":
                drawn = drawn._replace(mem_len=max(*schedule, drawn.mem_len))
            return fit(declared, drawn, schedule, multiples)

        return draw_case()

    return strategy


def fit(
    declared: Declaration, settings: Settings, schedule: list[int], divisible: bool = False
) -> Case:
    """The nearest settings and schedule that the implementation supports."""
    c = settings.compression_rate
    if divisible or declared.overflow == "divisible":
        schedule = [c * -(-T // c) for T in schedule]
        settings = settings._replace(mem_len=c * -(-settings.mem_len // c))
    least = max(schedule) if declared.mem_len == "segment" else int(declared.mem_len == "one")
    if settings.c_mem_len > 0 and declared.overflow == "round_up":
        least = max(least, c - 1)
    settings = settings._replace(mem_len=max(settings.mem_len, least), segment=max(schedule))
    if declared.c_mem_len == "one":
        settings = settings._replace(c_mem_len=max(settings.c_mem_len, 1))
    if declared.c_mem_len == "block" and settings.c_mem_len < settings.mem_len // c:
        if settings.c_mem_len == 0:
            settings = settings._replace(compression_rate=settings.mem_len + 1)
        else:
            settings = settings._replace(c_mem_len=settings.mem_len // c)
    return Case(settings, schedule)


def check(**strategies: Any) -> Callable:
    """Make a function of an implementation and drawn values a test: Hypothesis's `given`, with
    strategies that may depend on the implementation (`cases`), under the profile loaded when it is
    called; the values of a failing example go with its exception, for the report."""

    def decorate(body: Callable) -> Callable:
        def test(impl: Implementation) -> None:
            def example(**drawn: Any) -> None:
                try:
                    body(impl, **drawn)
                except Exception as error:
                    error.drawn = drawn
                    raise

            made = {name: s(impl) if callable(s) else s for name, s in strategies.items()}
            hypothesis.seed(torch_random.shift)(hypothesis.given(**made)(example))()

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body
        return test

    return decorate


# ---------------------------------------------------------------------------------- comparisons


class Broken(AssertionError):
    """A rule does not hold: what was looked at, what was expected, what came, and the cause if what
    came shows it."""

    def __init__(self, what: str, expected: str, got: str, cause: str | None = None) -> None:
        super().__init__(f"{what}: expected {expected}, got {got}" + (f" ({cause})" * bool(cause)))
        self.what, self.expected, self.got, self.cause = what, expected, got, cause


def holds(ok: object, what: str, expected: object, got: object, cause: str | None = None) -> None:
    """Raise Broken unless `ok`."""
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
    holds(got.shape == expected.shape, f"{what}, its shape", list(expected.shape), list(got.shape))
    if same(got, expected, tolerance):
        return
    cause = next((c for c, x in (causes or {}).items() if same(got, x, max(tolerance, 1e-9))), None)
    differs = (got - expected).abs().nan_to_num(math.inf) > bound(expected, tolerance)
    place = tuple(differs.nonzero()[0].tolist())
    first = f", first at {list(place)}" if place else ""
    many = f"; {int(differs.sum())} of {got.numel()} entries differ{first}" if place else ""
    wanted, came = expected[place].item(), got[place].item()
    digits = 9 if f"{wanted:.9g}" != f"{came:.9g}" else 17
    raise Broken(what, f"{wanted:.{digits}g}", f"{came:.{digits}g}{many}", cause)


def bound(expected: Tensor, tolerance: float) -> float:
    return tolerance * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0


def same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if got.shape != expected.shape:
        return False
    return bool(((got - expected).abs() <= bound(expected, tolerance)).all())


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


def filled(impl: Implementation, model: Any, settings: Settings, T: int, batch: int = 2) -> Any:
    """A state after steps of T tokens, the same in every row, that has full memories and from
    which the next such step compresses."""
    reach = settings.mem_len + settings.compression_rate * (settings.c_mem_len + 1)
    state, fed = impl.start(model, batch), 0
    with torch.no_grad():
        while True:
            held = impl.read(state)[0].mem.size(1) + T
            if fed >= reach and evicted(impl.declared, settings, held)[1] > 0:
                return state
            state = impl.step(model, tokens(settings, 1, T).expand(batch, T), state).state
            fed += T


def in_some_draw(expected: Tensor, differs: Callable[[], Tensor]) -> Tensor:
    """What differs in any of up to three draws of the parameters: where there is an influence, it
    may be lost in the rounding of one draw (attention of 1e-20); where there is none, none shows
    in any."""
    found = torch.zeros_like(expected)
    for _ in range(3):
        found |= differs()
        if (found | ~expected).all():
            break
    return found


def longer_memory(impl: Implementation, model: Any, case: Case) -> Any:
    """A twin of the model with a memory that nothing leaves; none where memories are always full,
    which those of the model would not be for it."""
    if impl.declared.start == "zeros":
        return None
    longer = case.settings._replace(mem_len=1000)
    return impl.twin(model, fit(impl.declared, longer, case.schedule).settings)


def joined(
    impl: Implementation, long: Any, segment: Tensor, state: Any, after: Any = None
) -> list[Tensor] | None:
    """For each layer what memory holds once the layer's input has joined it: read from `long`, a
    twin with a memory that nothing leaves (what a layer does in a step does not depend on mem_len),
    or, where there can be no twin, from the newest slots of the state after the step."""
    if long is not None:
        return [slots.mem for slots in impl.read(impl.step(long, segment, state).state)]
    held = []
    for old, new in zip(impl.read(state), impl.read(after), strict=True):
        T = segment.size(1)
        if new.mem.size(1) < T:
            not_claimed("its inputs cannot be read from its memory")
        held.append(torch.cat([old.mem, new.mem[:, new.mem.size(1) - T :]], dim=1))
    return held


def evicted(declared: Declaration, settings: Settings, held: int) -> tuple[list, int]:
    """Of the memories that a layer holds after its input joined (numbered from the oldest) those
    that become a slot each, None for padding, and how many leave (SPEC: one step)."""
    overflow, c = max(0, held - settings.mem_len), settings.compression_rate
    if settings.c_mem_len == 0:
        return [], overflow
    old: list[int | None] = list(range(overflow))
    if declared.overflow == "pad":
        old = [None] * (-overflow % c) + old
    elif declared.overflow == "drop":
        old = old[: overflow - overflow % c]
    else:
        old = list(range(overflow + -overflow % c))
    leave = max(overflow, len(old)) if declared.overflow != "pad" else overflow
    return [old[i : i + c] for i in range(0, len(old), c)], leave


def block_of(held: Tensor, blocks: list[list[int | None]]) -> Tensor:
    """The evicted block `[B, c*n, D]` of what memory holds, padding included."""
    padded = torch.cat([held, torch.zeros_like(held[:, :1])], dim=1)
    return padded[:, [-1 if j is None else j for block in blocks for j in block]]


class Carried(NamedTuple):
    """Which tokens of the stream reach what after a step: each of its positions, and in every layer
    each slot of memory and of compressed memory."""

    positions: list[set[int]]
    mem: list[list[set[int]]]
    c_mem: list[list[set[int]]]


def simulate(declared: Declaration, case: Case) -> list[Carried]:
    """Follow a stream with sets of tokens in the place of vectors, step by step."""
    settings, schedule = case
    zeros = declared.start == "zeros"
    mem = [[set() for _ in range(settings.mem_len * zeros)] for _ in range(settings.n_layers)]
    c_mem = [[set() for _ in range(settings.c_mem_len * zeros)] for _ in range(settings.n_layers)]
    steps, fed = [], 0
    for T in schedule:
        h = [{fed + t} for t in range(T)]
        fed += T
        for i in range(settings.n_layers):
            x, seen = h, set().union(*c_mem[i], *mem[i])
            h = [seen.union(*x[: t + 1]) for t in range(T)]
            held = mem[i] + x
            blocks, leave = evicted(declared, settings, len(held))
            new = [set().union(*(held[j] for j in block if j is not None)) for block in blocks]
            mem[i] = held[leave:]
            c_mem[i] = (c_mem[i] + new)[max(0, len(c_mem[i]) + len(new) - settings.c_mem_len) :]
        steps.append(Carried(h, mem.copy(), c_mem.copy()))
    return steps
