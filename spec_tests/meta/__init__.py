"""The suite's own tests: implementations broken on purpose, and right ones of another design."""
