"""The story generator: draw a plot, fill its slots with words, choose among its phrasings."""

import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b, sha256
from importlib.resources import files
from itertools import islice
from random import Random
from typing import NamedTuple

# Raise this number whenever a change of the code changes the stories.
_GENERATOR = 1

_WORDS_TEXT = (files(__package__) / "words.txt").read_text("utf-8")
_PLOTS_TEXT = (files(__package__) / "plots.txt").read_text("utf-8")
_EVERYTHING = f"{_GENERATOR}\n{_WORDS_TEXT}\n{_PLOTS_TEXT}"

VERSION: str = sha256(_EVERYTHING.encode()).hexdigest()[:12]

# One in 20 combinations (a plot and the values of its chief slots) belongs to validation.
_VALID_ONE_IN = 20

# The other forms of each pronoun: him, his, himself.
_PRONOUNS = {
    "she": ("her", "her", "herself"),
    "he": ("him", "his", "himself"),
}

# Finds an "a" that must become "an": "a egg" and "a hour", but not "a unicorn" or "a one".
_A_BEFORE_VOWEL = re.compile(
    r"\b([Aa]) (?=(?!uni|uku|use|eu|one\b)[aeiou]|hour|honest)",
    re.IGNORECASE,
)


class Cast(NamedTuple):
    """The characters under one heading of words.txt, such as [child she girl]."""

    names: list[str]
    pronoun: str  # "she" or "he"
    kind: str  # "girl"; "*" draws it from the list "<group> kind"


class Character(NamedTuple):
    """Someone in a story. In a plot, `{friend}` prints the name and `{friend.his}` the pronoun."""

    name: str
    kind: str  # "girl", "rabbit"
    title: str  # "Lily", "Thumper the rabbit"
    he: str
    him: str
    his: str
    himself: str

    def __str__(self) -> str:
        return self.name


# The text of a plot, parsed. A bracket becomes a list of alternatives, each a template again:
# "a [b | c]" becomes ["a ", [["b"], ["c"]]].
Template = list

Lists = dict[str, list[str]]  # name of the list -> its words
Casts = dict[str, list[Cast]]  # group -> its casts


class Plot(NamedTuple):
    """One plot of plots.txt."""

    title: str
    chief: dict[str, list[str]]  # chief slot -> the lists or groups that it is drawn from
    text: Template


# The title of a plot, then the values of its chief slots.
Combination = tuple[str, ...]


class Story(dict):
    """The slots of one story. Reading an empty slot fills it from the list of the same name."""

    def __init__(self, lists: Lists, casts: Casts, random: Callable[[], float]):
        self.lists = lists
        self.casts = casts
        self.random = random  # () -> a float in [0, 1)
        self.used: set[str] = set()

    def pick(self, choices: list):
        """Return one of the choices, all equally likely."""
        return choices[int(self.random() * len(choices))]

    def pick_unused(self, words: list[str]) -> str:
        """Return one of the words that this story does not contain yet."""
        word = self.pick(words)
        while word in self.used:
            word = self.pick(words)
        self.used.add(word)
        return word

    def create_character(self, group: str) -> Character:
        """Return a new character of this group ("child", "animal", ...)."""
        cast = self.pick(self.casts[group])
        name = self.pick_unused(cast.names)
        kind = cast.kind
        title = name

        # An animal's name does not show its kind, so its title adds the kind.
        if kind == "*":
            kind = self.pick_unused(self.lists[group + " kind"])
            title = f"{name} the {kind}"

        him, his, himself = _PRONOUNS[cast.pronoun]
        return Character(
            name=name,
            kind=kind,
            title=title,
            he=cast.pronoun,
            him=him,
            his=his,
            himself=himself,
        )

    def fill(self, slot: str, sources: list[str]) -> str:
        """Fill a chief slot from one of its lists or groups. Return the text of the slot."""
        # A peer is someone from the hero's own group.
        source = self.pick(sources)
        if source == "peer":
            source = self["hero group"]

        # A source that is not a group of characters is a list of words.
        if source not in self.casts:
            self[slot] = self.pick_unused(self.lists[source])
            return self[slot]

        character = self.create_character(source)
        self[slot] = character
        if slot == "hero":
            self._remember_hero(character, source)
        return character.name

    def _remember_hero(self, hero: Character, group: str) -> None:
        # In a plot, {he} and {kind} without a name in front are the hero's.
        self["hero group"] = group
        self["kind"] = hero.kind
        self["he"] = hero.he
        self["him"] = hero.him
        self["his"] = hero.his
        self["himself"] = hero.himself

    def __missing__(self, slot: str) -> str:
        # {Color} is the word of {color} with a capital letter.
        if slot[0].isupper():
            word = self[slot.lower()]
            return word[0].upper() + word[1:]

        # {color2} and {color3} are further words of the list "color".
        word = self.pick_unused(self.lists[slot.rstrip("23")])
        self[slot] = word
        return word

    def choose_phrasing(self, template: Template) -> str:
        """Return the template's text with one alternative per bracket; slots stay as they are."""
        text = ""
        for part in template:
            if type(part) is str:
                text += part
            else:
                text += self.choose_phrasing(self.pick(part))
        return text


