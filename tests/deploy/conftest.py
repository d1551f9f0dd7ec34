"""Fixtures of the stock client, as in tests/interop."""

from tests.interop.conftest import observation_with_noise, stock_python

__all__ = ["observation_with_noise", "stock_python"]
