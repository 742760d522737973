"""Pairs cut from reviews: only the match of the two parts reveals the label."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import generate_lra
from data.packing import load_splits
from data.review_pairs import cut, generate_review_pairs
from lra_config import make_config
from lra_datasets import open_dataset

REVIEWS = 60  # per sentiment and part
PARTS = {"train": "train", "eval": "train", "test": "test"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for sentiment, ratings in (("neg", (1, 4)), ("pos", (7, 10))):
            (folder / "aclImdb" / part / sentiment).mkdir(parents=True)
            for number in range(REVIEWS):
                words = [f"{part}{sentiment}{number}w{i}" for i in range(rng.integers(2, 60))]
                name = f"{number}_{ratings[number % 2]}.txt"
                text = "\t".join(words[:2]) + "\n" + " ".join(words[2:]) + "<br />end"
                (folder / "aclImdb" / part / sentiment / name).write_text(text)
    generate_review_pairs(folder, seed=0)
    return folder


def rows(data: Path, split: str) -> list[list[str]]:
    text = (data / f"lra_release/tsv_data/new_aan_pairs.{split}.tsv").read_text()
    return [line.split("\t") for line in text.splitlines()]


def review(data: Path, name: str) -> str:
    part, sentiment, file = name.split("_", 2)
    text = (data / "aclImdb" / part / sentiment / f"{file}.txt").read_text()
    return text.replace("\t", " ").replace("\n", " ").replace("<br />", " ")


@pytest.mark.parametrize("split", PARTS)
def test_a_pair_is_the_two_parts_of_one_review_or_of_two_of_one_rating(data, split):
    for label, a, b, first, second in rows(data, split):
        assert review(data, a).startswith(first)
        assert review(data, b).endswith(second)
        assert a.startswith(PARTS[split]) and b.startswith(PARTS[split])
        assert (label == "1.0") == (a == b)
        assert a.split("_")[-1] == b.split("_")[-1]
        if a == b:
            assert f"{first} {second}" == review(data, a)


@pytest.mark.parametrize("split", PARTS)
def test_labels_are_balanced_and_each_part_is_in_one_pair(data, split):
    found = rows(data, split)
    assert Counter(row[0] for row in found) == {"0.0": len(found) / 2, "1.0": len(found) / 2}
    for column in (1, 2):
        assert len({row[column] for row in found}) == len(found)


def test_no_review_is_in_two_files(data):
    names = [row[1] for split in PARTS for row in rows(data, split)]
    assert len(set(names)) == len(names)


def test_partners_of_a_negative_pair_are_neighbors_in_length(data):
    by_rating: dict[str, list[str]] = {}
    for row in rows(data, "test"):
        by_rating.setdefault(row[1].split("_")[-1], []).append(row[1])
    for names in by_rating.values():
        names.sort(key=lambda name: len(review(data, name)))
    for _, a, b, _, _ in rows(data, "test"):
        names = by_rating[a.split("_")[-1]]
        assert abs(names.index(a) - names.index(b)) <= 3  # reviews in between may have no partner


def test_a_cut_falls_on_a_space_and_loses_nothing_else():
    text = b"one two three four five"
    for share in (0.1, 0.4, 0.6, 0.95):
        assert b" ".join(cut(text, share)) == text
    assert b"".join(cut(b"unbroken", 0.5)) == b"unbroken"


def test_the_record_and_the_reader_call_it_a_substitute(data):
    record = json.loads((data / "lra_release/tsv_data/GENERATED.json").read_text())
    assert record["counts"] == {split: len(rows(data, split)) for split in PARTS}
    reader = open_dataset(make_config({"dataset": "aan", "data_dir": str(data)}))
    assert "substitute for AAN" in reader.origin()
    assert len(load_splits(reader)["val"]) == record["counts"]["eval"]


def test_the_command_line_writes_the_same_bytes_and_names_what_is_missing(data, tmp_path, capsys):
    command = ["review_pairs", "--seed", "0", "--out"]
    assert generate_lra.main([*command, str(tmp_path), "--imdb", str(data / "aclImdb")]) == 0
    for split in PARTS:
        assert rows(tmp_path, split) == rows(data, split)
    assert generate_lra.main([*command, str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "get_lra_data.sh imdb" in message
    assert not (tmp_path / "none" / "lra_release").exists()
