# SPDX-License-Identifier: MIT
"""This project beside the two implementations on PyPI, in one run:

    python benchmarks/compare.py                          every table of benchmarks/README.md
    python benchmarks/compare.py --tables training --settings seed small --rounds 3
    python benchmarks/compare.py --device cuda --compile

The packages are those that `spec_tests/adapters/` names; one that is missing is left out. In every
round each implementation has its turn, so that what else the machine does hits them alike; shown
are medians over the rounds, and in brackets the smallest and the largest.

A training step is forward, compression, both losses, backward, clipping and AdamW (fused), on
memories that are full and overflow. All get the same optimiser and the same width of feed-forward;
in bfloat16, matrix products under autocast. Generation is of one row, a token at a time, greedy, in
the way that each implementation brings along (lucidrains' feeds the segment so far again with every
token: timed are segments filled to 1/8, 3/8, 5/8 and 7/8). The limit is the rate at which the
step's floating-point operations would be done as products of the feed-forward's shape.
"""

import argparse
import importlib
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", "Failed to initialize NumPy")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from spec_tests.adapter import Settings  # noqa: E402
from spec_tests.implementation import Implementation, Slots, Unusable, load  # noqa: E402

NAMES = ("vocab_size", "d_model", "n_heads", "d_ff", "n_layers", "segment", "mem_len", "c_mem_len")
SETTINGS = {
    "seed": (65, 128, 4, 256, 6, 8, 8, 128, 2, 32),
    "small": (256, 256, 4, 1024, 4, 128, 128, 64, 4, 8),
    "medium": (256, 512, 8, 2048, 8, 512, 512, 128, 4, 4),
    "long": (256, 256, 4, 1024, 4, 256, 1024, 1024, 4, 4),
    "enwik8": (256, 1024, 8, 3072, 8, 768, 768, 1152, 3, 8),  # the paper's width; for CUDA
}
PEERS = ("labml", "lucidrains")
LENGTHS = (256, 1024, 4096, 16384)  # mem_len + c_mem_len


def settings_of(name: str) -> tuple[Settings, int]:
    """The settings of that name, and the batch size."""
    *values, rate, batch = SETTINGS[name]
    return Settings(compression_rate=rate, **dict(zip(NAMES, values, strict=True))), batch


