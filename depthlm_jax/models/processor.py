"""Images and text → one sample. What the families share; each adds what becomes of an image. Host only."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import transformers

from depthlm_jax import files
from depthlm_jax.batch import Sample
from depthlm_jax.errors import InputError
from depthlm_jax.models.hf_config import require

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # one of them is enough
INCOMPLETE = "give a complete Hugging Face folder; weights are not needed here"
DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """The tokens that stand for one image."""

    tokens_N: np.ndarray
    slot_N: np.ndarray  # merged patch that each shows, counted from the image's first; −1: it is a word, not a patch
    positions_N3: np.ndarray  # counted from the image's first position
    advance: int  # positions that the image takes


def read_preprocessor(folder: Path) -> dict:
    """Returns preprocessor_config.json; transformers 5 saves it inside processor_config.json."""
    whole = folder / "processor_config.json"
    if (folder / "preprocessor_config.json").is_file() or not whole.is_file():
        return files.read_json(folder / "preprocessor_config.json", INCOMPLETE)
    return require(files.read_json(whole, INCOMPLETE), "image_processor")


class Processor:
    """Text, turns and images → sample. A family sets the fields and the last four methods."""

    read_config: Callable  # (config.json, preprocessor_config.json) → config
    STOPS: tuple[str, ...]  # tokens that end an answer; the first one ends a turn
    IMAGE: str  # the token that the chat template writes for an image
    IMAGE_END: str  # the last token that it writes for one
    DANGLING = ""  # what the release leaves, and learns, after the last end of turn

    def __init__(self, folder: Path):
        """`folder`: a Hugging Face folder; weights are not needed.

        Raises:
          InputError: a file is missing, or describes another kind of model.
        """
        self.folder = folder = Path(folder)
        self.config = type(self).read_config(
            files.read_json(folder / "config.json", INCOMPLETE), read_preprocessor(folder)
        )
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(
                f"{folder}: no tokenizer", found=sorted(file.name for file in folder.iterdir())[:12],
                expected=" or ".join(TOKENIZER_FILES), fix=INCOMPLETE,
            )  # fmt: skip
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not self.tokenizer.chat_template:
            template = files.read_json(folder / "chat_template.json", INCOMPLETE)
            if "chat_template" not in template:
                raise InputError(
                    f"{folder}/chat_template.json: chat_template is missing", found=f"fields {sorted(template)}",
                    expected="chat_template", fix=INCOMPLETE,
                )  # fmt: skip
            self.tokenizer.chat_template = template["chat_template"]
        self.stop_tokens = tuple(self._token(text) for text in self.STOPS)
        self.pad_token = self.tokenizer.pad_token_id or 0
        self.digit_tokens = [self._token(digit) for digit in DIGITS]
        self.point_token = self._token(".")
        self.image_end = self._token(self.IMAGE_END)
        if self._token(self.IMAGE) != self.config.image_token_id:
            raise InputError(
                f"{folder}: tokenizer and config.json disagree", found=f"{self.IMAGE} is token "
                f"{self._token(self.IMAGE)}", expected=f"{self.config.image_token_id}, as config.json says",
                fix="use the tokenizer files that belong to this model",
            )  # fmt: skip
        self._prompt = functools.lru_cache(maxsize=1024)(lambda text: np.array(self._ids(text)))

    def __reduce__(self):
        return type(self), (self.folder,)

    def encode(
        self, images: Sequence[np.ndarray], turns: Sequence[tuple[str, str | None]], *, layout: str = "independent",
        loss_on: str = "answer", digit_weight: float = 1.0, begin: str = "",
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
          begin: of a prompt, how the answer begins; a number is expected to follow.

        Raises:
          InputError: an image is not on the patch grid, the text holds image tokens, or `begin` cannot be cut off.
        """
        grids = [_grid(image, self.config.grid_px) for image in images]
        text = self._text(len(images), turns, layout, loss_on, begin)
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
            answer_index_A=index_A, targets_A=targets_A, weights_A=weights_A, **self._patches(images),
        )  # fmt: skip

    def text_size(
        self, images: int, turns: Sequence[tuple[str, str | None]], layout: str, loss_on: str
    ) -> tuple[int, int]:
        """Returns the tokens of a sample without those of its images, and its supervised positions."""
        text = self._text(images, turns, layout, loss_on)
        tokens = len(text.tokens) - images
        return tokens, tokens - 1 if loss_on == "official" else int(text.supervised.sum())

    def decode(self, tokens: list[int]) -> str:
        """Returns the text before the first end of turn."""
        ends = [i for i, token in enumerate(tokens) if token in self.stop_tokens]
        return self.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        # The Rust tokenizer itself: transformers' wrapper may not be called from several threads at once.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _token(self, text: str) -> int:
        """Returns the one token of a text."""
        ids = self._ids(text)
        if len(ids) != 1:
            raise InputError(
                f"{self.folder}: the tokenizer has no token {text!r}", found=f"{len(ids)} tokens",
                expected="a tokenizer of this family, which has it as one token",
                fix="use the tokenizer files that belong to this model",
            )  # fmt: skip
        return ids[0]

    def _begin(self, text: str) -> list[int]:
        """Returns the tokens of an answer's beginning, which are the same whatever number follows."""
        ids = self._ids(text)
        if any(
            self._ids(text + digit) != [*ids, token] for digit, token in zip(DIGITS, self.digit_tokens, strict=True)
        ):
            raise InputError(
                "the beginning of an answer cannot be cut off before a number", found=repr(text),
                expected="a text whose tokens do not change when a digit follows", fix="let it end as in an answer",
            )  # fmt: skip
        return ids

    def _prompt_texts(self, images: int, turns: Sequence[tuple[str, str | None]], layout: str) -> list[str]:
        """Returns the text before each answer, from the answer before on; of independent turns, each on its own."""
        if layout == "independent":
            return [self._template(images, [turn]) for turn in turns]
        texts = [self._template(images, turns[: number + 1]) for number in range(len(turns))]
        ended = [f"{text}{answer}{self.STOPS[0]}" for text, (_, answer) in zip(texts[:-1], turns, strict=False)]
        before = ["", *ended]
        if not all(text.startswith(start) for text, start in zip(texts, before, strict=True)):
            raise InputError(
                "chat template: an earlier turn changes when another follows", found=texts[-1][:200],
                expected="each turn after the one before", fix="use data.reference.layout=independent",
            )  # fmt: skip
        return [text.removeprefix(start) for text, start in zip(texts, before, strict=True)]

    def _template(self, images: int, turns: Sequence[tuple[str, str | None]]) -> str:
        """Returns the chat up to where the last turn's answer begins."""
        (first, _), *others = turns
        said = {"type": "text", "text": first, "content": first}  # templates know it by either name
        messages = [{"role": "user", "content": [{"type": "image"}] * images + [said]}]
        for (_, answer), (question, _) in zip(turns, others, strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not all(question in text for question, _ in turns):
            raise InputError(
                f"{self.folder}: the chat template leaves out the question", found=text[:200],
                expected="every message's text", fix="use the chat template that belongs to this model",
            )  # fmt: skip
        return text

    def _text(
        self, images: int, turns: Sequence[tuple[str, str | None]], layout: str, loss_on: str, begin: str = ""
    ) -> "Text":
        """Returns the tokens of a sample, one for each image."""
        parts = []  # tokens, branch, supervised
        dangling = self.DANGLING if loss_on == "official" else ""
        alone = layout == "independent" and len(turns) > 1
        for number, prompt in enumerate(self._prompt_texts(images, turns, layout), start=1):
            prompt_T, answer = self._prompt(prompt), turns[number - 1][1]
            shared = int(np.flatnonzero(prompt_T == self.image_end).max(initial=-1)) + 1 if alone else 0
            if number == 1:
                parts.append((prompt_T[:shared], 0, False))
            parts.append((prompt_T[shared:], number if alone else 0, False))
            if answer is None:
                parts.append((np.array(self._begin(begin), int), number if alone else 0, False))
            else:
                end = self.STOPS[0] + (dangling if number == len(turns) else "")
                parts.append((np.array(self._ids(answer + end)), number if alone else 0, True))
        return Text(
            np.concatenate([ids for ids, _, _ in parts]),
            np.concatenate([np.full(len(ids), branch) for ids, branch, _ in parts]),
            np.concatenate([np.full(len(ids), supervised) for ids, _, supervised in parts]),
        )

    def _place(self, text: "Text", grids: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens, merged-patch index and positions, the one token of each image replaced by all of its own."""
        ids_T = text.tokens
        image_at = np.flatnonzero(ids_T == self.config.image_token_id)
        if len(image_at) != len(grids):
            raise InputError(
                "images and image tokens do not match", found=f"{len(image_at)} image tokens for {len(grids)} images",
                expected="one each", fix="remove image tokens from the question",
            )  # fmt: skip
        tokens, index, positions = [], [], []
        position, slot, start = 0, 0, 0
        for at, grid in zip(image_at, grids, strict=True):
            _append_text(tokens, index, positions, ids_T[start:at], position)
            position += at - start
            image = self.unfold(*grid)
            tokens.append(image.tokens_N)
            index.append(np.where(image.slot_N < 0, -1, slot + image.slot_N))
            positions.append(position + image.positions_N3)
            position += image.advance
            slot += self.merged_slots(*grid)
            start = at + 1
        shared = int(np.sum(text.branch == 0))
        _append_text(tokens, index, positions, ids_T[start:shared], position)
        for number in range(1, int(text.branch.max()) + 1):  # each question's positions go on from the images
            _append_text(tokens, index, positions, ids_T[text.branch == number], position + shared - start)
        return np.concatenate(tokens), np.concatenate(index), np.concatenate(positions)

    def _patches(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        parts = [self.patches(image) for image in images]
        ids = [np.where(valid, number, 0) for number, (_, _, valid) in enumerate(parts, start=1)]
        return {
            "patches_PC": _joined([patches for patches, _, _ in parts], np.zeros((0, self.config.channels), np.uint8)),
            "patch_rc_P2": _joined([rc for _, rc, _ in parts], np.zeros((0, 2), np.int64)),
            "image_id_P": _joined(ids, np.zeros(0, np.int64)),
        }

    def image_size(self, width_N: np.ndarray, height_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the tokens of images, their patch slots, and how many of the tokens are words.

        Args:
          width_N: px, multiples of `config.grid_px`.
          height_N: likewise.
        """
        raise NotImplementedError

    def merged_slots(self, rows: int, columns: int) -> int:
        """Returns the merged-patch slots of an image of rows × columns merged patches."""
        raise NotImplementedError

    def unfold(self, rows: int, columns: int) -> ImageTokens:
        """Returns the tokens of an image of rows × columns merged patches."""
        raise NotImplementedError

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns patches_PC uint8, row and column of each in the image (P, 2), and whether the slot holds one (P,)."""
        raise NotImplementedError


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


def _joined(parts: list[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    if len(parts) > 1:
        return np.concatenate(parts)
    return parts[0] if parts else nothing  # one image, the usual case, is not copied


def _grid(image: np.ndarray, grid_px: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if height % grid_px or width % grid_px or not height or not width:
        raise InputError(
            "image is not on the patch grid", found=f"{width}×{height} px",
            expected=f"sides that are multiples of {grid_px} px", fix="resize with depthlm_jax.data.camera",
        )  # fmt: skip
    return height // grid_px, width // grid_px
