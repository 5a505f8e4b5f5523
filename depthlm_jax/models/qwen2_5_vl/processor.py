"""Images and text → one sample: tokens, M-RoPE positions, patches in window-major order. Host only."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers

from depthlm_jax import files
from depthlm_jax.batch import Sample
from depthlm_jax.errors import InputError
from depthlm_jax.models.qwen2_5_vl.config import TOKENIZER_FILES, read_config, require

TURN_END, TURN_START, VISION_END = "<|im_end|>", "<|im_start|>", "<|vision_end|>"
INCOMPLETE = "give a complete Hugging Face folder; weights are not needed here"
STOPS = (TURN_END, "<|endoftext|>")  # as in the published generation_config.json


class Processor:
    """Source: HF Qwen2_5_VLProcessor, Qwen2VLImageProcessor, get_rope_index, get_vision_window_index."""

    def __init__(self, folder: Path):
        """`folder`: a Hugging Face folder; weights are not needed."""
        self.folder = folder = Path(folder)
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
        self.vision_end = self._ids(VISION_END)[0]
        self._prompt = functools.lru_cache(maxsize=1024)(lambda text: np.array(self._ids(text)))

    def __reduce__(self):
        return Processor, (self.folder,)

    def encode(
        self, images: Sequence[np.ndarray], turns: Sequence[tuple[str, str | None]], *, layout: str = "independent",
        loss_on: str = "answer", digit_weight: float = 1.0,
    ) -> Sample:  # fmt: skip
        """Returns one sample.

        Args:
          images: [H, W, 3] uint8, sides multiples of `config.grid_px`; they stand before the first question.
          turns: (question, answer) texts; answer None, in the last turn: a prompt to be continued, whose one supervised
            position is its last (the target is padding).
          layout: of several turns: independent (each follows the images as if it were the only one, and sees the images
            and itself) or conversation (one after the other).
          loss_on: answer (assistant content and end of turn) or official (every text token but the first, and the
            dangling assistant header that the release leaves after the end of turn).
          digit_weight: loss weight of digits in the answers.
        """
        grids = [_grid(image, self.config.grid_px) for image in images]
        text = self._text(len(images), turns, layout, loss_on)
        tokens_T, vision_index_T, positions_TZ = self._place(text, grids)
        shift = len(tokens_T) - len(text.tokens)  # all image tokens stand before the first answer
        supervised_T = np.concatenate([np.zeros(shift, bool), text.supervised])
        text_T = np.flatnonzero(supervised_T if loss_on == "answer" else vision_index_T < 0)
        index_A, targets_A = text_T - 1, tokens_T[text_T]
        if loss_on == "official":
            index_A, targets_A = index_A[1:], targets_A[1:]
        if turns[-1][1] is None:
            index_A, targets_A = np.append(index_A, len(tokens_T) - 1), np.append(targets_A, self.pad_token)
        answered_A = np.append(supervised_T, False)[index_A + 1]
        weights_A = np.where(np.isin(targets_A, self.digit_tokens) & answered_A, digit_weight, 1.0)
        branch_T = np.concatenate([np.zeros(shift, int), text.branch])
        return Sample(
            tokens_T=tokens_T, positions_TZ=positions_TZ, branch_T=branch_T, vision_index_T=vision_index_T,
            answer_index_A=index_A, targets_A=targets_A, weights_A=weights_A, **self._patches(images, grids),
        )  # fmt: skip

    def text_size(
        self, images: int, turns: Sequence[tuple[str, str | None]], layout: str, loss_on: str
    ) -> tuple[int, int]:
        """Returns the tokens of a sample without those of its images, and its supervised positions."""
        text = self._text(images, turns, layout, loss_on)
        tokens = len(text.tokens) - images
        return tokens, tokens - 1 if loss_on == "official" else int(text.supervised.sum())

    def image_size(self, width_N: np.ndarray, height_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and patch slots of images with these sides in px, multiples of `config.grid_px`."""
        rows_N, columns_N = height_N // self.config.grid_px, width_N // self.config.grid_px
        slots_N = _slot_count(rows_N, columns_N, self.config.vision.window_merged)
        return rows_N * columns_N, slots_N * self.config.patches_per_merged

    def decode(self, tokens: list[int]) -> str:
        """Returns the text before the first end of turn."""
        ends = [i for i, token in enumerate(tokens) if token in self.stop_tokens]
        return self.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        # The Rust tokenizer itself: transformers' wrapper may not be called from several threads at once.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _prompt_texts(self, images: int, turns: Sequence[tuple[str, str | None]], layout: str) -> list[str]:
        """Returns the text before each answer, from the answer before on; of independent turns, each on its own."""
        if layout == "independent":
            return [self._template(images, [turn]) for turn in turns]
        texts = [self._template(images, turns[: number + 1]) for number in range(len(turns))]
        before = ["", *(f"{text}{answer}{TURN_END}" for text, (_, answer) in zip(texts[:-1], turns, strict=False))]
        if not all(text.startswith(start) for text, start in zip(texts, before, strict=True)):
            raise InputError(
                "chat template: an earlier turn changes when another follows", found=texts[-1][:200],
                expected="each turn after the one before", fix="use data.reference.layout=independent",
            )  # fmt: skip
        return [text.removeprefix(start) for text, start in zip(texts, before, strict=True)]

    def _template(self, images: int, turns: Sequence[tuple[str, str | None]]) -> str:
        """Returns the chat up to where the last turn's answer begins."""
        (first, _), *others = turns
        messages = [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": first}]}]
        for (_, answer), (question, _) in zip(turns, others, strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _text(self, images: int, turns: Sequence[tuple[str, str | None]], layout: str, loss_on: str) -> "Text":
        """Returns the tokens of a sample, one for each image."""
        parts = []  # tokens, branch, supervised
        dangling = f"\n{TURN_START}assistant\n" if loss_on == "official" else ""
        alone = layout == "independent" and len(turns) > 1
        for number, prompt in enumerate(self._prompt_texts(images, turns, layout), start=1):
            prompt_T, answer = self._prompt(prompt), turns[number - 1][1]
            shared = int(np.flatnonzero(prompt_T == self.vision_end).max(initial=-1)) + 1 if alone else 0
            if number == 1:
                parts.append((prompt_T[:shared], 0, False))
            parts.append((prompt_T[shared:], number if alone else 0, False))
            if answer is not None:
                end = TURN_END + dangling if number == len(turns) else TURN_END
                parts.append((np.array(self._ids(answer + end)), number if alone else 0, True))
        return Text(
            np.concatenate([ids for ids, _, _ in parts]),
            np.concatenate([np.full(len(ids), branch) for ids, branch, _ in parts]),
            np.concatenate([np.full(len(ids), supervised) for ids, _, supervised in parts]),
        )

    def _place(self, text: "Text", grids: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens, merged-patch index and M-RoPE positions, each image token repeated for its merged patches."""
        ids_T = text.tokens
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
        shared = int(np.sum(text.branch == 0))
        _append_text(tokens, index, positions, ids_T[start:shared], position)
        for number in range(1, int(text.branch.max()) + 1):  # each question's positions go on from the images
            _append_text(tokens, index, positions, ids_T[text.branch == number], position + shared - start)
        return np.concatenate(tokens), np.concatenate(index), np.concatenate(positions)

    def _patches(self, images: Sequence[np.ndarray], grids: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        vision = self.config.vision
        sizes = vision.window_merged, vision.spatial_merge_size, vision.patch_size
        parts = [_window_patches(image, *sizes) for image in images]
        places = [_patch_places(*grid, *sizes[:2]) for grid in grids]
        ids = [np.where(valid, number, 0) for number, (_, valid) in enumerate(places, start=1)]
        return {
            "patches_PC": _joined(parts) if parts else np.zeros((0, self.config.channels), np.uint8),
            "patch_rc_P2": np.concatenate([rc for rc, _ in places]) if places else np.zeros((0, 2), np.int64),
            "image_id_P": np.concatenate(ids) if ids else np.zeros(0, np.int64),
        }


@dataclasses.dataclass(frozen=True)
class Text:
    """A sample's tokens before its images are unfolded."""

    tokens: np.ndarray  # (N,) one token stands for each image
    branch: np.ndarray  # (N,) number of the question that alone sees the token; 0: all see it
    supervised: np.ndarray  # (N,) bool: said by the assistant


def _append_text(tokens: list, index: list, positions: list, ids_T: np.ndarray, position: int) -> None:
    tokens.append(ids_T)
    index.append(np.full(len(ids_T), -1))
    positions.append(np.repeat(position + np.arange(len(ids_T))[:, None], 3, axis=1))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]  # one image, the usual case, is not copied


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
    height, width, channels = image.shape
    down, across = -(-height // side), -(-width // side)
    planes = np.zeros((channels, down * side, across * side), np.uint8)
    planes[:, :height, :width] = image.transpose(2, 0, 1)
    lines = planes.view(f"V{patch}")  # a patch's line of one colour is moved as one piece
    lines = lines.reshape(channels, down, window, merge, patch, across, window, merge)
    in_order = np.ascontiguousarray(lines.transpose(1, 5, 2, 6, 3, 7, 0, 4))
    return in_order.view(np.uint8).reshape(down * across * (window * merge) ** 2, -1)
