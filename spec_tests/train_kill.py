"""Kills training runs at random moments and checks that each, resumed, ends as if nothing had been:

    python -m spec_tests.train_kill --times 50

Every process is forked from this one, which has torch loaded, and ended by SIGKILL. It trains a
tiny model and writes a checkpoint after every step. Every second kill waits for the next write.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import train

torch = train.torch  # imported there, without its warning about NumPy
importlib.import_module("torch._dynamo")  # optimisers load it at their first step

OPTIONS = "--steps 24 --save-every 1 --batch-size 4 --segment 8 --dropout 0.1 "
OPTIONS += "--d-model 64 --n-heads 2 --n-layers 2 --d-ff 512 --mem-len 16 --c-mem-len 8 "
OPTIONS += "--compression-rate 2 --sample-bytes 4 --device cpu --dtype float32"
DTYPE = torch.float32  # torch's default in a new process


def train_as_new(options: Sequence[object]) -> None:
    importlib.reload(train)  # which looks at the environment
    train.main([str(option) for option in options])


def start(folder: Path, *options: object, main: Callable = train_as_new) -> int:
    """A process that trains in the folder; what it prints goes to output.txt there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        signal.alarm(300)  # none takes so long, unless it hangs
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = file = open("output.txt", "w", buffering=1)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            torch.set_default_dtype(DTYPE)
            main(options)
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            os._exit(status)
    return pid


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait(pid: int, folder: Path) -> tuple[int, str]:
    """The exit status of the process, and what it printed."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, (folder / "output.txt").read_text()


def finish(pid: int, folder: Path) -> str:
    """What the process printed, once it has ended well."""
    status, printed = wait(pid, folder)
    if status:
        sys.exit(f"a run ended with status {status}: {printed}")
    return printed


def result(run: Path) -> tuple[dict, list[dict]]:
    """The checkpoint and the metrics of a run."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state, records


def same(a: object, b: object) -> bool:
    """Equal to the bit, tensors and what holds them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    steps = set()
    writing = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_bytes(bytes(draw.choices(b"abcdefgh \n", k=5000)))
        new = ["--data", "text", *OPTIONS.split(), "--out"]
        began = time.monotonic()
        finish(start(folder, *new, "whole"), folder)
        length = time.monotonic() - began
        expected = result(folder / "whole")
        for i in range(args.times):
            run = folder / f"run{i}"
            pid = start(folder, *new, run.name)
            time.sleep(draw.uniform(0, length))
            while i % 2 and running(pid) and not any(run.glob(".*.part")):
                pass
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            begun = (run / "checkpoint.pt").exists()
            if begun:  # the checkpoint is whole, whenever the process was killed
                steps.add(torch.load(run / "checkpoint.pt", weights_only=True)["step"])
            writing += any(run.glob(".*.part"))
            again = ["--resume", run.name]
            if not begun:
                run = folder / f"again{i}"
                again = [*new, run.name]
            finish(start(folder, *again), folder)
            if not same(result(run), expected):
                sys.exit(f"kill {i} (--seed {args.seed}): the resumed run ended otherwise")
            if any(run.glob(".*.part")):
                sys.exit(f"kill {i} (--seed {args.seed}): half a file was left behind")
    print(
        f"{args.times} kills, {writing} of them while a file was written, after {len(steps)} "
        "different steps: every run ended bitwise as one that was left alone"
    )


if __name__ == "__main__":
    main()
