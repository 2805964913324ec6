"""Makes wordnet_pairs.tsv and wordnet_texts.txt.gz from the database of WordNet 3.0.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python benchmarks/data/make_pairs.py wordnet/usr/share/wordnet

One line a synset: its split, its identifier, its gloss, and a usage example of it. The synsets of `evaluation` are searched and
searched for; those of `calibration` share no synset, no gloss and no example with them. The texts, one a line, are for
training: all glosses and examples of 3 to 40 words of synsets that are not evaluated, none of them among the pairs. First come
the glosses of synsets with an example, as all pairs are, then examples, then the other glosses, each in random order and with
an empty line between. The same database gives the same files.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAIRS = HERE / "wordnet_pairs.tsv"
TEXTS = HERE / "wordnet_texts.txt.gz"
PARTS = {"noun": 2000, "verb": 1200, "adj": 1000}
"""Evaluation synsets of each part of speech."""
CALIBRATION = 2400
WORDS = range(3, 41)
HARSH = re.compile(
    r"\b(kill|murder|rape|sex|naked|breast|genital|prostitut|slave|suicid|drug|terroris|tortur|bomb|urin|blood|corpse|dead|death|"
    r"gun|shoot|offensive|derogat|disparag|ethnic|racial|obscene|vulgar|slang|f.ck|wh.re|n.gger)",
    re.IGNORECASE,
)
"""Subjects left out, and what a dictionary calls words it does not recommend."""


@dataclass(frozen=True)
class Pair:
    """A synset's gloss and one usage example of it. synset: its part of speech and offset in the database, `noun-00001740`."""

    synset: str
    gloss: str
    example: str


def synsets(database: Path, part: str) -> Iterator[tuple[str, list[str]]]:
    """The synsets of one part of speech: the identifier, then the gloss and the examples; harsh subjects are left out."""
    for line in (database / f"data.{part}").read_text(encoding="utf-8").splitlines():
        head, bar, text = line.partition(" | ")
        gloss = text.partition('; "')[0].strip().rstrip(";")
        if not line.startswith("  ") and bar and '"' not in gloss and not HARSH.search(text):
            examples = [example.strip() for example in re.findall(r'"([^"]+)"', text)]
            yield f"{part}-{head.split()[0]}", [gloss, *examples]


def pairs(database: Path, part: str) -> Iterator[Pair]:
    """The synsets of one part of speech that have a gloss and an example of some length."""
    for synset, texts in synsets(database, part):
        if len(texts) > 1 and all(len(text.split()) in WORDS for text in texts[:2]):
            yield Pair(synset, *texts[:2])


def draw(database: Path) -> dict[str, list[Pair]]:
    """The synsets of each split, no text of which occurs twice."""
    generator = random.Random(0)
    seen: set[str] = set()
    chosen: dict[str, list[Pair]] = {"evaluation": [], "calibration": []}
    for part, wanted in PARTS.items():
        drawn = list(pairs(database, part))
        generator.shuffle(drawn)
        fresh: list[Pair] = []
        for pair in drawn:
            if seen.isdisjoint((pair.gloss, pair.example)):
                seen.update((pair.gloss, pair.example))
                fresh.append(pair)
        spare = CALIBRATION * wanted // sum(PARTS.values())
        chosen["evaluation"] += fresh[:wanted]
        chosen["calibration"] += fresh[wanted : wanted + spare]
    return chosen


def training(database: Path, chosen: dict[str, list[Pair]]) -> list[list[str]]:
    """All glosses with an example, examples and other glosses of some length of synsets that are not evaluated.

    No text is in a pair or occurs twice.
    """
    evaluated = {pair.synset for pair in chosen["evaluation"]}
    paired = {text for members in chosen.values() for pair in members for text in (pair.gloss, pair.example)}
    part_of = {
        text: 1 if place else 2 * (len(texts) == 1)
        for part in ("noun", "verb", "adj", "adv")
        for synset, texts in synsets(database, part)
        if synset not in evaluated
        for place, text in enumerate(texts)
        if len(text.split()) in WORDS and text not in paired
    }
    texts = random.Random(0).sample(list(part_of), len(part_of))
    return [[text for text in texts if part_of[text] == part] for part in range(3)]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("database", type=Path, help="the directory that holds data.noun, data.verb and data.adj")
    chosen = draw(parser.parse_args().database)
    with PAIRS.open("w", encoding="utf-8", newline="\n") as file:
        for split, members in chosen.items():
            generator = random.Random(1)
            generator.shuffle(members)
            file.writelines(f"{split}\t{pair.synset}\t{pair.gloss}\t{pair.example}\n" for pair in members)
    parts = training(parser.parse_args().database, chosen)
    # Without a name and a time, so that the same texts give the same file.
    with TEXTS.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write("\n".join("".join(f"{text}\n" for text in part) for part in parts).encode())
    print(f"{TEXTS.name}: {' + '.join(str(len(part)) for part in parts)} texts")
    print(f"{PAIRS.name}: " + ", ".join(f"{len(members)} synsets of {split}" for split, members in chosen.items()))


if __name__ == "__main__":
    main()
