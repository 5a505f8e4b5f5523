"""The host side against transformers with the real vocabulary: everything here is exact."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import tiny

from depthlm_jax.errors import InputError
from depthlm_jax.models.pixtral.config import PREPROCESSOR
from depthlm_jax.models.pixtral.processor import Processor
from depthlm_jax.models.pixtral.tokenizer import FORMAT
from depthlm_jax.models.tokenizer import build_small_tokenizer

SIZES = tiny.pixtral_sizes(
    heads=4, kv_heads=2, head_dim=8, hidden=32, layers=1, inner=32, depth=1, vision_heads=1, vision_head_width=8,
    vision_inner=8, patch=16,
)  # fmt: skip
SIZES |= {"image_token_index": 10, "text_config": SIZES["text_config"] | {"vocab_size": 131072}}
IMAGE, ROW_END, IMAGE_END = 10, 12, 13
GRIDS = [[(3, 5)], [(4, 4)], [(9, 13)], [(6, 4), (5, 11)], [(1, 1), (8, 1), (1, 8)], []]
QUESTION = "The image is 1204 × 876 px, f = 1000. How far — in metres — is the point at 12.5% / 7,25?\nThink first."


@pytest.fixture(scope="module")
def processor(tekken_tokenizer_dir, tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("pixtral") / "folder"
    shutil.copytree(tekken_tokenizer_dir, folder)
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return Processor(folder)


@pytest.fixture(scope="module")
def hf_images(processor):
    return tiny.hf_image_processor(processor.folder)


def unfolded(text: str, grids) -> str:
    """Returns the text with each image's token replaced, as PixtralProcessor does; it needs torchvision."""
    parts = text.split("[IMG]")
    images = ["[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]" for rows, columns in grids]
    return "".join(part + image for part, image in zip(parts, [*images, ""], strict=True))


