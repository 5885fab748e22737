"""What words alone reach on a data set: TF-IDF and a linear classifier, the figure to report beside a finetuned model.

Not a model of the project, and nothing runs it on a device. Imports `tools.datasets` and scikit-learn (extra "demo").
Run: `python -m tools.tfidf trec`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from edge_runtime.errors import EdgeError
from edge_runtime.optional import require
from tools.datasets import NAMES, Row, load


def tfidf_accuracy(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Share of `test` (0 to 1) that a linear SVM over the TF-IDF of single words and pairs labels right.

    Defaults of scikit-learn but for the pairs and the logarithm of counts; nothing is tuned. Deterministic.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    words = require("sklearn.feature_extraction.text", extra="demo")
    svm = require("sklearn.svm", extra="demo")
    vectorizer = words.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = svm.LinearSVC(random_state=0)
    model.fit(vectorizer.fit_transform([row.text for row in train]), [row.label for row in train])
    guesses = model.predict(vectorizer.transform([row.text for row in test]))
    return sum(bool(guess == row.label) for guess, row in zip(guesses, test, strict=True)) / len(test)


def sample(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """`count` of the rows at random, all for None or where there are no more."""
    rng = random.Random(seed)
    return sorted(rows, key=lambda _: rng.random())[:count]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the accuracy on one data set; -> the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.tfidf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--train-rows", type=int, help="train on so many at random (default: all)")
    parser.add_argument("--test-rows", type=int, help="test on so many at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (default: 0)")
    options = parser.parse_args(arguments)
    try:
        data = load(options.name, lambda line: print(line, file=sys.stderr))
        train = sample(data.train, options.train_rows, options.seed)
        test = sample(data.test, options.test_rows, options.seed)
        accuracy = tfidf_accuracy(train, test)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{data.name}: {accuracy:.1%} of {len(test)} with {len(train)} to learn from, TF-IDF and a linear SVM")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
