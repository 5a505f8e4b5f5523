import bpe
import pytest
import qwen_bpe
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(qwen_tokenizer_dir):
    return AutoTokenizer.from_pretrained(qwen_tokenizer_dir)


def test_ids_are_those_of_the_released_models(tokenizer):
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")  # …Fast in transformers 4
    assert len(tokenizer) == 151665
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("2.35") == [17, 13, 18, 20]
    released = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|image_pad|>": 151655,
        "<|file_sep|>": 151664,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in released} == released
    assert [tokenizer.encode(token) for token in released] == [[i] for i in released.values()]


def test_every_rank_above_the_bytes_is_one_merge(qwen_tokenizer_dir):
    merges = (qwen_tokenizer_dir / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(merges) == 151643 - 256
    assert len(set(merges)) == len(merges)


def test_merges_give_what_the_ranks_give(tokenizer):
    ranks = qwen_bpe.ranks()
    words = ["Given", " distance", " internationalisation", "Tiefenschätzung", "距離を測る", " ...)", "xqzvkjw", "\n\n"]
    assert {word: tokenizer.encode(word) for word in words} == {
        word: bpe.encoded(word.encode(), ranks) for word in words
    }
