"""The models. Letters that end array names, stand in einsums and name sharding axes are the same ones."""

LETTERS = {
    "B": "row of a batch",
    "T": "token slot of a row",
    "S": "key slot: token slots, then one slot for each decoded token",
    "P": "patch slot of a row, window-major",
    "W": "window of patches",
    "M": "merged patch: what the decoder sees of spatial_merge_size² patches",
    "C": "channel × patch height × patch width",
    "A": "supervised position of a row",
    "Z": "M-RoPE axes t, h, w",
    "L": "layer of a stack",
    "D": "width of the residual stream",
    "H": "heads × head width, of queries, keys or values",
    "N": "heads",
    "Q": "query: token slots that attend together",
    "K": "head width",
    "F": "width of a feed-forward layer",
    "V": "vocabulary",
    "R": "rank of low-rank factors",
}
