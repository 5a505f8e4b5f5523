"""The host side against transformers with the real vocabulary: everything here is exact."""

import json
import pickle
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers import vision_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from depthlm_jax.errors import InputError
from depthlm_jax.models.qwen2_5_vl.config import PREPROCESSOR
from depthlm_jax.models.qwen2_5_vl.processor import Processor

SIZES = tiny.sizes(
    heads=4, kv_heads=2, mrope_section=[2, 3, 3], layers=1, inner=32, tied=True, depth=1, full=[], vision_heads=1,
    vision_head_width=8, vision_inner=8, patch=14, window=112,
)  # fmt: skip
SIZES |= {
    "vocab_size": 151936, "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}  # fmt: skip
GRIDS = [[(3, 5)], [(4, 4)], [(9, 13)], [(6, 4), (5, 11)], [(1, 1), (8, 2)], []]
QUESTION = "The image is 1204 × 876 px, f = 1000. How far — in metres — is the point at 12.5% / 7,25?\nThink first."


@pytest.fixture(scope="module")
def processor(qwen_tokenizer_dir, tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("qwen") / "folder"
    shutil.copytree(qwen_tokenizer_dir, folder)
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return Processor(folder)


@pytest.fixture(scope="module")
def hf_images(processor):
    return tiny.hf_image_processor(processor.folder)


def conversation(processor: Processor, grids, question: str, answer: str | None, header_after: bool) -> np.ndarray:
    """Returns the token ids of the whole conversation as one text, image tokens multiplied in the text."""
    content = [{"type": "image"}] * len(grids) + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header_after)
    for rows, columns in grids:  # as Qwen2_5_VLProcessor does
        text = text.replace("<|image_pad|>", "<placeholder>" * (rows * columns), 1)
    text = text.replace("<placeholder>", "<|image_pad|>")
    if not header_after:
        text = text.removesuffix("\n")  # the template's newline after the last end of turn is not learned
    return np.array(processor.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("grids", GRIDS)
def test_tokens(processor, grids):
    images = tiny.random_images(processor.config, grids, seed=0)
    for answer in (tiny.ANSWER, "12.03", None):
        for loss_on in ("answer", "official"):
            sample = processor.encode(images, [(QUESTION, answer)], loss_on=loss_on)
            expected = conversation(processor, grids, QUESTION, answer, answer is None or loss_on == "official")
            np.testing.assert_array_equal(sample.tokens_T, expected)
    assert (sample.tokens_T == 151655).sum() == sum(rows * columns for rows, columns in grids)


@pytest.mark.parametrize("grids", GRIDS)
def test_positions(processor, grids):
    with torch.device("meta"):
        model = Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig.from_dict(SIZES))
    sample = processor.encode(tiny.random_images(processor.config, grids, seed=0), [(QUESTION, tiny.ANSWER)])
    ids = torch.tensor(sample.tokens_T[None])
    grid = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]).reshape(-1, 3)
    expected, _ = model.get_rope_index(ids, (ids == 151655).int(), image_grid_thw=grid)
    np.testing.assert_array_equal(sample.positions_TZ, expected[:, 0].T)


