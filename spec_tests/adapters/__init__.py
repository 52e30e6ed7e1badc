"""Adapters: of compressive.py, and of two implementations on PyPI."""
