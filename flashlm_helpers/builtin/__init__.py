"""Endless children's stories, told from the hand-written plots and word lists beside this file.

`plots.txt` holds the plots and `words.txt` the words; both explain their own format at the top.
Used as training text when the data hub cannot be reached.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b, sha256
from importlib.resources import files
from itertools import islice
from random import Random
from typing import NamedTuple

_GENERATOR = 1  # raise it when the code below starts to tell other stories from the same files
_WORDS_TEXT, _PLOTS_TEXT = ((files(__name__) / f).read_text("utf-8") for f in ("words.txt", "plots.txt"))

VERSION: str = sha256(f"{_GENERATOR}\n{_WORDS_TEXT}\n{_PLOTS_TEXT}".encode()).hexdigest()[:12]

_VALID_ONE_IN = 20
_HIS = {"she": ("her", "her", "herself"), "he": ("him", "his", "himself")}
_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=(?!uni|uku|use|eu|one\b)[aeiou]|hour|honest)", re.IGNORECASE)

Combination = tuple[str, ...]


class Cast(NamedTuple):
    """Characters of one sort from the word lists: (Lily, Mia, ...), "she", "girl"."""

    names: list[str]
    he: str
    kind: str  # "*": drawn from the list "<group> kind"


Lists = dict[str, list[str]]
Casts = dict[str, list[Cast]]


class Character(NamedTuple):
    """Someone in a story; printed as the name, `{friend.his}` and the like give the other words."""

    name: str
    kind: str
    title: str
    he: str
    him: str
    his: str
    himself: str

    def __str__(self) -> str:
        return self.name


class Plot(NamedTuple):
    """One plot: its title, its chief slots (slot -> lists to draw from) and its parsed text."""

    title: str
    chief: dict[str, list[str]]
    text: list


class Story(dict):
    """The filled slots of one story; a slot not filled yet is drawn from the list of its name."""

    def __init__(self, lists: Lists, casts: Casts, random: Callable[[], float]):
        self.lists, self.casts, self.random = lists, casts, random
        self.used: set[str] = set()

    def pick(self, choices: list):
        """Return one of the choices."""
        return choices[int(self.random() * len(choices))]

    def fresh(self, words: list[str]) -> str:
        """Return a word that this story does not use yet."""
        word = self.pick(words)
        while word in self.used:
            word = self.pick(words)
        self.used.add(word)
        return word

    def character(self, group: str) -> Character:
        """Return a new character of this group ("child", "animal", ...)."""
        cast = self.pick(self.casts[group])
        name = title = self.fresh(cast.names)
        kind = cast.kind
        if kind == "*":
            kind = self.fresh(self.lists[group + " kind"])
            title = f"{name} the {kind}"
        return Character(name, kind, title, cast.he, *_HIS[cast.he])

    def fill(self, slot: str, sources: list[str]) -> str:
        """Fill a chief slot from one of its lists or groups and return what now stands there."""
        source = self.pick(sources)
        if source == "peer":  # a friend of the hero's own sort
            source = self["hero group"]
        if source in self.casts:
            self[slot] = who = self.character(source)
            if slot == "hero":
                self["hero group"] = source
                self.update(kind=who.kind, he=who.he, him=who.him, his=who.his, himself=who.himself)
        else:
            self[slot] = self.fresh(self.lists[source])
        return str(self[slot])

    def __missing__(self, slot: str) -> str:
        if slot[0].isupper():
            word = self[slot.lower()]
            return word[0].upper() + word[1:]
        self[slot] = word = self.fresh(self.lists[slot.rstrip("23")])
        return word

    def tell(self, parts: list) -> str:
        """Return the parsed text with one alternative chosen everywhere; the slots are still open."""
        return "".join([p if type(p) is str else self.tell(self.pick(p)) for p in parts])


def _parse(text: str) -> list:
    """Turn `a [b | c]` into ["a ", [["b"], ["c"]]]: text, and lists of alternatives.

    Raises ValueError where a bracket is not closed or a bar stands outside of brackets.
    """
    levels: list[list[list]] = [[[]]]
    for token in re.split(r"(\[ *| *\| *| *\])", " ".join(text.split())):
        mark = token.strip()
        if mark == "[":
            levels.append([[]])
        elif mark == "|":
            levels[-1].append([])
        elif mark == "]" and len(levels) > 1:
            levels[-2][-1].append(levels.pop())
        elif token:
            levels[-1][-1].append(token)
    if len(levels) > 1 or len(levels[0]) > 1:
        raise ValueError(f"plots.txt: unbalanced brackets in: {text[:60]}...")
    return levels[0][0]


@cache
def _load() -> tuple[Lists, Casts, list[Plot]]:
    """Read both data files: the word lists, the characters by group, and the plots."""
    lists: Lists = {}
    casts: Casts = {}
    words = re.sub(r"(?m)^#.*", "", _WORDS_TEXT)
    for head, body in re.findall(r"\[(.+?)\]([^[]+)", words):
        entries = [" ".join(entry.split()) for entry in body.split(",")]
        group, *rest = head.split(maxsplit=2)
        if rest and rest[0] in _HIS:
            casts.setdefault(group, []).append(Cast(entries, *rest))
        else:
            lists[head] = entries

    pieces: dict[str, str] = {}
    plots = []
    for section in re.split(r"(?m)^== ", re.sub(r"(?m)^#.*\n", "", _PLOTS_TEXT))[1:]:
        head, *body = re.split(r"\n\s*\n", section.strip())
        body = [re.sub(r"@(\w+)", lambda m: pieces[m[1]], text) for text in body]
        title, *chief = head.splitlines()
        if title.startswith("@"):
            pieces[title[1:]] = " ".join(body)
        else:
            slots = {slot: sources.split() for slot, sources in (line.split(":") for line in chief)}
            plots.append(Plot(title, slots, _parse(" // ".join(body))))
    return lists, casts, plots


def _split_of(combination: Combination) -> str:
    """Return the only split that may tell this combination, the same for every seed."""
    return "train" if zlib.crc32("|".join(combination).encode()) % _VALID_ONE_IN else "valid"


def _generate(split: str, seed: int) -> Iterator[tuple[Combination, str]]:
    """Yield (combination, story) without end; the combination is the plot and its chief slots' values."""
    lists, casts, plots = _load()
    random = Random(f"{split} {seed}").random
    seen: set[bytes] = set()
    while True:
        story = Story(lists, casts, random)
        plot = story.pick(plots)
        combination = (plot.title, *[story.fill(slot, sources) for slot, sources in plot.chief.items()])
        if _split_of(combination) != split:
            continue
        told = " ".join(story.tell(plot.text).format_map(story).split())
        text = _BEFORE_VOWEL.sub(r"\1n ", told).replace(" // ", "\n")
        digest = blake2b(text.encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            yield combination, text


def stories(split: str, seed: int = 0, count: int | None = None) -> Iterator[str]:
    """Yield `count` different stories (None: no end) of the split "train" or "valid".

    The same split and seed always give the same stories in the same order.
    Raises ValueError for any other split.
    """
    if split not in ("train", "valid"):
        raise ValueError(f'split must be "train" or "valid", not {split!r}')
    told = (text for _, text in _generate(split, seed))
    return islice(told, count)
