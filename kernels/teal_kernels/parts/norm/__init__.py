"""Residual add and RMSNorm, the start of every half layer, fused with thresholding and compaction."""