def conversation(processor: Processor, grids, turns) -> np.ndarray:
    """Returns the token ids of the whole conversation as one text."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        images = [{"type": "image"}] * (len(grids) if number == 0 else 0)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    return np.array(processor.tokenizer(unfolded(text, grids), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("grids", GRIDS)
def test_tokens(processor, grids):
    images = tiny.random_images(processor.config, grids, seed=0)
    for answer in (tiny.ANSWER, "12.03", None):
        for loss_on in ("answer", "official"):
            sample = processor.encode(images, [(QUESTION, answer)], loss_on=loss_on)
            np.testing.assert_array_equal(sample.tokens_T, conversation(processor, grids, [(QUESTION, answer)]))
    counts = [(sample.tokens_T == token).sum() for token in (IMAGE, ROW_END, IMAGE_END)]
    assert counts == [sum(r * c for r, c in grids), sum(r - 1 for r, _ in grids), len(grids)]
    assert sample.tokens_T[:2].tolist() == [1, 3]  # one <s>, then [INST]


@pytest.mark.parametrize("grids", GRIDS)
def test_positions(processor, grids):
    sample = processor.encode(tiny.random_images(processor.config, grids, seed=0), [(QUESTION, tiny.ANSWER)])
    for axis in range(3):
        np.testing.assert_array_equal(sample.positions_TZ[:, axis], np.arange(len(sample.tokens_T)))


@pytest.mark.parametrize("grids", GRIDS[:-1])
def test_patches(processor, hf_images, grids):
    """Same pixels in the same places, raster order; each image token stands for its own patch."""
    images = tiny.random_images(processor.config, grids, seed=0)
    sample = processor.encode(images, [(QUESTION, tiny.ANSWER)])
    raw = hf_images(images, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np")
    assert raw["image_sizes"].tolist() == [[16 * rows, 16 * columns] for rows, columns in grids]
    patches, places, numbers = [], [], []
    for number, (image, (rows, columns)) in enumerate(zip(raw["pixel_values"], grids, strict=True), start=1):
        for row in range(rows):
            for column in range(columns):
                patches.append(image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].ravel())
                places.append((row, column))
                numbers.append(number)
    assert sample.patches_PC.dtype == np.uint8
    np.testing.assert_array_equal(sample.patches_PC, np.stack(patches))
    np.testing.assert_array_equal(sample.patch_rc_P2, places)
    np.testing.assert_array_equal(sample.image_id_P, numbers)
    is_image_T = sample.tokens_T == IMAGE
    np.testing.assert_array_equal(sample.vision_index_T[is_image_T], np.arange(len(patches)))
    assert (sample.vision_index_T[~is_image_T] == -1).all()


def test_on_grid_images_are_not_resized_there_either(processor, hf_images):
    for grids in ([(2, 3)], [(64, 50)], [(1, 64)]):
        images = tiny.random_images(processor.config, grids, seed=0)
        with_resize, without = (hf_images(images, do_resize=on, return_tensors="np") for on in (True, False))
        np.testing.assert_array_equal(with_resize["pixel_values"], without["pixel_values"])


def supervised(processor: Processor, sample) -> str:
    np.testing.assert_array_equal(sample.targets_A, sample.tokens_T[sample.answer_index_A + 1])
    return processor.tokenizer.decode(sample.targets_A)


def test_loss_on_answer(processor):
    sample = processor.encode(tiny.random_images(processor.config, [(3, 5)], 0), [(QUESTION, "12.03")])
    assert supervised(processor, sample) == "12.03</s>"
    assert sample.answer_index_A[-1] == len(sample.tokens_T) - 2
    assert (sample.weights_A == 1).all()


def test_loss_on_official(processor):
    """Every text token but the first; the ends of rows and images are such."""
    sample = processor.encode(
        tiny.random_images(processor.config, [(3, 5), (2, 2)], 0), [(QUESTION, "12.03")], loss_on="official"
    )
    is_text_T = sample.tokens_T != IMAGE
    is_text_T[0] = False
    np.testing.assert_array_equal(sample.answer_index_A + 1, np.flatnonzero(is_text_T))
    ends = "[IMG_BREAK][IMG_BREAK][IMG_END][IMG_BREAK][IMG_END]"
    assert supervised(processor, sample) == f"[INST]{ends}{QUESTION}[/INST]12.03</s>"


@pytest.mark.parametrize("loss_on", ["answer", "official"])
def test_digits_of_the_answer_alone_weigh_more(processor, loss_on):
    images = tiny.random_images(processor.config, [(2, 3)], 0)
    sample = processor.encode(images, [("Is it 7 m?", "No, 12.03 m")], loss_on=loss_on, digit_weight=3.0)
    heavy = processor.tokenizer.convert_ids_to_tokens(sample.targets_A[sample.weights_A == 3])
    assert heavy == ["1", "2", "0", "3"]
    assert set(sample.weights_A) == {1.0, 3.0}


def test_a_prompt_waits_for_its_next_token(processor):
    sample = processor.encode([], [(QUESTION, None)])
    assert sample.answer_index_A.tolist() == [len(sample.tokens_T) - 1]
    assert processor.tokenizer.decode(sample.tokens_T).endswith("Think first.[/INST]")


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
        assert processor.tokenizer.decode(whole.tokens_T[length:]) == "2.35 m</s>"
        assert processor.tokenizer.decode(prompt.tokens_T).endswith(f"[/INST]{begin}")
        assert prompt.answer_index_A[-1] == length - 1


@pytest.mark.parametrize("begin", ["It is  ", "<think>\t "])
def test_a_beginning_that_cannot_be_cut_off(processor, begin):
    """A number takes the last of several spaces away from the others."""
    with pytest.raises(InputError) as error:
        processor.encode([], [(QUESTION, None)], begin=begin)
    for part in ("cannot be cut off before a number", repr(begin), "do not change when a digit follows"):
        assert part in str(error.value)


def test_decode_stops_at_the_end_of_turn(processor):
    tokens = processor.tokenizer("2.35 m</s>and more", add_special_tokens=False)["input_ids"]
    assert processor.decode(tokens) == "2.35 m"
    assert processor.decode(tokens[:3]) == "2.3"


TURNS = [(f"How far is point {number}?", f"It is {number}.25 m.") for number in range(1, 4)]


@pytest.mark.parametrize("loss_on", ["answer", "official"])
def test_a_conversation_is_the_templates(processor, loss_on):
    grids = [(3, 5), (2, 4)]
    images = tiny.random_images(processor.config, grids, 0)
    sample = processor.encode(images, TURNS, layout="conversation", loss_on=loss_on)
    np.testing.assert_array_equal(sample.tokens_T, conversation(processor, grids, TURNS))
    np.testing.assert_array_equal(sample.positions_TZ[:, 0], np.arange(len(sample.tokens_T)))
    assert not sample.branch_T.any()
    said = supervised(processor, sample)
    if loss_on == "answer":
        assert said == "".join(f"{answer}</s>" for _, answer in TURNS)
    else:
        assert said.endswith("[INST]How far is point 3?[/INST]It is 3.25 m.</s>")


def test_independent_questions_are_single_ones_that_share_their_images(processor):
    images = tiny.random_images(processor.config, [(3, 5), (2, 4)], 0)
    together = processor.encode(images, TURNS, digit_weight=2.0)
    assert set(together.branch_T) == {0, 1, 2, 3}
    ends_T = np.isin(together.tokens_T, [IMAGE, ROW_END, IMAGE_END])
    assert not together.branch_T[ends_T].any()
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
@pytest.mark.parametrize("grids", [[(3, 5)], [(9, 13), (2, 2)], [(1, 1), (7, 1)]])
def test_sizes_are_known_without_images(processor, layout, loss_on, grids):
    for turns in (TURNS[:1], TURNS):
        images = tiny.random_images(processor.config, grids, 0)
        sample = processor.encode(images, turns, layout=layout, loss_on=loss_on)
        tokens, answers = processor.text_size(len(grids), turns, layout, loss_on)
        rows, columns = np.array(grids).T
        image_tokens, slots, words = processor.image_size(columns * 16, rows * 16)
        assert words.tolist() == rows.tolist()
        assert len(sample.tokens_T) == tokens + image_tokens.sum()
        assert len(sample.patches_PC) == slots.sum()
        assert len(sample.targets_A) == answers + (words.sum() if loss_on == "official" else 0)


def test_a_processor_goes_to_another_process(processor):
    again = pickle.loads(pickle.dumps(processor))
    images = tiny.random_images(processor.config, [(3, 5), (2, 4)], 0)
    one, other = (dataclasses.asdict(each.encode(images, TURNS)) for each in (processor, again))
    for field, value in one.items():
        np.testing.assert_array_equal(other[field], value, err_msg=field)


@pytest.mark.parametrize("height, width", [(32, 49), (40, 48), (0, 16)])
def test_image_off_the_grid(processor, height, width):
    with pytest.raises(InputError) as error:
        processor.encode([np.zeros((height, width, 3), np.uint8)], [(QUESTION, None)])
    for part in ("not on the patch grid", f"{width}×{height} px", "multiples of 16 px"):
        assert part in str(error.value)


@pytest.mark.parametrize("question, answer", [("What is [IMG]?", None), ("What?", "An [IMG]")])
def test_image_token_in_a_text(processor, question, answer):
    with pytest.raises(InputError, match=r"(?s)do not match.*2 image tokens for 1 images.*remove image tokens"):
        processor.encode([np.zeros((32, 48, 3), np.uint8)], [(question, answer)])


@pytest.mark.parametrize("missing", ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
def test_a_tokenizer_without_the_tokens_of_images(processor, tmp_path, missing):
    others = tuple(token for token in FORMAT.special_tokens if token != missing)
    build_small_tokenizer(dataclasses.replace(FORMAT, special_tokens=others), tmp_path, [QUESTION], 400)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(processor.folder / name, tmp_path / name)
    with pytest.raises(InputError) as error:
        Processor(tmp_path)
    for part in (f"the tokenizer has no token '{missing}'", str(tmp_path), "belong to this model"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_incomplete_folder(processor, tmp_path, name):
    folder = tmp_path / "folder"
    shutil.copytree(processor.folder, folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"(?s){name}: cannot be read.*complete Hugging Face folder"):
        Processor(folder)


def test_a_template_that_knows_text_by_its_older_name(processor, monkeypatch):
    ours = processor.encode([], [(QUESTION, "2.35")]).tokens_T
    older = processor.tokenizer.chat_template.replace("item['text']", "item['content']")
    monkeypatch.setattr(processor.tokenizer, "chat_template", older)
    np.testing.assert_array_equal(processor.encode([], [(QUESTION, "2.35")]).tokens_T, ours)
    monkeypatch.setattr(processor.tokenizer, "chat_template", older.replace("item['content']", "item['words']"))
    with pytest.raises(InputError, match="chat template leaves out the question"):
        processor.encode([], [(QUESTION, "2.35")])
