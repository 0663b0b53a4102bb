"""Build entry; everything declarative is in pyproject.toml. Compiled extensions will be added here."""

from setuptools import setup

setup()
