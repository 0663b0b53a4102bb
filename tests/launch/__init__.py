"""A package, so that its conftest.py and test names do not meet those of the folder above."""
