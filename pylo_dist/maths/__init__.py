"""The mathematics that several rules share: plain PyTorch passes, compiled passes, matrices. Knows
no mesh.
"""