@pytest.mark.parametrize("grids", GRIDS[:-1])
def test_patches(processor, hf_images, grids):
    """Same pixels, same places, same windows; the slots beyond an image's edge are empty."""
    images = tiny.random_images(processor.config, grids, seed=0)
    sample = processor.encode(images, [(QUESTION, tiny.ANSWER)])
    raw = hf_images(images, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt")
    grid = raw["image_grid_thw"]
    assert grid.tolist() == [[1, 2 * rows, 2 * columns] for rows, columns in grids]
    frames = raw["pixel_values"].numpy().reshape(-1, 3, 2, 196)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    raster_M4C = frames[:, :, 0].reshape(-1, 4, 588)
    index, window_ends = vision_utils.get_vision_window_index(grid, 2, 112, 14)

    valid_P = sample.image_id_P > 0
    assert sample.patches_PC.dtype == np.uint8
    np.testing.assert_array_equal(sample.patches_PC[valid_P], raster_M4C[index].reshape(-1, 588))
    assert not sample.patches_PC[~valid_P].any()
    np.testing.assert_array_equal(valid_P.reshape(-1, 64).sum(1), np.diff(window_ends))
    places = vision_utils.get_vision_position_ids(grid, 2).numpy().reshape(-1, 4, 2)[index].reshape(-1, 2)
    np.testing.assert_array_equal(sample.patch_rc_P2[valid_P], places)
    numbers = np.repeat(np.arange(len(grids)) + 1, [4 * rows * columns for rows, columns in grids])
    np.testing.assert_array_equal(sample.image_id_P[valid_P], numbers)
    seen_M = sample.vision_index_T[sample.tokens_T == 151655]  # what each image token stands for
    np.testing.assert_array_equal(sample.patches_PC.reshape(-1, 4, 588)[seen_M], raster_M4C)
    assert (sample.vision_index_T[sample.tokens_T != 151655] == -1).all()


def test_on_grid_images_are_not_resized_there_either(processor, hf_images):
    images = tiny.random_images(processor.config, [(2, 3), (43, 50)], seed=0)
    with_resize, without = (hf_images(images, do_resize=on, return_tensors="np") for on in (True, False))
    np.testing.assert_array_equal(with_resize["pixel_values"], without["pixel_values"])


def supervised(processor: Processor, sample) -> str:
    np.testing.assert_array_equal(sample.targets_A, sample.tokens_T[sample.answer_index_A + 1])
    return processor.tokenizer.decode(sample.targets_A)


def test_loss_on_answer(processor):
    sample = processor.encode(tiny.random_images(processor.config, [(3, 5)], 0), [(QUESTION, "12.03")])
    assert supervised(processor, sample) == "12.03<|im_end|>"
    assert sample.answer_index_A[-1] == len(sample.tokens_T) - 2
    assert (sample.weights_A == 1).all()


def test_loss_on_official(processor):
    sample = processor.encode(
        tiny.random_images(processor.config, [(3, 5), (2, 2)], 0), [(QUESTION, "12.03")], loss_on="official"
    )
    is_text_T = sample.tokens_T != 151655
    is_text_T[0] = False
    np.testing.assert_array_equal(sample.answer_index_A + 1, np.flatnonzero(is_text_T))
    text = supervised(processor, sample)
    assert text.startswith("system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert text.count("<|vision_start|><|vision_end|>") == 2
    assert text.endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n12.03<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("loss_on", ["answer", "official"])
def test_digits_of_the_answer_alone_weigh_more(processor, loss_on):
    sample = processor.encode([], [("Is it 7 m?", "No, 12.03 m")], loss_on=loss_on, digit_weight=3.0)
    heavy = processor.tokenizer.convert_ids_to_tokens(sample.targets_A[sample.weights_A == 3])
    assert heavy == ["1", "2", "0", "3"]
    assert set(sample.weights_A) == {1.0, 3.0}


def test_a_prompt_waits_for_its_next_token(processor):
    sample = processor.encode([], [(QUESTION, None)])
    assert sample.answer_index_A.tolist() == [len(sample.tokens_T) - 1]
    assert processor.tokenizer.decode(sample.tokens_T).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("begin", ["", "<think> The point is around ", tiny.ANSWER[: tiny.ANSWER.rindex("2.35")]])
@pytest.mark.parametrize("layout", ["independent", "conversation"])
def test_the_beginning_of_an_answer_is_that_of_a_whole_one(processor, begin, layout):
    images, before = tiny.random_images(processor.config, [(3, 5), (2, 2)], 0), [("Is it near?", "It is 0.25 m.")]
    for turns in ([], before):
        prompt = processor.encode(images, [*turns, (QUESTION, None)], layout=layout, begin=begin)
        whole = processor.encode(images, [*turns, (QUESTION, f"{begin}2.35 m")], layout=layout)
        length = len(prompt.tokens_T)
        for field in ("tokens_T", "positions_TZ", "vision_index_T", "branch_T"):
            np.testing.assert_array_equal(getattr(prompt, field), getattr(whole, field)[:length], err_msg=field)
        assert processor.tokenizer.decode(whole.tokens_T[length:]) == "2.35 m<|im_end|>"
        assert processor.tokenizer.decode(prompt.tokens_T).endswith(f"assistant\n{begin}")
        assert prompt.answer_index_A[-1] == length - 1


@pytest.mark.parametrize("begin", ["It is  ", "<think>\t "])
def test_a_beginning_that_cannot_be_cut_off(processor, begin):
    """A number takes the last of several spaces away from the others."""
    with pytest.raises(InputError) as error:
        processor.encode([], [(QUESTION, None)], begin=begin)
    for part in ("cannot be cut off before a number", repr(begin), "do not change when a digit follows"):
        assert part in str(error.value)


def test_decode_stops_at_the_end_of_turn(processor):
    tokens = processor.tokenizer("2.35 m<|im_end|>\nand more")["input_ids"]
    assert processor.decode(tokens) == "2.35 m"
    assert processor.decode(tokens[:3]) == "2.3"


TURNS = [(f"How far is point {number}?", f"It is {number}.25 m.") for number in range(1, 4)]


@pytest.mark.parametrize("loss_on", ["answer", "official"])
def test_a_conversation_is_the_templates(processor, loss_on):
    images = tiny.random_images(processor.config, [(3, 5), (2, 4)], 0)
    sample = processor.encode(images, TURNS, layout="conversation", loss_on=loss_on)
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": TURNS[0][0]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": TURNS[0][1]}]
    for question, answer in TURNS[1:]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    for count in (15, 8):
        text = text.replace("<|image_pad|>", "<placeholder>" * count, 1)
    text = text.replace("<placeholder>", "<|image_pad|>").removesuffix("\n")
    text += "\n<|im_start|>assistant\n" if loss_on == "official" else ""
    np.testing.assert_array_equal(sample.tokens_T, processor.tokenizer(text)["input_ids"])
    assert not sample.branch_T.any()
    said = supervised(processor, sample)
    if loss_on == "answer":
        assert said == "".join(f"{answer}<|im_end|>" for _, answer in TURNS)
    assert (np.diff(sample.positions_TZ.max(axis=1)) <= 1).all()


