"""The models. Letters that end array names, stand in einsums and name sharding axes are the same ones."""

LETTERS = {
    "B": "row of a batch",
    "T": "token slot of a row",
    "S": "key slot: token slots, then one slot for each decoded token",
    "P": "patch slot of a row, in the order of the family",
    "W": "window of patches",
    "M": "merged patch: what the decoder sees of one patch, or of several side by side",
    "C": "channel × patch height × patch width",
    "A": "supervised position of a row",
    "Z": "axes of a position: t, h, w; equal where there is but one",
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
