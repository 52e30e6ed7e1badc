# SPDX-License-Identifier: MIT
"""This project beside the two implementations on PyPI, in one run:

    python benchmarks/compare.py                          every table of benchmarks/README.md
    python benchmarks/compare.py --tables training --settings seed small --rounds 3
    python benchmarks/compare.py --device cuda --compile --peers

The packages are those that `spec_tests/adapters/` names; one that is missing is left out. In every
round each implementation has its turn, so that what else the machine does hits them alike; shown
are medians over the rounds, and in brackets the smallest and the largest. Every row comes from a
process of its own, since what ran before in a process shapes what large tensors cost there.

A training step is forward, compression, both losses, backward, clipping and AdamW (fused), on
memories that are full and overflow. All get the same optimiser and the same width of feed-forward;
in bfloat16, matrix products under autocast; tf32 is float32 whose products CUDA may round to
TensorFloat-32. (Compiled is the model; what labml does outside of its,
compression and its loss, is not.) Generation is of one row, a token at a time, greedy,
with parameters and memories in the dtype, which is faster than autocast for all three, in the way
that each implementation brings along. (lucidrains' feeds the segment so far again with every token:
timed are segments filled to 1/8, 3/8, 5/8 and 7/8.) The limit is the rate at which the step's
floating-point operations would be done as products of the feed-forward's shape.
"""

import argparse
import importlib
import math
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", "Failed to initialize NumPy")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler talks of itself
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from compressive import RelativeMultiHeadAttention  # noqa: E402
from spec_tests.adapter import Settings  # noqa: E402
from spec_tests.implementation import Implementation, Slots, Unusable, load  # noqa: E402

NAMES = ("vocab_size", "d_model", "n_heads", "d_ff", "n_layers", "segment", "mem_len", "c_mem_len")
SETTINGS = {
    "tiny": (16, 8, 2, 16, 1, 8, 8, 4, 2, 2),  # to see that all of it runs
    "seed": (65, 128, 4, 256, 6, 8, 8, 128, 2, 32),
    "small": (256, 256, 4, 1024, 4, 128, 128, 64, 4, 8),
    "medium": (256, 512, 8, 2048, 8, 512, 512, 128, 4, 4),
    "long": (256, 256, 4, 1024, 4, 256, 1024, 1024, 4, 4),
    "enwik8": (256, 1024, 8, 3072, 8, 768, 768, 1152, 3, 8),  # the paper's width; for CUDA
    # NVIDIA's Transformer-XL base, the rows of one device, but for its large vocabulary. No peer
    # has a memory without a compressed one.
    "transformer-xl": (256, 512, 8, 2048, 16, 192, 192, 0, 1, 32),
}
PEERS = ("labml", "lucidrains")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (256, 1024, 4096, 16384)  # mem_len + c_mem_len


def settings_of(name: str) -> tuple[Settings, int]:
    """The settings of that name, and the batch size."""
    *values, rate, batch = SETTINGS[name]
    named = dict(zip(NAMES, values, strict=True))
    return Settings(compression_rate=rate, **named), batch


