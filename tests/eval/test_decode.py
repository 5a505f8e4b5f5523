"""Decoding with the cache against the plain way: the whole prompt again for every token."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from depthlm_jax.eval import decode

NEW = 8


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return tiny.build(next(iter(tiny.MODELS.values())), tmp_path_factory.mktemp("decode"))


@pytest.fixture(scope="module")
def prompts(case):
    """Two prompts of different lengths with images of different sizes, one a row, right padded."""
    grids = ([(3, 5)], [(4, 2), (2, 3)])
    return [tiny.example(case, grid, seed, None) for seed, grid in enumerate(grids)]


def plain(case, example, count: int) -> list[int]:
    """Returns greedy tokens of transformers, without its cache."""
    return case.hf_model.generate(
        **example.torch_inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=False
    )[0, -count:].tolist()


def batch_of(case, prompts) -> dict:
    return tiny.pack_rows(case, [[prompt.sample] for prompt in prompts])


def test_tokens_are_those_of_plain_decoding(case, prompts):
    greedy = decode.make_greedy(case.network, jnp.float32, NEW, stop_tokens=[-1])
    said = np.asarray(greedy(case.parameters, batch_of(case, prompts)))
    assert said.tolist() == [plain(case, prompt, NEW) for prompt in prompts]


def test_a_row_ends_at_its_stop_token_and_others_go_on(case, prompts):
    whole = [plain(case, prompt, NEW) for prompt in prompts]
    stop = whole[0][2]
    said = np.asarray(
        decode.make_greedy(case.network, jnp.float32, NEW, [stop])(case.parameters, batch_of(case, prompts))
    )
    first = whole[0].index(stop)
    assert said[0].tolist() == whole[0][: first + 1] + [stop] * (NEW - first - 1)
    if stop not in whole[1]:
        assert said[1].tolist() == whole[1]
    assert decode.cut(said[0], [stop]) == whole[0][: first + 1]


def test_cut_without_a_stop_token_keeps_all():
    assert decode.cut(np.array([4, 5, 6]), [9]) == [4, 5, 6]
    assert decode.cut(np.array([4, 9, 9]), [9, 8]) == [4, 9]
