"""Key/value heads of all-MiniLM-L6-v2 pooled: averaged, averaged and refitted, and regrouped as well.

    python benchmarks/pooling.py --groups 6 4 3 --update

Of its 12 key/value heads this many remain in every layer, without retraining: recall and cosine as in quality.py. Smaller
`--pairs` and `--texts` are faster and less precise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from quality import conditions, minilm_table, read_pairs
from readme import put_table

from lissom.frontends.models.huggingface import load

WAYS = (",align=false,regroup=false", ",regroup=false", "")


def pipelines(groups: Iterable[int]) -> list[str]:
    """Every method of pooling, at each number of heads."""
    return [f"pool-heads{{groups={left}{way}}},merge-equal-heads" for left in groups for way in WAYS]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[6, 4, 3], help="key/value heads that remain; %(default)s by default"
    )
    parser.add_argument("--pairs", type=int, help="evaluated synsets; all of them by default")
    parser.add_argument("--texts", type=int, default=1000, help="calibration texts; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    texts = read_pairs("evaluation", options.pairs)
    printed = minilm_table(load("minilm"), pipelines(options.groups), texts, options.texts)
    printed = f"{printed}\n{conditions()}; {len(texts.glosses)} pairs, {options.texts} calibration texts.\n"
    print(printed)
    if options.update:
        put_table("pooling", printed)


if __name__ == "__main__":
    main()
