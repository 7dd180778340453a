"""`threshold`: zero the entries of a vector whose magnitude does not exceed a threshold."""