def test_independent_questions_are_single_ones_that_share_their_images(processor):
    images = tiny.random_images(processor.config, [(3, 5), (2, 4)], 0)
    together = processor.encode(images, TURNS, digit_weight=2.0)
    assert set(together.branch_T) == {0, 1, 2, 3}
    answers = 0
    for number, turn in enumerate(TURNS, start=1):
        alone = processor.encode(images, [turn], digit_weight=2.0)
        seen_T = (together.branch_T == 0) | (together.branch_T == number)
        for field in ("tokens_T", "positions_TZ", "vision_index_T"):
            np.testing.assert_array_equal(getattr(together, field)[seen_T], getattr(alone, field), err_msg=field)
        mine_A = together.branch_T[together.answer_index_A] == number
        place_T = np.cumsum(seen_T) - 1  # where a token stands once the other questions are left out
        np.testing.assert_array_equal(place_T[together.answer_index_A[mine_A]], alone.answer_index_A)
        np.testing.assert_array_equal(together.targets_A[mine_A], alone.targets_A)
        np.testing.assert_array_equal(together.weights_A[mine_A], alone.weights_A)
        answers += len(alone.targets_A)
        np.testing.assert_array_equal(together.patches_PC, alone.patches_PC)
    assert len(together.targets_A) == answers


@pytest.mark.parametrize("layout", ["independent", "conversation"])
@pytest.mark.parametrize("loss_on", ["answer", "official"])
@pytest.mark.parametrize("grids", [[(3, 5)], [(9, 13), (2, 2)]])
def test_sizes_are_known_without_images(processor, layout, loss_on, grids):
    for turns in (TURNS[:1], TURNS):
        images = tiny.random_images(processor.config, grids, 0)
        sample = processor.encode(images, turns, layout=layout, loss_on=loss_on)
        tokens, answers = processor.text_size(len(grids), turns, layout, loss_on)
        rows, columns = np.array(grids).T
        image_tokens, slots, words = processor.image_size(columns * 28, rows * 28)
        assert not words.any()
        assert len(sample.tokens_T) == tokens + image_tokens.sum()
        assert len(sample.patches_PC) == slots.sum()
        assert len(sample.targets_A) == answers


def test_a_processor_goes_to_another_process(processor):
    again = pickle.loads(pickle.dumps(processor))
    one, other = (each.encode([], TURNS) for each in (processor, again))
    np.testing.assert_array_equal(one.tokens_T, other.tokens_T)


def test_a_template_that_rewrites_earlier_turns(processor, monkeypatch):
    template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    monkeypatch.setattr(processor.tokenizer, "chat_template", template)
    with pytest.raises(InputError, match=r"an earlier turn changes when another follows[\s\S]*layout=independent"):
        processor.encode([], TURNS, layout="conversation")


def test_image_off_the_grid(processor):
    with pytest.raises(InputError) as error:
        processor.encode([np.zeros((56, 85, 3), np.uint8)], [(QUESTION, None)])
    for part in ("not on the patch grid", "85×56 px", "multiples of 28 px"):
        assert part in str(error.value)


@pytest.mark.parametrize("question, answer", [("What is <|image_pad|>?", None), ("What?", "An <|image_pad|>")])
def test_image_token_in_a_text(processor, question, answer):
    with pytest.raises(InputError, match=r"(?s)do not match.*2 image tokens for 1 images.*remove image tokens"):
        processor.encode([np.zeros((56, 84, 3), np.uint8)], [(question, answer)])


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_incomplete_folder(processor, tmp_path, name):
    folder = tmp_path / "folder"
    shutil.copytree(processor.tokenizer.name_or_path, folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"(?s){name}: cannot be read.*complete Hugging Face folder"):
        Processor(folder)
