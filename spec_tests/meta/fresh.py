"""The suite as in a process of its own, in a fork of one that has torch loaded, and nothing of this
project: a new one takes seconds for that."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "hypothesis", "pytest"])


def run_pytest(folder: Path, arguments: list[str]) -> tuple[int, str, str]:
    """`python -m pytest` in the folder: its exit status, and what it printed."""
    process = server.Process(target=pytest_main, args=(folder, arguments))
    process.start()
    process.join()
    return process.exitcode, (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def pytest_main(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.stdout = open("out.txt", "w")
    sys.stderr = open("err.txt", "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    project = os.path.realpath(Path(__file__).parents[2])
    others = [place for place in sys.path if os.path.realpath(place) != project]
    sys.path = [str(folder), *others]
    for name in list(sys.modules):
        if name.split(".")[0] == "spec_tests":  # this file, that is
            del sys.modules[name]
    sys.exit(pytest.main(arguments))
