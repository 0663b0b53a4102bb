"""A package, so that a test's rank finds the function it is to run by the name of its file,
whatever else is called tests.
"""
