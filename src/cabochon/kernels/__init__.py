"""Kernels for CPUs: products with matrices in their stored bits. `nn` computes the same, exactly.

`library` finds the compiled kernels, `packed` and `floats` are weights that use them, and `choose`
puts these into a model.
"""
