"""The built-in stories: repeatable, never twice, split cleanly, and well formed."""

import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from flashlm_helpers import builtin
from flashlm_helpers.builtin import generator

SHE, HE = {"she", "her", "herself"}, {"he", "him", "his", "himself"}
# Plots with a third person
OTHERS_APPEAR = {"the snowman", "the magic word", "the baby bird", "the wind and the hat"}
MALFORMED = [
    r"  |^\s|\s$|\s\n|\n\s",  # stray white space
    r"[{}\[\]|@/_]",  # something not filled in
    r"\s[,.!?;:]|[,;:][,.!?;:]|[.!?][.,]",  # punctuation in the wrong place
    r"[.,!?][A-Za-z]",
    r"\b[Aa] (?!uni|uku)[aeiou]|\b[Aa]n [^aeiouhAEIO]|\b[Aa]n u(?:ni|ku)",  # a or an
    r'(?m)^"?[a-z]|[.] "?[a-z]',  # a sentence without a capital
    r"(?i)\b(\w+) \1\b",
    r"[^\x20-\x7e\n]",
]


@pytest.fixture(scope="module")
def told():
    """20,000 training stories as (combination, text)."""
    return list(islice(generator.generate("train", 0), 20_000))


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def test_wrong_split_is_refused():
    with pytest.raises(ValueError, match="train.*valid.*test"):
        builtin.stories("test")


def test_same_stories_for_any_count_process_and_hash_seed():
    code = (
        "from flashlm_helpers.builtin import stories\nprint(*stories('valid', 7, 40), sep='\\n\\n')"
    )
    root = Path(builtin.__file__).parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "123"}
    other = subprocess.check_output([sys.executable, "-c", code], env=env, cwd=root)

    here = list(builtin.stories("valid", 7, 60))
    assert len(here) == 60
    assert other.decode().split() == "\n\n".join(here[:40]).split()
    assert list(islice(builtin.stories("valid", 7), 60)) == here


def test_seeds_and_splits_differ():
    first = set()
    for split in ("train", "valid"):
        for seed in (0, 1, 2):
            first.add(tuple(builtin.stories(split, seed, 20)))
    assert len(first) == 6


def test_no_story_twice(told):
    assert len({text for _, text in told}) == len(told)


def test_no_story_twice_even_when_few_are_possible(monkeypatch):
    plot = generator.Plot("tiny", {"hero": ["child"]}, [[["One"], ["Two"], ["Three"]]])
    cast = {"child": [generator.Cast(["Lily"], "she", "girl")]}
    monkeypatch.setattr(generator, "load", lambda: ({}, cast, [plot]))
    split = generator.find_split(("tiny", "Lily"))
    assert sorted(builtin.stories(split, 0, 3)) == ["One", "Three", "Two"]


def test_combinations_of_validation_never_occur_in_training(told):
    train = {combination for combination, _ in told}
    train |= {combination for combination, _ in islice(generator.generate("train", 5), 5_000)}
    for seed in (0, 1):
        stories = islice(generator.generate("valid", seed), 2_000)
        valid = {combination for combination, _ in stories}
        assert train.isdisjoint(valid)
        assert {title for title, *_ in valid} == {title for title, *_ in train}


def test_many_plots_and_words_and_fitting_length(told):
    assert len({combination[0] for combination, _ in told}) >= 36
    assert len({word for _, text in told for word in words(text)}) >= 2_200
    lengths = sorted(len(text.split()) for _, text in told)
    assert 70 <= lengths[200] and lengths[19_000] <= 220 and lengths[-1] <= 260
    assert {text.count("\n") + 1 for _, text in told} == {2, 3, 4, 5}
    assert len({" ".join(text.split()[:3]) for _, text in told}) > 300  # openings


def test_well_formed(told):
    for pattern in MALFORMED:
        find = re.compile(pattern)
        bad = [text for _, text in told[:8_000] if find.search(text)]
        assert not bad, f"{pattern}: {bad[0]}"
    for _, text in told[:8_000]:
        assert text.endswith((".", "!", '"')), text
        assert all(line.count('"') % 2 == 0 for line in text.split("\n")), text


def test_every_story_has_its_chief_things_dialogue_and_a_feeling(told):
    lists, _, _ = generator.load()
    feelings = {word for name in ("happy", "sad", "scared", "cross") for word in lists[name]}
    feelings |= {"lonely", "content", "smile", "laugh", "joy", "felt", "heart"}
    feeling = re.compile(rf"\b(?:{'|'.join(sorted(feelings))})")
    for combination, text in told[:8_000]:
        assert all(value in text for value in combination[1:]), (combination, text)
        assert re.search(r'"[A-Z][^"]+[.,!?]"', text), text
        assert feeling.search(text), text


def test_pronouns_fit_the_characters(told):
    _, casts, _ = generator.load()
    pronoun = {}
    for group in casts.values():
        for cast in group:
            pronoun.update(dict.fromkeys(cast.names, cast.pronoun))

    checked = 0
    for combination, text in told[:10_000]:
        present = {pronoun[value] for value in combination[1:] if value in pronoun}
        if len(present) == 1 and combination[0] not in OTHERS_APPEAR:
            checked += 1
            wrong = HE if present == {"she"} else SHE
            assert wrong.isdisjoint(words(text)), (combination, text)
    assert checked > 2_000


def test_parse_keeps_nesting_and_refuses_open_brackets():
    parsed = generator.parse_template("a [b | [c|d] e].")
    assert parsed == ["a ", [["b"], [[["c"], ["d"]], " e"]], "."]
    for broken in ("a [b", "a b]c | d", "a | b"):
        with pytest.raises(ValueError, match="plots.txt"):
            generator.parse_template(broken)


def test_version_follows_the_data_files(tmp_path):
    # A package of the same name, found first because Python starts in its folder.
    package = tmp_path / "flashlm_helpers" / "builtin"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(builtin.__file__).parent, package, ignore=ignore)
    (package.parent / "__init__.py").touch()

    def version():
        code = "from flashlm_helpers import builtin; print(builtin.__file__, builtin.VERSION)"
        output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
        file, version = output.split()
        assert file == str(package / "__init__.py")
        return version

    versions = [version()]
    assert versions == [builtin.VERSION]
    for name in ("words.txt", "plots.txt"):
        with (package / name).open("a") as file:
            file.write("\n# one more line\n")
        versions.append(version())
    assert len(set(versions)) == 3
