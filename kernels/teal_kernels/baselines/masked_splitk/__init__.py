"""`masked_splitk`: the published way to skip columns, written anew to be measured against; nothing else uses it."""
