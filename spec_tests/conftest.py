"""What all tests share: the adapter under test, models to test, and Hypothesis's profile."""

import hypothesis
import pytest
import torch
from adapter import Adapter, Reference


class TorchRandom:
    """torch's random numbers as Hypothesis wants them, to seed them before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()
hypothesis.register_random(torch_random)

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other

# Derandomised: a failure is the code's, never the draw's. No deadline: machines differ.
hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def adapter() -> Adapter:
    return Reference()


@pytest.fixture(scope="session", autouse=True)
def float64():
    """Everything is in float64: what is equal is then equal to 1e-12, and what differs shows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
