"""Turns rows of a file into requests for the graders; grade and bench_grading use it."""

import dataclasses
from collections.abc import Mapping, Sequence

from r1jax.rewards.answers.extraction import EXTRACTIONS
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig


def request(row: Mapping) -> RewardRequest:
    """Returns the request of a row {id, task, reference, response, prompt?, prefill?, truncated?}."""
    return RewardRequest(
        id=str(row["id"]),
        task=row["task"],
        prompt=str(row.get("prompt") or ""),
        response=row["response"],
        reference=str(row["reference"]),
        prefill=str(row.get("prefill") or ""),
        truncated=row.get("truncated") is True,
    )


def by_extraction(rows: Sequence[Mapping], reward: RewardConfig) -> list[tuple[list[int], RewardConfig]]:
    """Returns, for each extraction, the indices of the rows that are graded with it and their RewardConfig.

    A row's field `extraction` overrides that of `reward`. Raises ValueError for an unknown extraction.
    """
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        extraction = row.get("extraction") or reward.extraction
        if extraction not in EXTRACTIONS:
            raise ValueError(
                f"row {row['id']!r}: field 'extraction' is {extraction!r}, must be one of {', '.join(EXTRACTIONS)}"
            )
        places.setdefault(extraction, []).append(place)
    return [(some, dataclasses.replace(reward, extraction=extraction)) for extraction, some in places.items()]
