import json
import logging
import random
import shutil
import string
import unicodedata

import bpe
import pytest
import regex
import tekken_bpe
from jinja2 import TemplateError
from transformers import AutoTokenizer

from depthlm_jax.errors import InputError
from depthlm_jax.models.pixtral.tokenizer import FORMAT
from depthlm_jax.models.tokenizer import build_small_tokenizer, save_tokenizer

TEXTS = [
    "Given this image, how far is the point pointed by the red arrow from the camera?",
    "<think> The point is around 2.35 meters away from the camera. </think>\n\n<answer> 2.35 </answer>",
]
FIRST_ID = 1000  # of the real vocabulary's tokens that are not special
NAMES = ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "made" / "on the way"
    build_small_tokenizer(FORMAT, folder, TEXTS, vocab_size=320)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tekken(tekken_tokenizer_dir):
    return AutoTokenizer.from_pretrained(tekken_tokenizer_dir)


@pytest.fixture(scope="module")
def published() -> dict:
    return tekken_bpe.published()


@pytest.fixture(scope="module")
def ranks(published) -> dict[bytes, int]:
    return tekken_bpe.ranks(published)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def character() -> str:
        below_surrogates, above = chr(rng.randrange(0xD800)), chr(rng.randrange(0xE000, 0x110000))
        return rng.choice([rng.choice(string.printable), below_surrogates, above])

    return ["".join(character() for _ in range(40)) for _ in range(count)]


def test_loads(tokenizer):
    assert len(tokenizer) == 320
    roles = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert roles == ("<s>", "</s>", "<pad>", "<unk>")


def test_any_text_comes_back(tokenizer):
    texts = [*TEXTS, "  two  spaces , a comma", "日本語 🙂\r\n\t", "e\u0301", *random_texts(200)]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_what_was_learned_is_shorter_than_bytes(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_each_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("12.50 meters 3")[:5] == ["1", "2", ".", "5", "0"]
    ids = [tokenizer.encode(digit) for digit in string.digits]
    assert [len(i) for i in ids] == [1] * 10
    assert tokenizer.encode(string.digits) == [i[0] for i in ids]


def test_special_tokens_have_the_ids_of_their_order(tokenizer):
    order = list(range(len(FORMAT.special_tokens)))
    assert [tokenizer.encode(token) for token in FORMAT.special_tokens] == [[i] for i in order]
    assert tokenizer.encode("".join(FORMAT.special_tokens)) == order
    text = "<s>[INST]a[IMG][IMG_BREAK][IMG][IMG_END][/INST]b</s><pad>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "ab"


def test_a_piece_in_the_vocabulary_is_one_token_without_merges(tmp_path):
    vocab = {letter: number for number, letter in enumerate(["<unk>", "a", "b", "c", "ab", "abc"])}
    save_tokenizer(FORMAT, tmp_path, vocab, merges=[("a", "b")], special_tokens={"<unk>": 0})
    whole = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert whole["ignore_merges"] is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("abc") == ["abc"]
    assert tokenizer.tokenize("abcc") == ["ab", "c", "c"]


def test_turns_are_laid_out_as_pixtral_does(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "How far?"}]},
        {"role": "assistant", "content": "<answer> 2.35 </answer>"},
        {"role": "user", "content": "Sure?"},
    ]
    question = "<s>[INST][IMG][IMG]How far?[/INST]"
    for prompted in (True, False):
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=prompted)
        assert asked == question
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert answered == question + "<answer> 2.35 </answer></s>[INST]Sure?[/INST]"
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(answered)


@pytest.mark.parametrize(
    "message, named",
    [
        ({"role": "user", "content": [{"type": "video"}]}, "a content item is an image or a text, not: video"),
        ({"role": "system", "content": "Be brief."}, "no such role: system"),
    ],
)
def test_what_the_template_does_not_know_is_named(tokenizer, message, named):
    with pytest.raises(TemplateError, match=named):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_same_texts_give_the_same_files(folder, tmp_path):
    build_small_tokenizer(FORMAT, tmp_path, TEXTS, vocab_size=320)
    assert sorted(file.name for file in tmp_path.iterdir()) == NAMES
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [(folder / name).read_bytes() for name in NAMES]


