"""Stands in for Colab's own module in the tests."""
