"""One file per learned optimizer: its rule (the mathematics) and its face (the class users
construct).
"""
