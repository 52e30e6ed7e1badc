"""The suite's own tests: implementations broken on purpose, and right ones of another design."""

import warnings

# Torch's, which needs it not; pytest's own filter does not reach the processes of conftest.py.
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
