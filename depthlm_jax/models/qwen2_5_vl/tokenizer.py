"""Qwen2.5's tokenizer format: how a byte-level BPE becomes a Hugging Face folder, and a small one of our own.

The small one serves recipes that start from random weights, where no Hugging Face folder is at hand. It differs from
the real one in its vocabulary only: same pre-tokenizer, same special tokens, same turn layout.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from depthlm_jax.errors import InputError

# Source: transformers, tokenization_qwen2.py. Each digit (\p{N}) is a piece of its own.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD_TOKEN = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (  # the small tokenizer's ids 0, 1, …: independent of its texts, so that a recipe can state them
    PAD_TOKEN,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# One turn: <|im_start|>role, newline, content, <|im_end|>, newline. Source: Qwen2.5-VL's model card and config files.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}"
    "{% else %}{{ raise_exception('a content item is an image or a text, not: ' + item['type']) }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_small_tokenizer(output_dir: Path, texts: list[str], vocab_size: int) -> None:
    """Writes a folder with a byte-level BPE learned from `texts`, which `AutoTokenizer` loads as a Qwen2 tokenizer.

    The same texts and size give the same files. Any text can be encoded, not only what `texts` holds.

    Args:
      output_dir: made if it does not exist.
      texts: what the model will read and write, such as every question and some answers.
      vocab_size: the most tokens it may have, special ones included; fewer if `texts` has no more pairs to merge.

    Raises:
      InputError: vocab_size leaves no room for the special tokens and the 256 bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise InputError(
            "the vocabulary is too small", found=vocab_size,
            expected=f"at least {smallest}: {len(SPECIAL_TOKENS)} special tokens and 256 bytes",
            fix=f"set vocab_size to {smallest} or more",
        )  # fmt: skip
    learner = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    save_tokenizer(output_dir, learned["vocab"], merges, {token: i for i, token in enumerate(SPECIAL_TOKENS)})


def save_tokenizer(
    output_dir: Path, vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: dict[str, int]
) -> None:
    """Writes a tokenizer folder that transformers 4.51 and 5 load as class Qwen2Tokenizer.

    Args:
      output_dir: made if it does not exist.
      vocab: token in the byte-to-unicode alphabet → id.
      merges: pairs of such tokens, most frequent first.
      special_tokens: token → id; in `vocab` under that id, or numbered on from its end.
    """
    by_id = sorted(special_tokens, key=special_tokens.__getitem__)
    tokenizer = _pipeline(models.BPE(vocab, merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in by_id])
    given = {token: tokenizer.token_to_id(token) for token in by_id}
    if given != special_tokens:
        raise InputError(
            "special tokens do not follow the vocabulary", found=special_tokens, expected=given,
            fix="number them on from the end of the vocabulary, without a gap",
        )  # fmt: skip
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    _write_json(output_dir / "vocab.json", {token: vocab[token] for token in sorted(vocab, key=vocab.__getitem__)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (output_dir / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(output_dir / "tokenizer_config.json", _tokenizer_config(special_tokens, by_id))


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_config(special_tokens: dict[str, int], by_id: list[str]) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(special_tokens[token]): {"content": token, **flags} for token in by_id},
        "additional_special_tokens": [token for token in by_id if token not in (PAD_TOKEN, END_OF_TURN)],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "model_max_length": 131072,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "Qwen2Tokenizer",  # the name that both majors know
        "unk_token": None,
    }


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
