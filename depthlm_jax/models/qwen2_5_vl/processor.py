"""Images and text → one sample: tokens, M-RoPE positions, patches in window-major order. Host only."""

import functools
from pathlib import Path

import numpy as np
import transformers

from depthlm_jax import files
from depthlm_jax.batch import Sample
from depthlm_jax.errors import InputError
from depthlm_jax.models.qwen2_5_vl.config import TOKENIZER_FILES, read_config, require

TURN_END, TURN_START = "<|im_end|>", "<|im_start|>"
INCOMPLETE = "give a complete Hugging Face folder; weights are not needed here"
STOPS = (TURN_END, "<|endoftext|>")  # as in the published generation_config.json


class Processor:
    """Source: HF Qwen2_5_VLProcessor, Qwen2VLImageProcessor, get_rope_index, get_vision_window_index."""

    def __init__(self, folder: Path):
        """`folder`: a Hugging Face folder; weights are not needed."""
        folder = Path(folder)
        self.config = read_config(
            *(files.read_json(folder / name, INCOMPLETE) for name in ("config.json", "preprocessor_config.json"))
        )
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(
                f"{folder}: no tokenizer", found=sorted(file.name for file in folder.iterdir())[:12],
                expected=" or ".join(TOKENIZER_FILES), fix=INCOMPLETE,
            )  # fmt: skip
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not self.tokenizer.chat_template:
            template = files.read_json(folder / "chat_template.json", INCOMPLETE)
            self.tokenizer.chat_template = require(template, "chat_template")
        self.stop_tokens = tuple(self._ids(token)[0] for token in STOPS)
        self.pad_token = self.tokenizer.pad_token_id or 0
        self.digit_tokens = [self._ids(digit)[0] for digit in "0123456789"]
        self._prompt = functools.lru_cache(maxsize=1024)(self._prompt_ids)

    def encode(
        self, images: list[np.ndarray], question: str, answer: str | None, *, loss_on: str = "answer",
        digit_weight: float = 1.0,
    ) -> Sample:  # fmt: skip
        """Returns one sample.

        Args:
          images: [H, W, 3] uint8, sides multiples of `config.grid_px`; they stand before the question.
          question: text of the user's turn.
          answer: text of the assistant's turn; None: a prompt to be continued, whose one supervised position is the
            last (its target is padding).
          loss_on: answer (assistant content and end of turn) or official (every text token but the first, and the
            dangling assistant header that the release leaves after the end of turn).
          digit_weight: loss weight of digits in the answer.
        """
        grids = [_grid(image, self.config.grid_px) for image in images]
        prompt_T = self._prompt(question, len(images))
        answer_T = self._answer_ids(answer, loss_on)
        tokens_T, vision_index_T, positions_TZ = self._place(np.concatenate([prompt_T, answer_T]), grids)
        length = len(tokens_T)
        if answer is None:
            index_A, targets_A = np.array([length - 1]), np.array([self.pad_token])
        else:
            first = 1 if loss_on == "official" else length - len(answer_T)
            text_A = np.arange(first, length)[vision_index_T[first:] < 0]
            index_A, targets_A = text_A - 1, tokens_T[text_A]
        in_answer = index_A >= length - len(answer_T) - 1
        weights_A = np.where(np.isin(targets_A, self.digit_tokens) & in_answer, digit_weight, 1.0)
        return Sample(
            tokens_T=tokens_T, positions_TZ=positions_TZ, vision_index_T=vision_index_T,
            answer_index_A=index_A, targets_A=targets_A, weights_A=weights_A, **self._patches(images, grids),
        )  # fmt: skip

    def decode(self, tokens: list[int]) -> str:
        """Returns the text before the first end of turn."""
        ends = [i for i, token in enumerate(tokens) if token in self.stop_tokens]
        return self.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        # The Rust tokenizer itself: transformers' wrapper may not be called from several threads at once.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _prompt_ids(self, question: str, images: int) -> np.ndarray:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return np.array(self._ids(text))

    def _answer_ids(self, answer: str | None, loss_on: str) -> np.ndarray:
        if answer is None:
            return np.zeros(0, np.int64)
        dangling = f"\n{TURN_START}assistant\n" if loss_on == "official" else ""
        return np.array(self._ids(f"{answer}{TURN_END}{dangling}"))

    def _place(self, ids_T: np.ndarray, grids: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens, merged-patch index and M-RoPE positions, each image token repeated for its merged patches."""
        image_at = np.flatnonzero(ids_T == self.config.image_token_id)
        if len(image_at) != len(grids):
            raise InputError(
                "images and image tokens do not match", found=f"{len(image_at)} image tokens for {len(grids)} images",
                expected="one each", fix="remove image tokens from the question",
            )  # fmt: skip
        tokens, index, positions = [], [], []
        position, slot, start = 0, 0, 0
        for at, (rows, columns) in zip(image_at, grids, strict=True):
            _append_text(tokens, index, positions, ids_T[start:at], position)
            position += at - start
            r, c = np.divmod(np.arange(rows * columns), columns)
            slots = _window_slots(rows, columns, self.config.vision.window_merged)
            tokens.append(np.full(rows * columns, self.config.image_token_id))
            index.append(slot + slots)
            positions.append(position + np.stack([np.zeros_like(r), r, c], axis=-1))
            position += max(rows, columns)
            slot += _slot_count(rows, columns, self.config.vision.window_merged)
            start = at + 1
        _append_text(tokens, index, positions, ids_T[start:], position)
        return np.concatenate(tokens), np.concatenate(index), np.concatenate(positions)

    def _patches(self, images: list[np.ndarray], grids: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        vision = self.config.vision
        sizes = vision.window_merged, vision.spatial_merge_size, vision.patch_size
        parts = [_window_patches(image, *sizes) for image in images]
        places = [_patch_places(*grid, *sizes[:2]) for grid in grids]
        ids = [np.where(valid, number, 0) for number, (_, valid) in enumerate(places, start=1)]
        return {
            "patches_PC": np.concatenate(parts) if parts else np.zeros((0, self.config.channels), np.uint8),
            "patch_rc_P2": np.concatenate([rc for rc, _ in places]) if places else np.zeros((0, 2), np.int64),
            "image_id_P": np.concatenate(ids) if ids else np.zeros(0, np.int64),
        }


def _append_text(tokens: list, index: list, positions: list, ids_T: np.ndarray, position: int) -> None:
    tokens.append(ids_T)
    index.append(np.full(len(ids_T), -1))
    positions.append(np.repeat(position + np.arange(len(ids_T))[:, None], 3, axis=1))


def _grid(image: np.ndarray, grid_px: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if height % grid_px or width % grid_px or not height or not width:
        raise InputError(
            "image is not on the patch grid", found=f"{width}×{height} px",
            expected=f"sides that are multiples of {grid_px} px", fix="resize with depthlm_jax.data.camera",
        )  # fmt: skip
    return height // grid_px, width // grid_px


def _slot_count(rows: int, columns: int, window: int) -> int:
    """Returns the merged-patch slots of an image: whole windows."""
    return -(-rows // window) * -(-columns // window) * window**2


@functools.lru_cache(maxsize=4096)
def _window_slots(rows: int, columns: int, window: int) -> np.ndarray:
    """Returns, for each merged patch in raster order, its slot in window-major order."""
    r, c = np.divmod(np.arange(rows * columns), columns)
    windows_across = -(-columns // window)
    number = (r // window) * windows_across + c // window
    return number * window**2 + (r % window) * window + c % window


@functools.lru_cache(maxsize=4096)
def _patch_places(rows: int, columns: int, window: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and column in the image of each patch slot [P, 2], and whether a patch is there [P]."""
    down, across = -(-rows // window), -(-columns // window)
    r, c = np.meshgrid(np.arange(down * window * merge), np.arange(across * window * merge), indexing="ij")
    rc = np.stack([r, c], axis=-1).reshape(down, window, merge, across, window, merge, 2)
    rc_P2 = rc.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, 2)
    return rc_P2, (rc_P2 < np.array([rows, columns]) * merge).all(axis=-1)


def _window_patches(image: np.ndarray, window: int, merge: int, patch: int) -> np.ndarray:
    """Returns patches_PC uint8 of an image, window-major, merge-block-minor; slots beyond the edge are zero."""
    side = window * merge * patch
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % side), (0, -width % side), (0, 0)))
    down, across = padded.shape[0] // side, padded.shape[1] // side
    blocks = padded.reshape(down, window, merge, patch, across, window, merge, patch, -1)
    return blocks.transpose(0, 4, 1, 5, 2, 6, 8, 3, 7).reshape(down * across * (side // patch) ** 2, -1)
