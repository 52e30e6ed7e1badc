"""The rules of the Compressive Transformer as tests, for any implementation (README.md)."""

import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, which does without it
