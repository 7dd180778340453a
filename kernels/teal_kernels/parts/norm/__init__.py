"""Residual addition and RMSNorm, before attention and before the MLP, fused with thresholding and compaction."""
