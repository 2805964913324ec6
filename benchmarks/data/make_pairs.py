"""Makes wordnet_pairs.tsv from the database of WordNet 3.0.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python benchmarks/data/make_pairs.py wordnet/usr/share/wordnet

One line a synset: its split, its identifier, its gloss, and a usage example of it. The synsets of `evaluation` are searched and
searched for; those of `calibration` share no synset, no gloss and no example with them. The same database gives the same file.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAIRS = HERE / "wordnet_pairs.tsv"
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


def pairs(database: Path, part: str) -> Iterator[Pair]:
    """The synsets of one part of speech that have a gloss and an example of some length, harsh subjects left out."""
    for line in (database / f"data.{part}").read_text(encoding="utf-8").splitlines():
        head, bar, text = line.partition(" | ")
        example = re.search(r'"([^"]+)"', text)
        gloss = text.partition('; "')[0].strip().rstrip(";")
        if line.startswith("  ") or not bar or example is None or '"' in gloss or HARSH.search(text):
            continue
        if len(gloss.split()) in WORDS and len(example[1].split()) in WORDS:
            yield Pair(f"{part}-{head.split()[0]}", gloss, example[1].strip())


def draw(database: Path) -> dict[str, list[Pair]]:
    """The synsets of each split, no text of which occurs twice."""
    generator = random.Random(0)
    seen: set[str] = set()
    chosen: dict[str, list[Pair]] = {"evaluation": [], "calibration": []}
    for part, wanted in PARTS.items():
        found = list(pairs(database, part))
        generator.shuffle(found)
        fresh: list[Pair] = []
        for pair in found:
            if seen.isdisjoint((pair.gloss, pair.example)):
                seen.update((pair.gloss, pair.example))
                fresh.append(pair)
        spare = CALIBRATION * wanted // sum(PARTS.values())
        chosen["evaluation"] += fresh[:wanted]
        chosen["calibration"] += fresh[wanted : wanted + spare]
    return chosen


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("database", type=Path, help="the directory that holds data.noun, data.verb and data.adj")
    chosen = draw(parser.parse_args().database)
    with PAIRS.open("w", encoding="utf-8", newline="\n") as file:
        for split, found in chosen.items():
            generator = random.Random(1)
            generator.shuffle(found)
            file.writelines(f"{split}\t{pair.synset}\t{pair.gloss}\t{pair.example}\n" for pair in found)
    print(f"{PAIRS.name}: " + ", ".join(f"{len(found)} synsets of {split}" for split, found in chosen.items()))


if __name__ == "__main__":
    main()