@pytest.mark.parametrize("which", ["tokenizer", "tekken"])
def test_a_roundtrip_through_transformers_changes_no_id(request, tmp_path, which):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, *random_texts(5), "".join(FORMAT.special_tokens)]
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_no_texts_leave_bytes(tmp_path):
    build_small_tokenizer(FORMAT, tmp_path, [], vocab_size=1000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(FORMAT.special_tokens) + 256
    assert len(tokenizer.encode("how far")) == len("how far")


def test_too_small_a_vocabulary_is_refused_with_the_smallest_one(tmp_path):
    with pytest.raises(InputError, match="found: +269\n.*at least 270: 14 special tokens and 256 bytes"):
        build_small_tokenizer(FORMAT, tmp_path, TEXTS, vocab_size=269)


@pytest.mark.parametrize("special_tokens", [{"<s>": 3}, {"<unk>": 1}, {"b": 0}])
def test_special_tokens_of_other_ids_are_refused(tmp_path, special_tokens):
    vocab = {"<unk>": 0, "b": 1}
    with pytest.raises(InputError, match="special tokens do not follow the vocabulary"):
        save_tokenizer(FORMAT, tmp_path, vocab, merges=[], special_tokens=special_tokens)
    assert list(tmp_path.iterdir()) == []


# --- the real vocabulary ------------------------------------------------------------------------------------------


def test_pieces_are_those_of_the_published_file(published):
    assert FORMAT.pieces == published["config"]["pattern"]


def test_ids_are_those_of_the_released_model(tekken, tekken_tokenizer_dir):
    assert len(tekken) == 131072
    assert tekken.encode("2.35") == [1050, 1046, 1051, 1053]
    assert tekken.encode(string.digits) == [1048 + digit for digit in range(10)]
    released = {
        "<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12,
        "[IMG_END]": 13,
    }  # fmt: skip
    assert {token: tekken.convert_tokens_to_ids(token) for token in released} == released
    assert [tekken.encode(token) for token in released] == [[i] for i in released.values()]
    assert {tekken.eos_token_id, tekken.bos_token_id, tekken.pad_token_id, tekken.unk_token_id} == {2, 1, 11, 0}
    vocab = json.loads((tekken_tokenizer_dir / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(131072))
    assert sorted(tekken.added_tokens_decoder) == list(range(FIRST_ID))
    assert all(token.special for token in tekken.added_tokens_decoder.values())


def test_every_rank_above_the_bytes_is_one_merge(tekken_tokenizer_dir):
    merges = (tekken_tokenizer_dir / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(merges) == 131072 - FIRST_ID - 256 == 129816
    assert len(set(merges)) == len(merges)


def words_of(ranks: dict[bytes, int]) -> list[str]:
    words = []
    for token in ranks:
        try:
            words.append(token.decode())
        except UnicodeDecodeError:
            continue
    return words


def long_assigned(text: str) -> str:
    """Returns the text without characters of which the two regular expression engines may not know yet."""
    return "".join(character for character in text if unicodedata.ucd_3_2_0.category(character) != "Cn")


def test_ids_are_what_the_published_ranks_give(tekken, published, ranks):
    """Text is cut by the published pattern; a piece is its own token, or its bytes joined by lowest rank."""
    rng, words, pattern = random.Random(1), words_of(ranks), regex.compile(published["config"]["pattern"])
    texts = [*TEXTS, "xqzvkjw 距離を測る ...)\n\n /* */\r\n\t  x", *map(long_assigned, random_texts(1500))]
    texts += ["".join(rng.choices(words, k=12)) for _ in range(1500)]
    texts += [f"{rng.uniform(0, 300):.{rng.randrange(5)}f}{rng.choice(words)}" for _ in range(500)]

    def expected(text: str) -> list[int]:
        pieces = [piece.encode() for piece in pattern.findall(text)]
        assert b"".join(pieces) == text.encode()
        found = [[ranks[piece]] if piece in ranks else bpe.encoded(piece, ranks) for piece in pieces]
        return [FIRST_ID + rank for piece in found for rank in piece]

    found = tekken(texts, add_special_tokens=False)["input_ids"]
    different = [text for text, ids in zip(texts, found, strict=True) if ids != expected(text)]
    assert different == []
    assert sum(map(len, found)) > 50_000
    assert [tekken.decode(ids) for ids in found] == texts


@pytest.mark.parametrize("model_type", ["llava", "pixtral"])
def test_transformers_mends_nothing(tekken, tekken_tokenizer_dir, tmp_path, caplog, model_type):
    """Version 5 looks at config.json for Mistral folders with a wrong pattern, and warns or changes it."""
    folder = shutil.copytree(tekken_tokenizer_dir, tmp_path / "folder")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "4.46.0"}))
    texts = [*TEXTS, *random_texts(20)]
    expected = [tekken.encode(text) for text in texts]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for mend in (None, True) if model_type == "pixtral" else (None,):
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, fix_mistral_regex=mend)
            assert [loaded.encode(text) for text in texts] == expected
    finally:
        logger.removeHandler(caplog.handler)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert model_type == "pixtral" or warned == []
