"""How much there is to compute in a row, counted from its ids: what floating-point operations are proportional to."""

import numpy as np

COUNTS = {
    "tokens": "token slots that hold a token",
    "token_pairs": "tokens × tokens before them that they see, themselves included",
    "patches": "patch slots that hold a patch",
    "image_pairs": "patches × patches of the same image",
    "window_pairs": "patches × patches of the same attention window",
    "merged": "merged patches that the text refers to",
    "answers": "supervised positions",
}


def work_of(row: dict[str, np.ndarray], window: int) -> dict[str, int]:
    """Returns the COUNTS of a row of the batch contract, without its B axis.

    Args:
      row: arrays by field.
      window: patch slots of an attention window; a window belongs to one image.
    """
    segments_T, branch_T, image_P = row["segments_BT"], row["branch_BT"], row["image_id_BP"]
    tokens, patches = segments_T > 0, image_P > 0
    per_image = np.bincount(image_P[patches]).astype(np.int64)
    per_window = patches.reshape(-1, window).sum(axis=1, dtype=np.int64)
    return {
        "tokens": int(tokens.sum()),
        "token_pairs": _token_pairs(segments_T[tokens], branch_T[tokens]),
        "patches": int(patches.sum()),
        "image_pairs": int((per_image**2).sum()),
        "window_pairs": int((per_window**2).sum()),
        "merged": int((row["vision_index_BT"] >= 0).sum()),
        "answers": int((row["weights_BA"] > 0).sum()),
    }


def _token_pairs(segments_N: np.ndarray, branch_N: np.ndarray) -> int:
    """A sample's shared tokens (branch 0) come first; each question sees them and itself."""
    if not len(segments_N):
        return 0
    per_branch = np.zeros((segments_N.max() + 1, branch_N.max() + 1), np.int64)
    np.add.at(per_branch, (segments_N, branch_N), 1)
    shared = per_branch[:, :1] * per_branch[:, 1:]
    return int((per_branch * (per_branch + 1) // 2).sum() + shared.sum())
