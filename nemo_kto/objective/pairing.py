"""Which foreign response each sample of a global batch is paired with to estimate the KL. Not for building rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def mismatched_partners(prompts: Sequence[Hashable], responses: Sequence[Hashable]) -> list[int | None]:
    """For each sample the next one, in cyclic order, whose prompt and response both differ from its own.

    The order is that of the global batch, so the pairing depends on neither micro-batches nor ranks. A shift by one,
    as elsewhere, would often meet the same prompt (chosen and rejected rows of one prompt are neighbours) and then
    score a response that does match.

    Worked example. Samples 0 and 1 answer the same prompt, and 3 gives the response of 0:

    >>> prompts = ["capital of France?", "capital of France?", "2 + 2?", "best city?"]
    >>> responses = ["Paris", "Rome", "4", "Paris"]
    >>> mismatched_partners(prompts, responses)
    [2, 2, 3, 1]

    Sample 0 skips 1 (its prompt) and takes 2; sample 3 skips 0 (its response) and takes 1. Where all prompts or all
    responses are equal there is no partner:

    >>> mismatched_partners(["a", "b"], ["yes", "yes"])
    [None, None]

    Args:
        prompts: N keys, equal for equal prompts (text or tuples of token ids).
        responses: N keys, equal for equal responses.

    Returns:
        N indices into the same order, None where no sample differs in both. Runs of equal neighbours are skipped in
        one step, so ordinary batches take O(N), however often a prompt repeats.
    """
    assert len(prompts) == len(responses)
    prompt_ids, response_ids = _ids(prompts), _ids(responses)
    prompt_runs, response_runs = _distances_to_change(prompt_ids), _distances_to_change(response_ids)
    size = len(prompt_ids)

    def partner(i: int) -> int | None:
        distance = 1
        while distance < size:
            j = (i + distance) % size
            if prompt_ids[j] == prompt_ids[i]:
                distance += prompt_runs[j]
            elif response_ids[j] == response_ids[i]:
                distance += response_runs[j]
            else:
                return j
        return None

    return [partner(i) for i in range(size)]


def _ids(keys: Sequence[Hashable]) -> list[int]:
    """Small integers that are equal where the keys are: long keys are then compared once, not once per step."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def _distances_to_change(ids: Sequence[int]) -> list[int]:
    """For each place the cyclic distance to the next id that differs; the length of the circle if none does."""
    size = len(ids)
    distances = [size] * size
    # Twice around, because a run may reach across the end of the list.
    for place in reversed(range(2 * size)):
        i, after = place % size, (place + 1) % size
        distances[i] = 1 if ids[i] != ids[after] else min(size, distances[after] + 1)
    return distances
