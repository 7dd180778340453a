"""A whole decode step of a model on a GPU, captured once as a CUDA graph and replayed for every token."""
