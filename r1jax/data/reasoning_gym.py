"""Procedural problems of the library reasoning-gym as prompts, keyed by family, seed and index.

Source: Stojanovski et al., "Reasoning Gym", arXiv 2505.24760. The task `reasoning_gym` grades them
(r1jax/rewards/answers/reasoning_gym.py).
"""

import json
from functools import lru_cache

from r1jax.data.problems import Problem

_RUNS_TEXT = "its scorer runs the model's text as code (eval or sympy's parse_expr)"
_NO_ANSWER = "it gives no answer of its own, so its scorer cannot be checked"
_JSON = "its own answer is refused once the problem has been written as JSON"
EXCLUDED = {  # family -> what was measured with reasoning-gym 0.1.25
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _RUNS_TEXT),
    **dict.fromkeys(("countdown", "puzzle24", "polynomial_multiplication"), _RUNS_TEXT),
    **dict.fromkeys(("simple_integration", "intermediate_integration"), _RUNS_TEXT),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_ANSWER),
    **dict.fromkeys(("arc_agi", "rearc"), _JSON),
    "game_of_life_halting": "any text scores 1.0 where the answer is False, and text that is not True or False where it is True",
    "coin_flip": "the text 0 scores 1.0 for every probability",
    "knight_swap": "the same seed gives different problems, 12 s each",
    "composite": "a mixture of families, no family",
}


@lru_cache
def families() -> tuple[str, ...]:
    """Returns the families in use, in order of name: all of the library's without EXCLUDED."""
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(set(DATASETS) - set(EXCLUDED)))


def prompts(family: str, count: int, seed: int = 0) -> list[Problem]:
    """Returns the first `count` problems of a family and seed, at the library's default sizes.

    The answer is JSON {"family", "answer", "metadata"}. The library draws problem i of seed s as problem 0 of seed s +
    i, so seeds of disjoint sets differ by at least `count`. Raises ValueError for a family that is unknown or excluded,
    or a count below 1.
    """
    require(family)
    if count < 1:
        raise ValueError(f"reasoning_gym: count={count} must be at least 1")
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(family, size=count, seed=seed)
    return [_prompt(family, seed, index, dataset[index]) for index in range(count)]


def require(family: str) -> None:
    """Raises ValueError for a family that is unknown or excluded, with the reason."""
    if family in EXCLUDED:
        raise ValueError(f"reasoning_gym: family {family!r} is excluded: {EXCLUDED[family]}")
    if family not in families():
        raise ValueError(f"reasoning_gym: no family {family!r}; families: {', '.join(families())}")


def _prompt(family: str, seed: int, index: int, entry: dict) -> Problem:
    reference = {"family": family, "answer": entry["answer"], "metadata": entry["metadata"]}
    return Problem(
        id=f"{family}-{seed}-{index}",
        task="reasoning_gym",
        prompt=entry["question"],
        reference=json.dumps(reference, sort_keys=True),
        source="reasoning_gym",
    )
