"""The registry of tasks, and the tokenizers that map their documents to ids.

A task is added by one row of `TASKS` and one reader.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.layout import LAYOUTS, Layout

PADDING_ID = 0
VOCABULARY_WORDS = 20_000  # of the word level


class ByteTokenizer:
    """Map a byte to its value + 1, so that 0 stays free for padding. Gray levels count as bytes.

    The values are stored, not the ids: they fit into one byte.
    """

    vocab_size = 257
    dtype = np.uint8
    offset = 1  # id = stored value + offset

    def encode(self, data: bytes) -> np.ndarray:
        """Return the values (length,) uint8."""
        return np.frombuffer(data, self.dtype)


class WordTokenizer:
    """Map the words of a fixed vocabulary to ids: 1 is an unknown word, then the words in order.

    A word is a run of letters, digits and apostrophes in lower case; `<br />` is a space.
    """

    vocab_size = 2 + VOCABULARY_WORDS
    dtype = np.uint16
    offset = 0
    unknown_id = 1
    _word = re.compile(r"(?:[^\W_]|')+")

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self._ids = {word: i for i, word in enumerate(vocabulary, start=self.unknown_id + 1)}

    @classmethod
    def words(cls, text: str) -> list[str]:
        """Split a text into words."""
        return cls._word.findall(text.replace("<br />", " ").lower())

    @classmethod
    def build_vocabulary(cls, texts: Iterable[str]) -> list[str]:
        """Return the most frequent words of `texts`; ties are in alphabetical order."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(cls.words(text))
        return sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY_WORDS]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids (length,) uint16."""
        ids = [self._ids.get(word, self.unknown_id) for word in self.words(text)]
        return np.array(ids, self.dtype)


class ListOpsTokenizer:
    """Map ListOps expressions to ids: four operators, the closing bracket and ten digits.

    Parentheses only mark the binary tree of the generator and are dropped, as in LRA.
    """

    tokens = ("[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
    vocab_size = 1 + len(tokens)
    dtype = np.uint8
    offset = 0

    def __init__(self) -> None:
        self._ids = {token: i for i, token in enumerate(self.tokens, start=PADDING_ID + 1)}

    def encode(self, text: str) -> np.ndarray:
        """Return the ids (length,) uint8 of one expression.

        Raises:
            ValueError: the text holds a token that is not in the vocabulary, or no token.
        """
        words = text.replace("(", " ").replace(")", " ").split()
        if not words:
            raise ValueError("the expression is empty")
        try:
            return np.fromiter(map(self._ids.__getitem__, words), self.dtype, len(words))
        except KeyError as error:
            raise ValueError(
                f"unknown token {error.args[0]!r}; ListOps has {' '.join(self.tokens)}"
            ) from None


@dataclass(frozen=True)
class Task:
    """One row of the registry of tasks: its reader, its fixed properties and its defaults."""

    reader: str | type  # a `data.packing.Reader`, or "module:class", imported when it is opened
    tokenizer: type
    num_classes: int
    max_seq_len: int  # over all documents of an example
    num_segments: int
    layout: Layout | None = None  # where the files lie; None if the reader knows
    num_documents: int = 1
    is_image: bool = False  # the bytes are the gray levels of a square image
    truncated: bool = True  # a longer document keeps its first tokens; false: an error
    tab_separated: bool = False  # a document holds no tab
    title: str = ""  # on a model card
    hub_name: str = ""  # the data set's name on the Hugging Face Hub


TASKS = {
    "listops": Task(
        "lra_datasets:ListOps", ListOpsTokenizer, num_classes=10, max_seq_len=2048, num_segments=8,
        layout=LAYOUTS["listops"], truncated=False, tab_separated=True,
        title="Long Range Arena: ListOps", hub_name="lra-listops",
    ),
    "imdb": Task(
        "lra_datasets:Imdb", WordTokenizer, num_classes=2, max_seq_len=512, num_segments=2,
        layout=LAYOUTS["imdb"],
        title="IMDb, words", hub_name="stanfordnlp/imdb",
    ),
    "imdb_long": Task(
        "lra_datasets:Imdb", WordTokenizer, num_classes=2, max_seq_len=1536, num_segments=6,
        layout=LAYOUTS["imdb"],
        title="IMDb, words", hub_name="stanfordnlp/imdb",
    ),
    "imdb_lra": Task(
        "lra_datasets:Imdb", ByteTokenizer, num_classes=2, max_seq_len=4096, num_segments=8,
        layout=LAYOUTS["imdb"],
        title="Long Range Arena: byte-level IMDb", hub_name="stanfordnlp/imdb",
    ),
    "cifar10": Task(
        "lra_datasets:Cifar10", ByteTokenizer, num_classes=10, max_seq_len=1024, num_segments=4,
        layout=LAYOUTS["cifar10"], is_image=True, truncated=False,
        title="Long Range Arena: gray CIFAR-10", hub_name="uoft-cs/cifar10",
    ),
    "pathfinder32": Task(
        "lra_datasets:Pathfinder32", ByteTokenizer, num_classes=2, max_seq_len=1024, num_segments=4,
        layout=LAYOUTS["pathfinder32"], is_image=True, truncated=False,
        title="Long Range Arena: Pathfinder32", hub_name="lra-pathfinder32",
    ),
    "aan": Task(
        "lra_datasets:Aan", ByteTokenizer, num_classes=2, max_seq_len=8192, num_segments=16,
        layout=LAYOUTS["aan"], num_documents=2, tab_separated=True,
        title="Long Range Arena: ACL Anthology Network", hub_name="lra-aan",
    ),
}
