"""How a byte-level BPE becomes a Hugging Face folder, and a small one of our own. Host only.

The small one serves recipes that start from random weights, where no Hugging Face folder is at hand. It differs from a
published one in its vocabulary only: same pre-tokenizer, same special tokens, same turn layout.
"""

import dataclasses
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from depthlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Format:
    """What a family's tokenizer is, apart from its vocabulary."""

    pieces: str  # regular expression: a token does not reach beyond a piece
    composed: bool  # text is brought to Unicode's NFC first
    whole_words: bool  # a piece that is in the vocabulary is one token, whatever the merges say
    special_tokens: tuple[str, ...]  # ids 0, 1, … of the small tokenizer, so that a recipe can state them
    roles: dict[str, str]  # such as eos_token and pad_token
    chat_template: str
    tokenizer_class: str  # a name that transformers 4.51 and 5 both know


def build_small_tokenizer(form: Format, folder: Path, texts: list[str], vocab_size: int) -> None:
    """Writes a folder with a byte-level BPE learned from `texts`, which `AutoTokenizer` loads.

    The same texts and size give the same files. Any text can be encoded, not only what `texts` holds.

    Args:
      form: of the family.
      folder: made if it does not exist.
      texts: what the model will read and write, such as every question and some answers.
      vocab_size: the most tokens it may have, special ones included; fewer if `texts` has no more pairs to merge.

    Raises:
      InputError: vocab_size leaves no room for the special tokens and the 256 bytes.
    """
    special = form.special_tokens
    if vocab_size < len(special) + 256:
        raise InputError(
            "the vocabulary is too small", found=vocab_size,
            expected=f"at least {len(special) + 256}: {len(special)} special tokens and 256 bytes",
            fix=f"set vocab_size to {len(special) + 256} or more",
        )  # fmt: skip
    learner = _pipeline(form, models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    save_tokenizer(form, folder, learned["vocab"], merges, {token: i for i, token in enumerate(special)})


def save_tokenizer(
    form: Format, folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: dict[str, int]
) -> None:
    """Writes a tokenizer folder that transformers 4.51 and 5 load.

    Args:
      form: of the family.
      folder: made if it does not exist.
      vocab: token in the byte-to-unicode alphabet → id.
      merges: pairs of such tokens, most frequent first.
      special_tokens: token → id; in `vocab` under that id, or numbered on from its end.
    """
    by_id = sorted(special_tokens, key=special_tokens.__getitem__)
    tokenizer = _pipeline(form, models.BPE(vocab, merges, ignore_merges=form.whole_words))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in by_id])
    given = {token: tokenizer.token_to_id(token) for token in by_id}
    if given != special_tokens:
        raise InputError(
            "special tokens do not follow the vocabulary", found=special_tokens, expected=given,
            fix="number them on from the end of the vocabulary, without a gap",
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", {token: vocab[token] for token in sorted(vocab, key=vocab.__getitem__)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(form, special_tokens, by_id))


def _pipeline(form: Format, model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if form.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(form.pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_config(form: Format, special_tokens: dict[str, int], by_id: list[str]) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(special_tokens[token]): {"content": token, **flags} for token in by_id},
        "additional_special_tokens": [token for token in by_id if token not in form.roles.values()],
        "bos_token": None,
        "chat_template": form.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "tokenizer_class": form.tokenizer_class,
        "unk_token": None,
        **form.roles,
    }


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
