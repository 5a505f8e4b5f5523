"""Decoding with the cache against the plain way: the whole prompt again for every token."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from depthlm_jax.eval import decode

NEW = 8
BEGIN = "<think> The point is around "
LETTERS = "m7.4013x52968"  # a vocabulary of one letter a token, its digits in no order
NUMBERS = decode.Numbers([LETTERS.index(digit) for digit in "0123456789"], LETTERS.index("."), may_be_zero=False)
PROMPTS = 5, 3  # tokens of the rows of a table network


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return tiny.build(next(iter(tiny.MODELS.values())), tmp_path_factory.mktemp("decode"))


def prompts_of(case, begin: str):
    """Returns two prompts of different lengths with images of different sizes, to be continued after `begin`."""
    examples = []
    for seed, grids in enumerate(([(3, 5)], [(4, 2), (2, 3)])):
        images = tiny.random_images(case.config, grids, seed)
        sample = case.processor.encode(images, [(f"{tiny.QUESTION} {seed} times", None)], begin=begin)
        examples.append(tiny.Example(images, sample, tiny.torch_inputs(case, sample, images)))
    return examples


@pytest.fixture(scope="module")
def prompts(case):
    return prompts_of(case, "")


@pytest.fixture(scope="module")
def begun(case):
    return prompts_of(case, BEGIN)


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


def test_the_beginning_of_an_answer_stands_before_what_is_decoded(case, prompts, begun):
    for prompt, longer in zip(prompts, begun, strict=True):
        length = len(prompt.sample.tokens_T)
        assert longer.sample.tokens_T[:length].tolist() == prompt.sample.tokens_T.tolist()
        assert case.processor.decode(longer.sample.tokens_T[length:].tolist()) == BEGIN


def test_a_number_is_that_of_plain_decoding(case, begun):
    """The tokens that stand for digits and the point are those that this model says: rows end at different steps."""
    whole = [plain(case, prompt, NEW) for prompt in begun]
    said_first = list(dict.fromkeys(whole[0][:5] + whole[1][:2]))
    spare = [token for token in range(200) if token not in {*whole[0], *whole[1]}]
    numbers = decode.Numbers((said_first[:1] + said_first[2:] + spare)[:10], said_first[1], may_be_zero=False)
    decoder = decode.make_decoder(case.network, jnp.float32, NEW, numbers)
    tokens_BG = np.asarray(decoder(case.parameters, batch_of(case, begun)).tokens_BG)
    for said_G, tokens in zip(tokens_BG, whole, strict=True):
        number, ended = decode.cut_number(said_G, numbers)
        assert number == tokens[: len(number)] and len(number) > 0
        rest = tokens[len(number) :]
        assert ended == bool(rest)
        if rest:
            assert rest[0] not in numbers.digits
            assert rest[0] != numbers.point or numbers.point in number


def test_cut_number():
    def cut(text: str) -> tuple[str, bool]:
        number, ended = decode.cut_number(np.array([LETTERS.index(letter) for letter in text]), NUMBERS)
        return "".join(LETTERS[token] for token in number), ended

    assert cut("12.5m7") == ("12.5", True)
    assert cut("1.5.5m") == ("1.5", True)
    assert cut(".5xxx") == (".5", True)
    assert cut("m2.5") == ("", True)
    assert cut("12.5") == ("12.5", False)


def symbols_that_are_likely(case, prompts) -> decode.Numbers:
    """Returns, as digits and point, the tokens that the model is most likely to say first."""
    logits_BAV = np.asarray(jax.jit(case.network.logits)(case.parameters, batch_of(case, prompts)))
    likely = np.argsort(-logits_BAV[:, 0].max(axis=0))[: decode.POINT + 1].tolist()
    return decode.Numbers(likely[1:], likely[0], may_be_zero=False)


def continued(case, prompt, continuations_NL: np.ndarray) -> np.ndarray:
    """Returns log probabilities [N, L + 1, V] of transformers: after the prompt and after each token that follows."""
    parts = []
    for part_NL in np.array_split(continuations_NL, -(-len(continuations_NL) // 150)):
        count, length = part_NL.shape
        seen = {name: torch.cat([tensor] * count) for name, tensor in prompt.torch_inputs.items()}
        for name, more in (("input_ids", torch.tensor(part_NL)), ("mm_token_type_ids", torch.zeros(count, length))):
            seen[name] = torch.cat([seen[name], more.to(seen[name].dtype)], dim=1)
        seen["attention_mask"] = torch.ones_like(seen["input_ids"])
        with torch.no_grad():
            logits = case.hf_model(**seen).logits[:, -length - 1 :]
        parts.append(torch.log_softmax(logits.double(), dim=-1).numpy())
    return np.concatenate(parts)


def enumerate_numbers(case, prompt, numbers: decode.Numbers, longest: int) -> tuple[float, float]:
    """Returns the mean and the probability of all numbers of up to `longest` tokens, one after the other."""
    symbols = [*numbers.digits, numbers.point]
    every = list(itertools.product(range(len(symbols)), repeat=longest))
    log_p = continued(case, prompt, np.array(symbols)[np.array(every)])
    mass = total = 0.0
    seen = set()
    for row, chosen in enumerate(every):
        for length in range(1, longest + 1):
            text = "".join("0123456789."[symbol] for symbol in chosen[:length])
            if text in seen or text.count(".") > 1 or text == "." or float(text) == 0:
                continue
            seen.add(text)
            log_prefix = sum(log_p[row, i, symbols[symbol]] for i, symbol in enumerate(chosen[:length]))
            goes_on = symbols if "." not in text else numbers.digits
            p = math.exp(log_prefix) * (1 - np.exp(log_p[row, length, goes_on]).sum())
            mass, total = mass + p, total + p * float(text)
    return total / mass, mass


def test_expectation_is_that_of_all_numbers_one_by_one(case, begun, monkeypatch):
    monkeypatch.setattr(decode, "NUMBER_TOKENS", 3)
    monkeypatch.setattr(decode, "BEAMS", 1300)  # 1000 numbers of three digits, 300 with a point
    monkeypatch.setattr(decode, "NEGLIGIBLE", 0.0)
    numbers = symbols_that_are_likely(case, begun)
    decoder = decode.make_decoder(case.network, jnp.float32, NEW, numbers, expectation=True)
    decoded = decoder(case.parameters, batch_of(case, begun))
    for row, prompt in enumerate(begun):
        expected, mass = enumerate_numbers(case, prompt, numbers, longest=3)
        assert mass > 0.1
        assert float(decoded.mass_B[row]) == pytest.approx(mass, rel=1e-4)
        assert float(decoded.expected_B[row]) == pytest.approx(expected, rel=1e-4)


def test_expectation_does_not_depend_on_the_neighbour(case, begun):
    numbers = symbols_that_are_likely(case, begun)
    decoder = decode.make_decoder(case.network, jnp.float32, NEW, numbers, expectation=True)
    both = decoder(case.parameters, batch_of(case, begun))
    for row in (0, 1):
        alone = decoder(case.parameters, batch_of(case, [begun[row]] * 2))
        assert alone.tokens_BG[0].tolist() == both.tokens_BG[row].tolist()
        assert float(alone.expected_B[0]) == pytest.approx(float(both.expected_B[row]), rel=1e-4)
        assert float(alone.mass_B[0]) == pytest.approx(float(both.mass_B[row]), rel=1e-4)


Law = dict[str, dict[str, float]]  # text so far → probability of each letter that may follow


def law_of(said: dict[str, float]) -> Law:
    """Returns how texts with these probabilities, each of which an m ends, are said letter by letter."""
    counts: Law = {}
    for text, p in said.items():
        for place, letter in enumerate(text + "m"):
            following = counts.setdefault(text[:place], {})
            following[letter] = following.get(letter, 0.0) + p
    return {
        before: {letter: p / sum(following.values()) for letter, p in following.items()}
        for before, following in counts.items()
    }


def table_network(rows: list[dict[str, float]]):
    """Returns a network that says each row's texts with their probabilities, and a list of the Q of its decoding steps.

    What a token sees is looked up in the mask: a wrong mask, slot or position is a wrong answer or an assertion.
    """
    laws, calls = [law_of(said) for said in rows], []

    def logits_of(law: Law, before: str) -> list[float]:
        following = law.get(before, {})
        return [math.log(following[letter]) if letter in following else -1e4 for letter in LETTERS]

    def look_up(tokens_BS, seen_BQS, positions_BQ) -> np.ndarray:
        calls.append(positions_BQ.shape[1])
        logits_BQV = np.zeros((*positions_BQ.shape, len(LETTERS)), np.float32)
        width = max(PROMPTS)
        for b, q in np.ndindex(positions_BQ.shape):
            assert seen_BQS[b, q, :width].tolist() == [slot < PROMPTS[b] for slot in range(width)]
            before = "".join(LETTERS[token] for token in tokens_BS[b, width:][seen_BQS[b, q, width:]])
            assert positions_BQ[b, q] == PROMPTS[b] + len(before) - 1
            logits_BQV[b, q] = logits_of(laws[b], before)
        return logits_BQV

    def prefill(parameters, batch, new_slots: int):
        first_BV = jnp.array([logits_of(law, "") for law in laws], jnp.float32)
        return first_BV[:, None], jnp.zeros((len(rows), max(PROMPTS) + new_slots), jnp.int32)

    def decode_one(parameters, tokens_BQ, positions_BQ, slot, seen_BQS, tokens_BS):
        tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, tokens_BQ.astype(jnp.int32), (0, slot))
        shape = jax.ShapeDtypeStruct((*tokens_BQ.shape, len(LETTERS)), jnp.float32)
        return jax.pure_callback(look_up, shape, tokens_BS, seen_BQS, positions_BQ), tokens_BS

    return types.SimpleNamespace(prefill=prefill, decode_one=decode_one), calls


def table_batch() -> dict:
    used_BT = np.arange(max(PROMPTS)) < np.array(PROMPTS)[:, None]
    positions_BT = np.where(used_BT, np.arange(max(PROMPTS)), 0)
    return {
        "tokens_BT": np.zeros(used_BT.shape, np.int32), "segments_BT": used_BT.astype(np.int32),
        "positions_BTZ": np.repeat(positions_BT[..., None], 3, axis=2),
    }  # fmt: skip


def ask(rows: list[dict[str, float]], numbers: decode.Numbers = NUMBERS, expectation: bool = True):
    """Returns the decoded rows, their greedy texts, and the Q of each decoding step."""
    network, calls = table_network(rows)
    decoder = decode.make_decoder(network, jnp.float32, 12, numbers, expectation)
    decoded = jax.block_until_ready(decoder({}, table_batch()))
    texts = ["".join(LETTERS[t] for t in decode.cut_number(row, numbers)[0]) for row in np.asarray(decoded.tokens_BG)]
    return decoded, texts, calls


def mean(said: dict[str, float]) -> tuple[float, float]:
    """Returns the mean and the probability of the positive numbers among the texts."""
    numbers = {text: p for text, p in said.items() if text.strip("0.") and "m" not in text}
    mass = sum(numbers.values())
    return sum(p * float(text) for text, p in numbers.items()) / mass, mass


def agrees(decoded: decode.Decoded, rows: list[tuple[float, float]]) -> None:
    assert np.asarray(decoded.expected_B).tolist() == pytest.approx([expected for expected, _ in rows], rel=1e-5)
    assert np.asarray(decoded.mass_B).tolist() == pytest.approx([mass for _, mass in rows], rel=1e-5)


def test_neighbouring_numbers_with_other_digits():
    """The digits' own means along either answer would be 1.5, 4.5 and 5: far from both answers."""
    decoded, texts, _ = ask([{"1.98": 0.5, "2.02": 0.5}, {"9.99": 0.4, "10.01": 0.6}])
    agrees(decoded, [(2.0, 1.0), (0.4 * 9.99 + 0.6 * 10.01, 1.0)])
    assert texts[0] in ("1.98", "2.02") and texts[1] == "10.01"


