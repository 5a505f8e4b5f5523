import random
import string
import unicodedata

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from depthlm_jax.errors import InputError
from depthlm_jax.models.qwen2_5_vl.tokenizer import FORMAT
from depthlm_jax.models.tokenizer import build_small_tokenizer, save_tokenizer

TEXTS = [
    "Given this image, how far is the point pointed by the red arrow from the camera?",
    "<think> The point is around 2.35 meters away from the camera. </think>\n\n<answer> 2.35 </answer>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "made" / "on the way"
    build_small_tokenizer(FORMAT, folder, TEXTS, vocab_size=320)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def character() -> str:
        below_surrogates, above = chr(rng.randrange(0xD800)), chr(rng.randrange(0xE000, 0x110000))
        return rng.choice([rng.choice(string.printable), below_surrogates, above])

    return ["".join(character() for _ in range(40)) for _ in range(count)]


def test_loads_as_qwen2(tokenizer):
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")  # …Fast in transformers 4
    assert len(tokenizer) == 320
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_any_text_comes_back_in_composed_form(tokenizer):
    texts = [*TEXTS, "  two  spaces , a comma", "日本語 🙂\r\n\t", "e\u0301", *random_texts(200)]
    back = [tokenizer.decode(tokenizer.encode(text)) for text in texts]
    assert back == [unicodedata.normalize("NFC", text) for text in texts]


def test_what_was_learned_is_shorter_than_bytes(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_each_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("12.50 meters 3")[:5] == ["1", "2", ".", "5", "0"]
    ids = [tokenizer.encode(digit) for digit in string.digits]
    assert [len(i) for i in ids] == [1] * 10
    assert tokenizer.encode(string.digits) == [i[0] for i in ids]


def test_special_tokens_have_the_ids_of_their_order(tokenizer):
    assert [tokenizer.encode(token) for token in FORMAT.special_tokens] == [
        [i] for i in range(len(FORMAT.special_tokens))
    ]
    assert tokenizer.encode("".join(FORMAT.special_tokens)) == list(range(len(FORMAT.special_tokens)))
    assert tokenizer.decode(tokenizer.encode("<|im_start|>a<|image_pad|><|im_end|>"), skip_special_tokens=True) == "a"


def test_turns_are_laid_out_as_qwen_does(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How far?"}]},
        {"role": "assistant", "content": "<answer> 2.35 </answer>"},
    ]
    question = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How far?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == question
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert answered == question + "<answer> 2.35 </answer><|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(answered)


def test_a_given_system_turn_replaces_the_default(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    laid_out = tokenizer.apply_chat_template(messages, tokenize=False)
    assert laid_out == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


def test_an_unknown_content_item_is_named(tokenizer):
    with pytest.raises(TemplateError, match="a content item is an image or a text, not: video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def test_same_texts_give_the_same_files(folder, tmp_path):
    build_small_tokenizer(FORMAT, tmp_path, TEXTS, vocab_size=320)
    names = ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert [(tmp_path / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]


def test_a_roundtrip_through_transformers_changes_no_id(tokenizer, tmp_path):
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
    with pytest.raises(InputError, match="found: +263\n.*at least 264: 8 special tokens and 256 bytes"):
        build_small_tokenizer(FORMAT, tmp_path, TEXTS, vocab_size=263)


def test_special_tokens_that_leave_a_gap_are_refused(tmp_path):
    with pytest.raises(InputError, match="special tokens do not follow the vocabulary"):
        save_tokenizer(FORMAT, tmp_path, vocab={"a": 0, "b": 1}, merges=[], special_tokens={"<|end|>": 3})
