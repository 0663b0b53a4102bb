"""Where the elements of parameters lie that somebody else has sharded, or nobody: below every
optimizer.
"""
