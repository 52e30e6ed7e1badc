"""--spec-device: what a second device shows, a pretended one where there is none."""

from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from .. import replay, test_memory
from ..adapter import Settings
from ..adapters import reference
from ..implementation import Implementation
from ..replay import checks
from ..support import Case
from .pretend import DEVICE, pretended
from .test_instrument import RIGHT, Wrong, spec, users_folder, verdicts
from .test_meta import changed, failure, profile

hypothesis.settings.register_profile(
    "one", hypothesis.settings.get_profile("quick"), max_examples=1
)


@pytest.mark.elsewhere
def test_what_is_right_passes_on_another_device():
    with pretended() as device, profile("one"):
        impl = Implementation(RIGHT, "right", device)
        found = {test: failure(check, impl) for test, check in checks().items()}
    failed = [f"{test}: {error}" for test, error in found.items() if error is not None]
    assert not failed, "\n".join(failed)


def test_a_number_here_cannot_be_added_to_from_there():
    """As on CUDA, where the sum alone may be of both."""
    with pretended() as device:
        here, there = torch.zeros(()), torch.ones((), device=device)
        assert (here + there).device == device
        with pytest.raises(RuntimeError, match="add_.* of tensors on meta and cpu"):
            here += there


def test_a_model_with_a_tensor_that_stays_on_the_cpu_fails():
    module = changed(
        (
            (
                "distance = torch.arange(S - 1, -1, -1, dtype=dtype, device=h.device)",
                "distance = torch.arange(S - 1, -1, -1, dtype=dtype)",
            ),
        )
    )
    check = test_memory.test_MEM_2_memories_never_exceed_their_lengths
    with pretended() as device, profile("one"):
        error = failure(check, Implementation(reference.Adapter(module), "wrong", device))
    assert "of tensors on meta and cpu" in str(error)


def test_memories_that_come_back_on_another_device_break_MEM_8():
    def read(state: Any) -> list[tuple[Tensor, Tensor]]:
        return [(mem.cpu(), c_mem.cpu()) for mem, c_mem in RIGHT.read(state)]

    check = test_memory.test_MEM_8_memories_are_not_changed_nor_carry_a_gradient
    with pretended() as device, profile("one"):
        right = failure(check, Implementation(RIGHT, "right", device))
        wrong = failure(check, Implementation(Wrong(read=read), "wrong", device))
    assert right is None
    assert "expected [device(type='meta'), torch.float64], got [device(type='cpu')" in str(wrong)


def test_an_example_is_done_again_on_its_device(monkeypatch: pytest.MonkeyPatch):
    prepared = []
    monkeypatch.setattr(replay, "prepare", lambda *how: prepared.append(how))
    name = "test_MEM_8_memories_are_not_changed_nor_carry_a_gradient"
    case = Case(Settings(), [4, 4])
    with pretended():
        replay.replay(name, "spec_tests.adapters.reference", spec_device="meta", case=case)
    assert prepared == [("default", 0, torch.float64, DEVICE)]


PLUGIN = """
import torch
from spec_tests.meta.pretend import Pretend

Pretend().__enter__()

def pytest_terminal_summary():
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.initial_seed() == 5
"""


@pytest.mark.elsewhere
def test_the_option_chooses_the_device():
    with users_folder() as folder:
        (folder / "plugin.py").write_text(PLUGIN)
        options = ("--spec-device=meta", "-p", "plugin", "-k", "CMP_3 and share", "--spec-seed=5")
        ran = spec(folder, "--impl=my_adapter.py", *options)
    assert ran.status == 0, ran.out + ran.err
    assert verdicts(ran.report) == {"CMP-3": "PASS"}
    assert ran.report["implementation"]["device"] == str(DEVICE)
    assert "device meta, dtype float64" in ran.out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no cuda device")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_right_passes_on_a_cuda_device(dtype: str):
    with users_folder() as folder:
        ran = spec(folder, "--impl=my_adapter.py", "--spec-device=cuda", f"--spec-dtype={dtype}")
    assert ran.status == 0, ran.out + ran.err
    assert set(verdicts(ran.report).values()) == {"PASS"}
    assert f"device cuda:0, dtype {dtype}" in ran.out
