"""`masked_splitk`: the published way to skip columns, rewritten as a baseline for benchmarks; nothing else uses it."""
