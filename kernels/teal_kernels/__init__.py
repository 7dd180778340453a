"""Sparse decoding kernels of teal: one folder per op, each a triple of `reference`, `kernel` and `op`.

Nothing is imported here, so that `import teal_kernels` costs nothing; take what you need from its own
module, for example `from teal_kernels.ops.sparse_gemv.op import sparse_gemv`. This package knows nothing of
models, stores or the command line.
"""