def test_every_form_of_a_number():
    one = {
        "7": 0.2,
        "12.": 0.1,
        ".5": 0.1,
        "0.25": 0.1,
        "10.75": 0.1,
        "m": 0.2,
        ".": 0.05,
        "0.00": 0.1,
        "700.125": 0.05,
    }
    other = {"3": 0.125, "3.": 0.125, "30": 0.125, "3.0": 0.125, "3.07": 0.5}
    decoded, texts, _ = ask([one, other])
    agrees(decoded, [mean(one), mean(other)])
    assert mean(one)[1] == pytest.approx(0.65)
    assert texts == ["7", "3.07"]


@pytest.mark.parametrize("seed", range(3))
def test_random_numbers(seed):
    """Fewer numbers than beams: nothing is lost."""
    rng = np.random.default_rng(seed)
    rows = [
        dict(zip([f"{v:.{rng.integers(1, 4)}f}" for v in 10 ** rng.uniform(-0.5, 3, 14)], p.tolist(), strict=True))
        for p in rng.dirichlet(np.ones(14), 2)
    ]
    decoded, _, _ = ask(rows)
    agrees(decoded, [mean(said) for said in rows])


def geometric(ratio: float, digits: int = 10) -> np.ndarray:
    """Returns P(d) ∝ ratio^d of the first digits."""
    return ratio ** np.arange(digits) / np.sum(ratio ** np.arange(digits))


