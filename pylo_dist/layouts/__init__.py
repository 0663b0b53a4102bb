"""Where the elements of parameters lie that somebody else has sharded, or nobody: below every
optimizer.

`describe` asks `plain` (tensors as they are), `dtensor` or `fsdp1`, whose flat parameters `flat`
opens; `gradients` is for gradients that do not lie as their parameters do; `construction` lets
ranks build their optimizers together; `company` and `ddp` find who else has a hand in parameters,
`gathered` which modules show those of before a step, by `objects`.
"""