class Subject:
    """One implementation in one dtype, with full memories, ready to train and to generate."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        batch: int,
        device: str,
        dtype: str,
        *,
        train: bool = True,
        compiled: bool = False,
        recompute: bool = False,
    ) -> None:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        adapter = "reference" if name == "plain" else name
        self.impl: Implementation = load(f"spec_tests.adapters.{adapter}", torch.device(device))
        self.name = name
        self.settings = settings
        self.batch = batch
        self.device = device
        model: nn.Module = self.impl.adapter.build(settings)
        if name in ("reference", "plain"):
            model.config = replace(model.config, recompute=recompute)
        if name == "plain":
            for layer in model.layers:
                layer.attention.__class__ = RelativeMultiHeadAttention
        if name == "lucidrains":  # it has no option for the width
            module = importlib.import_module(type(model).__module__)
            for layer in model.ff_layers:
                mult = settings.d_ff // settings.d_model
                layer.fn.fn = module.FeedForward(settings.d_model, mult=mult)
        self.dtype = torch.float32 if train else DTYPES[dtype]
        self.model = model.to(device, self.dtype).train(train)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.state = self.full(batch)
        if compiled:
            self.model.compile()

    def full(self, batch: int) -> Any:
        """A state with full memories."""
        settings = self.settings

        def random(length: int) -> Tensor:
            shape = (batch, length, settings.d_model)
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        slots = []
        for _ in range(settings.n_layers):
            slots.append(Slots(random(settings.mem_len), random(settings.c_mem_len)))
        return self.impl.replace(self.impl.start(self.model, batch), slots)

    def tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.settings.vocab_size, (batch, length), device=self.device)

    def train(self) -> None:
        """One training step."""
        tokens = self.tokens(self.batch, self.settings.segment + 1)
        given = self.impl.swap(tokens[:, :-1])
        with self.autocast:
            # Not impl.step, which brings to the CPU what comes back.
            logits, self.state, loss = self.impl.adapter.step(self.model, given, self.state)
        logits = self.impl.swap(logits)
        total = F.cross_entropy(logits.float().mT, tokens[:, 1:]) + loss
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds_per_step(self, count: int) -> float:
        """Of so many training steps."""

        def run() -> None:
            for _ in range(count):
                self.train()

        return self.clock(run, count)

    @torch.no_grad()
    def seconds_per_token(self, count: int) -> float:
        """Of generating so many tokens."""
        state = self.full(1)
        token = self.tokens(1, 1)
        if self.name in ("reference", "plain"):
            generate = partial(self.model.generate, token, count, temperature=0, memory=state)
            return self.clock(generate, count)
        if self.name == "labml":
            return self.clock(partial(self.one_by_one, token, state, count), count)
        fed = []
        for eighth in (1, 3, 5, 7):
            fed.append(self.tokens(1, self.settings.segment * eighth // 8))
        repeats = math.ceil(count / len(fed))

        def run() -> None:
            for segment in fed * repeats:
                logits, *_ = self.model(segment, state)
                logits.argmax()

        return self.clock(run, repeats * len(fed))

    def one_by_one(self, token: Tensor, state: Any, count: int) -> None:
        """As labml's sampler does it, without the loss."""
        merge = importlib.import_module("labml_nn.transformers.compressive.experiment").Configs
        for _ in range(count):
            logits, inputs = self.model(token, state)
            state, _ = merge.merge_compress_memory(self.model.rule, state, inputs)
            token = logits[-1:].argmax(dim=-1)

    def clock(self, run: Callable[[], object], count: int) -> float:
        start = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count


# ---------------------------------------------------------------------------------------- tables


def spread(values: list[float], form: str) -> str:
    """The median, and in brackets the smallest and the largest."""
    median = format(statistics.median(values), form)
    return f"{median} ({min(values):{form}}-{max(values):{form}})"


def shown(seconds: list[float], work: int) -> str:
    """The rate and its spread."""
    return spread([work / s for s in seconds], ",.0f")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast, over rounds, each a pair, and its spread."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)], ".2f")


def alternate(
    args: argparse.Namespace,
    subjects: dict[str, Subject],
    measure: Callable[[Subject, int], float],
) -> dict[str, list[float]]:
    """The seconds that each takes in each round, as `measure` gives them for a count of steps or
    tokens; in a turn there are as many as args.seconds allow."""
    counts: dict[str, int] = {}
    found: dict[str, list[float]] = {}
    for name, subject in subjects.items():
        measure(subject, 3)
        counts[name] = max(2, int(args.seconds / measure(subject, 1)))
        found[name] = []
    for _ in range(args.rounds):
        for name, subject in subjects.items():
            found[name].append(measure(subject, counts[name]))
    return found


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*("---" for _ in cells))