def three_digits(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> dict[str, float]:
    """Returns the probabilities of a.bc with independent digits."""
    every = itertools.product(range(len(first)), repeat=3)
    return {f"{a}.{b}{c}": first[a] * second[b] * third[c] for a, b, c in every}


def test_independent_digits_in_closed_form(monkeypatch):
    monkeypatch.setattr(decode, "BEAMS", 6**3)
    digits = [[geometric(ratio, 6) for ratio in ratios] for ratios in ((0.5, 0.6, 0.7), (1.3, 0.9, 1.0))]
    decoded, _, _ = ask([three_digits(*three) for three in digits])
    rows = []
    for three in digits:
        mass = 1 - three[0][0] * three[1][0] * three[2][0]  # 0.00 is no depth
        expected = sum(p @ np.arange(6) * 0.1**place for place, p in enumerate(three)) / mass
        rows.append((expected, mass))
    agrees(decoded, rows)


def test_what_the_beams_do_not_hold_is_no_part_of_the_mass():
    """The most probable prefixes live on: 16 of the 100 with one decimal, 16 of the 160 that follow these."""
    rows = [three_digits(*map(geometric, ratios)) for ratios in ((0.517, 0.6, 0.7), (1.3, 0.731, 0.97))]
    decoded, _, _ = ask(rows)
    truncated = []
    for said in rows:
        law, best = law_of(said), {"": 1.0}
        for _ in "a.bc":
            longer = {text + letter: p * q for text, p in best.items() for letter, q in law[text].items()}
            best = dict(sorted(longer.items(), key=lambda one: -one[1])[: decode.BEAMS])
        truncated.append(mean(best))
    agrees(decoded, truncated)
    assert truncated[1][1] < 0.5


def test_a_second_point_and_too_long_a_number():
    decoded, texts, calls = ask([{"1.5": 0.25, "1.5.": 0.75}, {"12345678": 0.5, "123456789": 0.5}])
    agrees(decoded, [(1.5, 1.0), (12345678.0, 0.5)])
    assert texts == ["1.5", "12345678"] or texts == ["1.5", "123456789"]
    assert calls.count(decode.BEAMS) == decode.NUMBER_TOKENS


def test_zero_where_it_is_an_answer():
    rows = [{"0.00": 0.5, "1.00": 0.5}, {"0": 0.5, ".": 0.25, "m": 0.25}]
    none, _, _ = ask(rows)
    assert float(none.expected_B[0]) == pytest.approx(1.0) and float(none.mass_B[0]) == pytest.approx(0.5)
    assert math.isnan(none.expected_B[1]) and float(none.mass_B[1]) == pytest.approx(0, abs=1e-6)
    agrees(ask(rows, NUMBERS._replace(may_be_zero=True))[0], [(0.5, 1.0), (0.0, 0.5)])


def test_decoding_stops_when_nothing_is_left_to_decode():
    """One step shows that 5 is followed by no digit; 5.2534 takes six, and does not change its neighbour."""
    short, rare = {"5": 1.0}, {"5": 0.99995, "5.25": 0.00005}
    alone, texts, calls = ask([short, rare])
    assert texts == ["5", "5"] and calls == [1, decode.BEAMS]
    assert alone.expected_B.tolist() == pytest.approx([5.0, 5.0]) and float(alone.mass_B[1]) < 1
    both, texts, calls = ask([rare, {"5.2534": 1.0}])
    assert texts == ["5", "5.2534"] and calls == [1] * 6 + [decode.BEAMS] * 6
    assert float(both.expected_B[0]) == float(alone.expected_B[1])
    assert float(both.mass_B[0]) == float(alone.mass_B[1])


def test_greedy_decoding_stops_when_all_rows_have_ended():
    network, calls = table_network([{"7": 1.0}, {"2.5": 1.0}])
    stop = LETTERS.index("m")
    said_BG = np.asarray(decode.make_greedy(network, jnp.float32, 9, [stop])({}, table_batch()))
    assert ["".join(LETTERS[token] for token in row) for row in said_BG] == ["7mmmmmmmm", "2.5mmmmmm"]
    assert calls == [1] * 3
    decoded, _, calls = ask([{"7": 1.0}, {"2.5": 1.0}], expectation=False)
    assert decoded.expected_B is None and decoded.mass_B is None
    assert calls == [1] * 3