class Subject:
    """One implementation in one dtype, with full memories, ready to train and to generate."""

    def __init__(
        self, name: str, settings: Settings, batch: int, device: str, dtype: str, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.impl: Implementation = load(f"spec_tests.adapters.{name}")
        self.name, self.settings, self.batch, self.device = name, settings, batch, device
        model: nn.Module = self.impl.adapter.build(settings)
        if name == "lucidrains":  # it has no option for the width
            module = importlib.import_module(type(model).__module__)
            for layer in model.ff_layers:
                mult = settings.d_ff // settings.d_model
                layer.fn.fn = module.FeedForward(settings.d_model, mult=mult)
        self.model = model.to(device).train()
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.state = self.full(batch)
        if compiled:
            self.model.compile()

    def full(self, batch: int) -> Any:
        """A state with full memories."""
        lengths, D = (self.settings.mem_len, self.settings.c_mem_len), self.settings.d_model
        slots = [
            Slots(*(torch.randn(batch, length, D, device=self.device) for length in lengths))
            for _ in range(self.settings.n_layers)
        ]
        return self.impl.replace(self.impl.start(self.model, batch), slots)

    def tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.settings.vocab_size, (batch, length), device=self.device)

    def train(self) -> None:
        """One training step."""
        tokens = self.tokens(self.batch, self.settings.segment + 1)
        with self.autocast:
            logits, self.state, loss = self.impl.step(self.model, tokens[:, :-1], self.state)
        total = F.cross_entropy(logits.float().mT, tokens[:, 1:]) + loss
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def seconds_per_token(self, count: int) -> float:
        """Of generating so many tokens."""
        self.model.eval()
        state, token = self.full(1), self.tokens(1, 1)
        with self.autocast:
            if self.name == "reference":
                return self.clock(
                    lambda: self.model.generate(token, count, temperature=0, memory=state), count
                )
            if self.name == "labml":
                return self.clock(lambda: self.one_by_one(token, state, count), count)
            segment = self.settings.segment
            fed = [self.tokens(1, segment * eighth // 8) for eighth in (1, 3, 5, 7)]
            repeats = -(-count // len(fed))
            return self.clock(
                lambda: [self.model(x, state)[0].argmax() for x in fed * repeats],
                repeats * len(fed),
            )

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


def shown(seconds: list[float], work: int) -> str:
    """The median rate and its spread."""
    rates = sorted(work / s for s in seconds)
    return f"{statistics.median(rates):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f})"


def ratio(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast: the median over rounds, each a pair, and its spread."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def alternate(
    subjects: dict[str, Subject], rounds: int, measure: Callable[[Subject], float]
) -> dict[str, list[float]]:
    """What each gives in each round."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            found[name].append(measure(subject))
    return found


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*("---" for _ in cells))


def matrix_rate(settings: Settings, rows: int, device: str, dtype: str) -> float:
    """Floating-point operations a second that products of the feed-forward's shape reach."""
    kind = getattr(torch, dtype)
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


def training(args: argparse.Namespace, names: list[str]) -> None:
    print("\nTraining, tokens/s:")
    header("settings", "dtype", *names, *(f"x {p}" for p in names[1:]), "limit", "share of it")
    for setting in args.settings:
        settings, batch = settings_of(setting)
        for dtype in ("float32", "bfloat16"):
            subjects = {
                n: Subject(n, settings, batch, args.device, dtype, args.compile) for n in names
            }
            work = batch * settings.segment
            counts = {}
            for name, subject in subjects.items():
                for _ in range(3):
                    subject.train()
                counts[name] = max(2, int(args.seconds / subject.clock(subject.train, 1)))

            def turn(subject: Subject, counts: dict = counts) -> float:
                count = counts[subject.name]
                return subject.clock(lambda: [subject.train() for _ in range(count)], count)

            found = alternate(subjects, args.rounds, turn)
            with FlopCounterMode(display=False) as counter:
                subjects["reference"].train()
            limit = work * matrix_rate(settings, work, args.device, dtype)
            limit /= counter.get_total_flops()
            share = work / statistics.median(found["reference"]) / limit
            row(
                setting,
                dtype,
                *(shown(found[name], work) for name in names),
                *(ratio(found["reference"], found[peer]) for peer in names[1:]),
                f"{limit:,.0f}",
                f"{share:.0%}",
            )


def generation(args: argparse.Namespace, names: list[str]) -> None:
    print("\nGeneration of one row, tokens/s:")
    header("settings", "dtype", *names, *(f"x {peer}" for peer in names[1:]))
    for setting in args.settings:
        settings, _ = settings_of(setting)
        for dtype in ("float32", "bfloat16"):
            subjects = {n: Subject(n, settings, 1, args.device, dtype, False) for n in names}
            alternate(subjects, 1, lambda subject: subject.seconds_per_token(4))
            found = alternate(
                subjects, args.rounds, lambda subject: subject.seconds_per_token(args.tokens)
            )
            row(
                setting,
                dtype,
                *(shown(found[name], 1) for name in names),
                *(ratio(found["reference"], found[peer]) for peer in names[1:]),
            )


def peak(name: str, device: str, dtype: str, settings: Settings, batch: int) -> float:
    """MiB that a few training steps take at the most, of a process of their own: above what
    importing takes (CPU), or allocated (CUDA)."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import compare; "
        f"compare.report_peak({name!r}, {device!r}, {dtype!r}, {tuple(settings)!r}, {batch})"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
    )
    return float(ran.stdout.split()[-1])


def report_peak(name: str, device: str, dtype: str, settings: tuple, batch: int) -> None:
    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    load(f"spec_tests.adapters.{name}")
    before = resident()
    subject = Subject(name, Settings(*settings), batch, device, dtype, False)
    for _ in range(3):
        subject.train()
    cuda = device == "cuda"
    print(torch.cuda.max_memory_allocated() / 2**20 if cuda else resident() - before)


def memory(args: argparse.Namespace, names: list[str]) -> None:
    print("\nPeak memory of training steps, model and optimiser included, MiB:")
    header("settings", "dtype", *names, "share of the smaller peer")
    for setting in args.settings:
        settings, batch = settings_of(setting)
        for dtype in ("float32", "bfloat16"):
            found = [peak(name, args.device, dtype, settings, batch) for name in names]
            share = f"{found[0] / min(found[1:]):.2f}" if found[1:] else ""
            row(setting, dtype, *(f"{mib:,.0f}" for mib in found), share)


def length(args: argparse.Namespace, names: list[str]) -> None:
    print("\nOurs by length (small but for batch 1, three quarters of the slots in memory):")
    header("slots", "ms a step", "us a slot", "peak MiB")
    settings, _ = settings_of("small")
    for slots in LENGTHS:
        longer = settings._replace(mem_len=slots * 3 // 4, c_mem_len=slots // 4)
        subject = Subject("reference", longer, 1, args.device, "float32", False)
        subject.train()
        ms = 1000 * statistics.median(
            subject.clock(subject.train, 1) for _ in range(3 * args.rounds)
        )
        mib = peak("reference", args.device, "float32", longer, 1)
        row(slots, f"{ms:.0f}", f"{1000 * ms / slots:.0f}", f"{mib:,.0f}")


TABLES = {"training": training, "generation": generation, "memory": memory, "length": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--settings", nargs="+", choices=SETTINGS, default=["seed", "small", "medium", "long"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--compile", action="store_true", help="torch.compile the models in training")
    add("--rounds", type=int, default=5, help="turns of each implementation")
    add("--seconds", type=float, default=1.0, help="of training in a turn, about")
    add("--tokens", type=int, default=16, help="generated in a turn")
    args = parser.parse_args()
    names = ["reference"]
    for peer in PEERS:
        try:
            load(f"spec_tests.adapters.{peer}")
            names.append(peer)
        except Unusable as error:
            print(f"{peer} is left out: {error}")
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    versions = [f"{name} {load(f'spec_tests.adapters.{name}').declared.version}" for name in names]
    print(
        f"{args.device} ({card or platform.machine()}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}; {', '.join(versions)}; "
        f"{args.rounds} rounds{', compiled' if args.compile else ''}"
    )
    for table in args.tables:
        TABLES[table](args, names)


if __name__ == "__main__":
    main()