def matrix_rate(settings: Settings, rows: int, device: str, dtype: str) -> float:
    """Floating-point operations a second that products of the feed-forward's shape reach."""
    kind = DTYPES[dtype]
    a = torch.randn(rows, settings.d_model, device=device, dtype=kind)
    b = torch.randn(settings.d_model, settings.d_ff, device=device, dtype=kind)
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * rows * settings.d_model * settings.d_ff / best


def training(args: argparse.Namespace, names: list[str], setting: str, dtype: str) -> list:
    settings, batch = settings_of(setting)
    subjects = {}
    for name in names:
        subjects[name] = Subject(
            name,
            settings,
            batch,
            args.device,
            dtype,
            compiled=args.compile,
            recompute=args.recompute,
        )
    found = alternate(args, subjects, Subject.seconds_per_step)
    work = batch * settings.segment
    with FlopCounterMode(display=False) as counter:
        subjects["reference"].train()
    fastest = matrix_rate(settings, work, args.device, dtype)
    limit = work * fastest / counter.get_total_flops()
    rate = work / statistics.median(found["reference"])
    return [*rates_and_ratios(found, work), f"{limit:,.0f}", f"{rate / limit:.0%}"]


def generation(args: argparse.Namespace, names: list[str], setting: str, dtype: str) -> list:
    settings, _ = settings_of(setting)
    subjects = {}
    for name in names:
        subjects[name] = Subject(name, settings, 1, args.device, dtype, train=False)
    found = alternate(args, subjects, Subject.seconds_per_token)
    return rates_and_ratios(found, 1)


def rates_and_ratios(found: dict[str, list[float]], work: int) -> list[str]:
    rates = [shown(seconds, work) for seconds in found.values()]
    ours, *peers = found.values()
    ratios = [ratio(ours, theirs) for theirs in peers]
    return rates + ratios


def peak(name: str, args: argparse.Namespace, dtype: str, settings: Settings, batch: int) -> float:
    """MiB that a few training steps take at the most: above what importing takes (CPU; only the
    first call in a process is right), or allocated (CUDA)."""

    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    load("spec_tests.adapters.reference" if name == "plain" else f"spec_tests.adapters.{name}")
    before = resident()
    subject = Subject(name, settings, batch, args.device, dtype, recompute=args.recompute)
    for _ in range(3):
        subject.train()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident() - before


def memory(args: argparse.Namespace, names: list[str], setting: str, dtype: str) -> list:
    settings, batch = settings_of(setting)
    found = [afresh(peak, name, args, dtype, settings, batch) for name in names]
    peers = [mib for name, mib in zip(names, found, strict=True) if name in PEERS]
    share = f"{found[0] / min(peers):.2f}" if peers else ""
    return [*(f"{mib:,.0f}" for mib in found), share]


