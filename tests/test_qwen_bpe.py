import itertools
from concurrent import futures

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
    ranks = qwen_bpe._ranks()
    words = ["Given", " distance", " internationalisation", "Tiefenschätzung", "距離を測る", " ...)", "xqzvkjw", "\n\n"]

    def by_ranks(word: str) -> list[int]:
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
            if not joined or min(joined) == len(ranks):
                return [ranks[part] for part in parts]
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    assert {word: tokenizer.encode(word) for word in words} == {word: by_ranks(word) for word in words}


def test_processes_that_build_at_once_each_find_the_whole(tmp_path):
    def make(folder):
        folder.mkdir()
        for name in ("first", "second"):
            (folder / name).write_text("whole")

    def content(_):
        return sorted(file.read_text() for file in qwen_bpe._once(tmp_path / "target", make).iterdir())

    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(content, range(32))) == [["whole", "whole"]] * 32
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_a_wheel_that_cannot_be_had_is_said_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(qwen_bpe.Unavailable, match="(?s)cannot download dashscope.*No matching distribution"):
        qwen_bpe.tokenizer_folder()
