"""Do again what a failure report shows: `replay("test_MEM_4_...", "my_adapter.py", case=...)`."""

import importlib
from typing import Any

import torch

from .adapter import Settings
from .implementation import load
from .support import Case, prepare, torch_random

__all__ = ["Case", "Settings", "replay"]

MODULES = ("attention", "memory", "compression", "losses", "model")


def checks() -> dict[str, Any]:
    """All tests of rules, by name."""
    modules = [importlib.import_module(f"{__package__}.test_{name}") for name in MODULES]
    found = {k: v for module in modules for k, v in vars(module).items()}
    return {name: value for name, value in found.items() if name.startswith("test_")}


def replay(
    test: str,
    impl: str,
    spec_seed: int = 0,
    spec_device: str = "cpu",
    spec_dtype: str | None = None,
    **drawn: Any,
) -> None:
    """Run one example of one test on an adapter; raises what the test raises, from where it is
    raised, so that a debugger can step in."""
    loaded = load(impl, torch.device(spec_device), spec_dtype)
    prepare("default", spec_seed, loaded.dtype, loaded.device)
    torch_random.seed(0)  # as Hypothesis does before every example
    found = checks()[test]
    getattr(found, "body", found)(loaded, **drawn)
    print(f"{test} holds for this example")
