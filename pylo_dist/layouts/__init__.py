"""Where the elements of parameters lie that somebody else has sharded, or nobody: below every
optimizer.

`plain` is for tensors as they are, `dtensor` for DTensors, `gradients` for gradients that do not
lie as their parameters do; `construction` lets ranks build their optimizers together; `company`
finds who else has a hand in parameters.
"""
