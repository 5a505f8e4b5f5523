from depthlm_jax.data.official import official_eval_indices


def test_indices_are_those_of_the_release():
    assert official_eval_indices(6, 100) == [81, 14, 3, 94, 35, 31]


def test_more_samples_start_with_the_same_indices():
    indices = official_eval_indices(10_000, 100)
    assert indices[:50] == official_eval_indices(50, 100)
    assert set(indices) == set(range(100))
    assert official_eval_indices(50, 100, seed=43) != indices[:50]
