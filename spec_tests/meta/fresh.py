"""The suite run as its users do, in a folder of theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..processes import FORKS, process_context


def run_pytest(folder: Path, arguments: list[str], fork: bool = FORKS) -> tuple[int, str, str]:
    """`python -m pytest` in the folder: its exit status, and what it printed."""
    if not fork:
        command = [sys.executable, "-m", "pytest", *arguments]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return ran.returncode, ran.stdout, ran.stderr
    out = folder / "out.txt"
    err = folder / "err.txt"
    for file in (out, err):
        file.write_text("")
    process = process_context().Process(target=pytest_main, args=(folder, arguments))
    process.start()
    process.join()
    return process.exitcode, out.read_text(), err.read_text()


def pytest_main(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.stdout = open("out.txt", "w")
    sys.stderr = open("err.txt", "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    project = os.path.realpath(Path(__file__).parents[2])
    others = [place for place in sys.path if os.path.realpath(place) != project]
    sys.path = [os.getcwd(), *others]
    for name in list(sys.modules):
        if name.split(".")[0] == "spec_tests":  # this file, that is
            del sys.modules[name]
    sys.exit(pytest.main(arguments))
