"""Tests marked `elsewhere` begin all at once, in other processes, and are waited for at the end.
Meanwhile this process runs all others, the rules first."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

from .processes import process_context
from .report import rules_of
from .support import prepare, torch_random

AT_A_TIME = min(4, os.cpu_count() or 1)

pool: ProcessPoolExecutor | None = None
begun: dict[pytest.Item, Future] = {}


def pytest_configure(config: pytest.Config) -> None:
    what = "elsewhere: run in another process, with its parameters and no fixture"
    config.addinivalue_line("markers", what)
    # Processes that tests begin have one thread, too: rounding depends on that.
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rules first, and last what is waited for."""

    def key(item: pytest.Item) -> tuple[bool, bool]:
        return not rules_of(item.name), item.get_closest_marker("elsewhere") is not None

    items.sort(key=key)


def pytest_collection_finish(session: pytest.Session) -> None:
    global pool
    chosen = []
    for item in session.items:
        skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
        if item.get_closest_marker("elsewhere") and not skipped:
            chosen.append(item)
    if len(chosen) < 2 or session.config.option.collectonly:
        return  # one alone runs here, where pytest explains more and a debugger can step in
    # What has parameters is many, and short: it fills up the end.
    chosen.sort(key=lambda item: hasattr(item, "callspec"))
    settings = session.config.option.spec_profile, session.config.option.spec_seed, torch.float64
    pool = ProcessPoolExecutor(AT_A_TIME, process_context(), initializer=begin, initargs=settings)
    for item in chosen:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        begun[item] = pool.submit(call, item.function, parameters)


def begin(*settings: object) -> None:
    if hasattr(os, "nice"):
        os.nice(5)  # or the one process that runs all others would be the last
    # Autograd starts a thread for every device that it sees, and then its process cannot be forked.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare(*settings)


def call(test: Callable, parameters: Mapping[str, object]) -> None:
    torch_random.seed(0)
    test(**parameters)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem not in begun:
        return None
    error = begun.pop(pyfuncitem).exception()
    if error is not None:
        cause = error.__cause__ or error  # the traceback of the other process
        pytest.fail(str(cause), pytrace=False)
    return True


def pytest_unconfigure() -> None:
    if pool is not None:
        pool.shutdown(cancel_futures=True)
