"""The rules of the Compressive Transformer as tests, for any implementation (README.md)."""
