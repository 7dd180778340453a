"""Products with packed rows in Triton; `teal_kernels.packing` is the reference."""
