"""Profiles: how long a notebook takes, and which text it reads."""

import os
from dataclasses import dataclass, replace

from flashlm_helpers.config import FlashLMError


@dataclass(frozen=True)
class Profile:
    """The numbers that decide how long a notebook takes; its cells are the same in all profiles."""

    name: str
    dataset: str  # for open_corpus()
    preset: str  # the model that notebooks train
    stories: int  # training stories taken from the corpus
    train_seconds: float  # per training run
    evaluation_stories: int  # stories scored for a BPC
    sample_tokens: int  # tokens generated per story


PROFILES = {
    "smoke": Profile("smoke", "builtin", "tiny", 1_500, 8.0, 60, 60),
    "full": Profile("full", "auto", "v4-small", 20_000, 100.0, 400, 200),
}


def active_profile() -> Profile:
    """Return the profile that FLASHLM_PROFILE names: "smoke" or "full", and full when unset.

    FLASHLM_DATASET, if set, replaces its data set: a name or a folder, as open_corpus() takes it.
    Raises FlashLMError for a profile that does not exist.
    """
    name = os.environ.get("FLASHLM_PROFILE") or "full"
    if name not in PROFILES:
        raise FlashLMError(f"FLASHLM_PROFILE is {name!r}: choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    return replace(profile, dataset=os.environ.get("FLASHLM_DATASET") or profile.dataset)
