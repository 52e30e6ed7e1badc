"""Processes that begin without waiting for imports."""

import multiprocessing
import sys
from multiprocessing.context import BaseContext

FORKS = sys.platform == "linux"  # elsewhere a fork would not survive what the system has started


def process_context() -> BaseContext:
    """Where the system forks well, processes are forks of one that has loaded torch, and nothing of
    this project: a new one takes seconds for that. (Not of this one, where torch has started
    threads. Their environment is that of the first.)"""
    if not FORKS:
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    # torch._dynamo, since optimisers load it at their first step.
    server.set_forkserver_preload(["torch", "torch._dynamo", "hypothesis", "pytest"])
    return server