def length(args: argparse.Namespace, slots: int) -> list:
    settings, _ = settings_of("small")
    longer = settings._replace(mem_len=slots * 3 // 4, c_mem_len=slots // 4)
    mib = afresh(peak, "reference", args, "float32", longer, 1)
    subject = Subject("reference", longer, 1, args.device, "float32", recompute=args.recompute)
    subject.train()
    times = [subject.seconds_per_step(1) for _ in range(3 * args.rounds)]
    ms = 1000 * statistics.median(times)
    return [f"{ms:.0f}", f"{1000 * ms / slots:.0f}", f"{mib:,.0f}"]


def profile(args: argparse.Namespace, names: list[str], setting: str, dtype: str) -> list[str]:
    """The operations that a training step and a generated token spend most of their time in."""
    settings, batch = settings_of(setting)
    how = (names[0], settings, batch, args.device, dtype)
    subject = Subject(*how)
    in_training = most_of_the_time(subject.train, args.device)
    subject = Subject(*how, train=False)
    in_generation = most_of_the_time(partial(subject.seconds_per_token, 16), args.device)
    return [in_training, in_generation]


def most_of_the_time(run: Callable[[], object], device: str) -> str:
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    run()
    with torch.profiler.profile() as profiler:
        run()
    found = {}
    for operation in profiler.key_averages():
        name = operation.key.removeprefix("aten::")
        if name != "normal_":  # makes the memories
            found[name] = getattr(operation, time_of)
    total = sum(found.values())
    most = sorted(found, key=lambda name: -found[name])[:6]
    return ", ".join(f"{name} {found[name] / total:.0%}" for name in most)


def afresh(call: Callable, *args: object) -> Any:
    """What the call returns in a new process."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # unlike Pool's, may have children
        return pool.submit(call, *args).result()


TABLES = {"training": training, "generation": generation, "memory": memory, "profile": profile}
TITLES = {
    "training": "Training, tokens/s",
    "generation": "Generation of one row, tokens/s",
    "memory": "Peak memory of training steps, model and optimiser included, MiB",
    "profile": "Where our time goes",
    "length": "Ours by length (small but for batch 1, three quarters of the slots in memory)",
}


def table(name: str, args: argparse.Namespace, names: list[str]) -> None:
    print(f"\n{TITLES[name]}:")
    if name == "length":
        header("slots", "ms a step", "us a slot", "peak MiB")
        for slots in LENGTHS:
            row(slots, *afresh(length, args, slots))
        return
    ratios = [f"x {peer}" for peer in names[1:]]
    columns = {
        "training": [*names, *ratios, "limit", "share of it"],
        "generation": [*names, *ratios],
        "memory": [*names, "share of the smallest peer"],
        "profile": ["training", "generation"],
    }
    header("settings", "dtype", *columns[name])
    for setting in args.settings:
        for dtype in args.dtypes:
            row(setting, dtype, *afresh(TABLES[name], args, names, setting, dtype))


def conditions(args: argparse.Namespace, peers: list[str]) -> str:
    """The line above the tables."""
    card = platform.processor()
    if args.device == "cuda":
        card = torch.cuda.get_device_name()
    versions = []
    for peer in peers:
        version = load(f"spec_tests.adapters.{peer}").declared.version
        versions.append(f"{peer} {version}")
    parts = [
        f"{args.device} ({card or platform.machine()}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}",
        ", ".join(versions) or "no peers",
        f"{args.rounds} rounds",
    ]
    line = "; ".join(parts)
    if args.compile:
        line += ", compiled"
    if args.recompute:
        line += ", reference recomputes"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--tables", nargs="+", choices=TITLES, default=list(TITLES))
    add("--settings", nargs="+", choices=SETTINGS, default=["seed", "small", "medium", "long"])
    add("--dtypes", nargs="+", choices=DTYPES, help="by default all that the device has")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--peers", nargs="*", choices=PEERS, default=PEERS, help="none: the reference alone")
    add("--compile", action="store_true", help="torch.compile the models in training")
    add("--recompute", action="store_true", help="train the reference with Config.recompute")
    add("--plain", action="store_true", help="beside the reference without FasterAttention, too")
    add("--rounds", type=int, default=5, help="turns of each implementation")
    add("--seconds", type=float, default=1.0, help="of a turn, about")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds must be above 0 and finite, got {args.seconds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    if args.dtypes is None:
        args.dtypes = list(DTYPES)
        if args.device == "cpu":
            args.dtypes.remove("tf32")
    if args.device == "cpu" and "tf32" in args.dtypes:
        parser.error("--dtypes tf32 needs --device cuda")
    peers = []
    for peer in args.peers:
        try:
            load(f"spec_tests.adapters.{peer}")
            peers.append(peer)
        except Unusable as error:
            print(f"{peer} is left out: {error}")
    if peers and "transformer-xl" in args.settings:
        parser.error("--settings transformer-xl has no compressed memory: give --peers, and none")
    names = ["reference", *peers]
    if args.plain:
        names.insert(1, "plain")
    print(conditions(args, peers))
    for name in args.tables:
        table(name, args, names)


if __name__ == "__main__":
    main()
