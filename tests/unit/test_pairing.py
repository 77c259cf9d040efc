"""Mismatched pairing: worked examples, and every small batch by brute force."""

from __future__ import annotations

import doctest
import itertools
import random
import time
from collections.abc import Sequence

import pytest

from nemo_kto.objective import pairing
from nemo_kto.objective.pairing import mismatched_partners


def brute_force(prompts: Sequence[object], responses: Sequence[object]) -> list[int | None]:
    found: list[int | None] = []
    for i in range(len(prompts)):
        others = [(i + d) % len(prompts) for d in range(1, len(prompts))]
        fits = [j for j in others if prompts[j] != prompts[i] and responses[j] != responses[i]]
        found.append(fits[0] if fits else None)
    return found


def test_docstring_example():
    assert doctest.testmod(pairing).failed == 0
    assert doctest.testmod(pairing).attempted > 0


def test_distinct_samples_take_their_neighbour():
    assert mismatched_partners("abcd", "wxyz") == [1, 2, 3, 0]


def test_chosen_and_rejected_of_one_prompt_skip_each_other():
    assert mismatched_partners("aabb", "wxyz") == [2, 2, 0, 0]


def test_equal_response_to_another_prompt_is_no_mismatch():
    assert mismatched_partners("abc", "xxy") == [2, 2, 0]


def test_partner_lies_across_the_end():
    assert mismatched_partners("abbb", "wxyz") == [1, 0, 0, 0]


@pytest.mark.parametrize(("prompts", "responses"), [("", ""), ("a", "x"), ("aaa", "xyz"), ("abc", "xxx")])
def test_no_partner(prompts: str, responses: str):
    assert mismatched_partners(prompts, responses) == [None] * len(prompts)


def test_some_samples_have_no_partner():
    # 0 shares its prompt with 1 and its response with 2; those two differ in both.
    assert mismatched_partners("aab", "xyx") == [None, 2, 1]


def test_keys_may_be_token_ids():
    assert mismatched_partners([(1, 2), (1, 2), (3,)], [(4,), (5,), (6,)]) == [2, 2, 0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_small_batch(size: int):
    for prompts in itertools.product("abc", repeat=size):
        for responses in itertools.product("xyz", repeat=size):
            assert mismatched_partners(prompts, responses) == brute_force(prompts, responses)


def test_random_batches():
    rng = random.Random(0)
    for _ in range(200):
        size, kinds = rng.randint(1, 40), rng.randint(1, 6)
        prompts = [rng.randrange(kinds) for _ in range(size)]
        responses = [rng.randrange(kinds) for _ in range(size)]
        assert mismatched_partners(prompts, responses) == brute_force(prompts, responses)


@pytest.mark.parametrize("kinds", [1, 2, 4096])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_large_batches_with_equal_prompts_are_quick(kinds: int, is_sorted: bool):
    rng = random.Random(1)
    prompts = [rng.randrange(kinds) for _ in range(4096)]
    if is_sorted:
        prompts.sort()
    start = time.process_time()
    mismatched_partners(prompts, list(range(4096)))
    # It takes about 10 ms; all pairs would take seconds.
    assert time.process_time() - start < 0.5