def parse_template(text: str) -> Template:
    """Parse `a [b | c]` into ["a ", [["b"], ["c"]]]: text, and lists of alternatives.

    Raises ValueError if a bracket is not closed or a bar is outside all brackets.
    """
    # One list of alternatives per open bracket; the first is the text outside all brackets.
    # What comes next belongs to the last alternative of the innermost bracket.
    levels: list[list[Template]] = [[[]]]
    one_line = " ".join(text.split())
    for token in re.split(r"(\[ *| *\| *| *\])", one_line):
        mark = token.strip()
        alternatives = levels[-1]
        if mark == "[":
            levels.append([[]])
        elif mark == "|":
            alternatives.append([])
        elif mark == "]" and len(levels) > 1:
            levels.pop()
            levels[-1][-1].append(alternatives)
        elif token:
            alternatives[-1].append(token)

    # With all brackets closed, only the outermost text is left, and it has no alternatives.
    if len(levels) > 1 or len(levels[0]) > 1:
        raise ValueError(f"plots.txt: unbalanced brackets in: {text[:60]}...")
    return levels[0][0]


def _read_words(text: str) -> tuple[Lists, Casts]:
    """Return the word lists and the casts in the text of words.txt."""
    lists: Lists = {}
    casts: Casts = {}

    # Drop the comments, then split at the headings in brackets.
    text = re.sub(r"(?m)^#.*", "", text)
    for heading, body in re.findall(r"\[(.+?)\]([^[]+)", text):
        # Entries with several words may be broken across lines.
        entries = [" ".join(entry.split()) for entry in body.split(",")]

        # [child she girl] is a cast, [color] and [animal kind] are lists.
        heading_words = heading.split(maxsplit=2)
        if len(heading_words) > 1 and heading_words[1] in _PRONOUNS:
            group, pronoun, kind = heading_words
            cast = Cast(entries, pronoun, kind)
            casts.setdefault(group, []).append(cast)
        else:
            lists[heading] = entries
    return lists, casts


def _read_plots(text: str) -> list[Plot]:
    """Return the plots in the text of plots.txt."""
    pieces: dict[str, str] = {}
    plots = []

    # Drop the comments, then split at the titles. The part before the first title is empty.
    text = re.sub(r"(?m)^#.*\n", "", text)
    _, *sections = re.split(r"(?m)^== ", text)
    for section in sections:
        heading, *paragraphs = re.split(r"\n\s*\n", section.strip())
        title, *chief_lines = heading.splitlines()
        is_piece = title.startswith("@")

        # A piece is inserted into a paragraph, so it has no paragraphs of its own.
        body = (" " if is_piece else " // ").join(paragraphs)
        body = re.sub(r"@(\w+)", lambda match: pieces[match[1]], body)

        # Later sections insert this piece where they write its @name.
        if is_piece:
            pieces[title[1:]] = body
            continue

        # A line such as "friend: child peer" names a chief slot and its sources.
        chief = {}
        for line in chief_lines:
            slot, sources = line.split(":")
            chief[slot] = sources.split()
        plots.append(Plot(title, chief, parse_template(body)))
    return plots


@cache
def load() -> tuple[Lists, Casts, list[Plot]]:
    """Return the word lists, the casts by group, and the plots of the two data files."""
    lists, casts = _read_words(_WORDS_TEXT)
    plots = _read_plots(_PLOTS_TEXT)
    return lists, casts, plots


def find_split(combination: Combination) -> str:
    """Return the split that owns this combination, "train" or "valid": the same for every seed."""
    checksum = zlib.crc32("|".join(combination).encode())
    if checksum % _VALID_ONE_IN == 0:
        return "valid"
    return "train"


def generate(split: str, seed: int) -> Iterator[tuple[Combination, str]]:
    """Yield different stories without end, each as (combination, text)."""
    lists, casts, plots = load()
    random = Random(f"{split} {seed}").random
    seen: set[bytes] = set()
    while True:
        # Draw a plot and its chief slots until the combination belongs to this split.
        story = Story(lists, casts, random)
        plot = story.pick(plots)
        values = [plot.title]
        for slot, sources in plot.chief.items():
            values.append(story.fill(slot, sources))
        combination = tuple(values)
        if find_split(combination) != split:
            continue

        # "[{Name} saw | There was] a {color} hat." -> "There was a {color} hat."
        phrasing = story.choose_phrasing(plot.text)

        # -> "There was a orange hat.": only the slots of this phrasing draw a word.
        words = phrasing.format_map(story).split()

        # -> "There was an orange hat."
        text = _A_BEFORE_VOWEL.sub(r"\1n ", " ".join(words))
        text = text.replace(" // ", "\n")

        # Yield no story twice. Eight bytes per story are enough to recognize it.
        digest = blake2b(text.encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            yield combination, text


def stories(split: str, seed: int = 0, count: int | None = None) -> Iterator[str]:
    """Yield `count` different stories (None: without end) of the split "train" or "valid".

    The same split and seed always yield the same stories in the same order, and no combination of
    plot and chief slots occurs in both splits. Raises ValueError for any other split.
    """
    if split not in ("train", "valid"):
        raise ValueError(f'split must be "train" or "valid", not {split!r}')
    texts = (text for _, text in generate(split, seed))
    return islice(texts, count)
