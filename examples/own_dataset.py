"""A data set of your own: a CSV file with the columns `text` and `label`.

    python examples/own_dataset.py --config examples/own_dataset.yaml
    python examples/own_dataset.py --checkpoint runs/own/best.pt --predict FILE

This program is `run_train.py` with one more row in the registry of tasks, so it accepts the same
arguments. The file is `<data_dir>/own/examples.csv`. A tenth of its rows is held out for validation
and a tenth for the test, by `seed`. If the file is absent, a small example is written. A reader of
text files in one folder per class is in docs/extending.md.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a repository, not a package

import run_train
from data.layout import Layout
from data.reader import DataError, Example, Reader, located
from data.tasks import TASKS, ByteTokenizer, Task
from run.files import atomic_write

CLASSES = ("asks", "states")
csv.field_size_limit(16 * 2**20)  # characters of a text


class CsvFile(Reader):
    """Rows of `examples.csv`, their texts as bytes."""

    advice = "a header `text,label` and a row per example"

    def prepare(self) -> None:
        path = self.folder / "examples.csv"
        if not path.exists():
            write_toy(path)
        super().prepare()

    def origin(self) -> str:
        return "own"

    def examples(self, part: str) -> Iterator[Example]:
        """Yield the bytes of each text, cut to `max_seq_len`, and the number of its class."""
        (path,) = self.sources(part)
        # Bytes that are not UTF-8 stay unchanged.
        with located(path, self.advice), open(
            path, encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                text, label = row.get("text"), row.get("label")
                if not text or label not in CLASSES:
                    raise DataError(
                        f"{path} row {number}: needs a text and a label of {', '.join(CLASSES)}"
                    )
                document = self.tokenizer.encode(text.encode(errors="surrogateescape"))
                yield (document[: self.config.max_seq_len],), CLASSES.index(label)


TASKS["own"] = Task(
    CsvFile, ByteTokenizer, num_classes=len(CLASSES), max_seq_len=256, num_segments=4,
    layout=Layout(("own",), {"all": ("examples.csv",)}),
)


def write_toy(path: Path) -> None:
    """Write 2,000 texts of random letters, whose class is a mark somewhere among them."""
    letters = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(2_000):
            text = letters.choices("abcdefgh     ", k=letters.randrange(50, 250))
            text[letters.randrange(len(text))] = "?!"[number % 2]
            rows.writerow(["".join(text), CLASSES[number % 2]])


if __name__ == "__main__":
    sys.exit(run_train.main())
