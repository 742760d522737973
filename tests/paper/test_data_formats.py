"""Official files give the right token ids, labels and batches; generated data obey the rules."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import small_config
from PIL import Image

from data.packing import load_splits
from data.tasks import TASKS
from dataloader import collate
from generate_lra import generate_listops, generate_pathfinder
from lra_config import make_config
from lra_datasets import open_dataset

CPU = torch.device("cpu")


def read(data: Path, dataset: str, part: str, **changes) -> list[tuple[list[list[int]], int]]:
    """Return the examples of a split: (token ids of each document, label)."""
    reader = open_dataset(make_config({"dataset": dataset, "data_dir": str(data), **changes}))
    return [
        ([(document.astype(int) + reader.tokenizer.offset).tolist() for document in documents],
         label)
        for documents, label in reader.examples(part)
    ]


def splits(data: Path, dataset: str, **changes):
    config = make_config({"dataset": dataset, "data_dir": str(data), **changes})
    return config, load_splits(open_dataset(config))


# ---- ListOps -------------------------------------------------------------------------------------

EXPRESSION = "( ( ( ( [MED 7 ) ( ( ( ( [SM 3 ) 0 ) ( ( ( [MIN 9 ) [MAX ) ] ) ) ] ) ) 8 ) ] )"


@pytest.mark.parametrize("depth", ["lra_release", "lra_release/lra_release"])
def test_listops_drops_the_parentheses_and_the_header_at_both_depths(tmp_path, depth):
    folder = tmp_path / depth / "listops-1000"
    folder.mkdir(parents=True)
    for part in ("train", "val", "test"):
        (folder / f"basic_{part}.tsv").write_text(f"Source\tTarget\n{EXPRESSION}\t7\n( 4 )\t4\n")
    rows = read(tmp_path, "listops", "val")
    # 1-4 the operators MIN MAX MED SM, 5 the bracket, 6-15 the digits; 0 is padding alone.
    assert rows == [([[3, 13, 4, 9, 6, 1, 15, 2, 5, 5, 14, 5]], 7), ([[10]], 4)]
    assert TASKS["listops"].tokenizer.vocab_size == 16 and TASKS["listops"].num_classes == 10


def evaluate(source: str) -> tuple[int, int, int, set[int]]:
    """Return value, tokens, depth and numbers of arguments of a ListOps source."""
    stack: list[list] = [[]]
    counts, depth = set(), 1
    tokens = source.replace("(", "").replace(")", "").split()
    for token in tokens:
        if token.startswith("["):
            stack.append([token])
            depth = max(depth, len(stack))
        elif token == "]":
            operator, *arguments = stack.pop()
            counts.add(len(arguments))
            ordered = sorted(arguments)
            middle = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
            stack[-1].append({
                "[MIN": ordered[0], "[MAX": ordered[-1], "[SM": sum(ordered) % 10,
                "[MED": int(middle / 2),
            }[operator])
        else:
            stack[-1].append(int(token))
    ((value,),) = stack
    return value, len(tokens), depth, counts


def test_generated_listops_obey_the_rules(tmp_path):
    """Values, lengths within the bounds, 2 to 10 arguments, depth at most ten, no duplicates."""
    folder = generate_listops(
        tmp_path, seed=0, train=400, val=50, test=50, workers=1, min_length=20, max_length=200
    )
    rows = [
        line.split("\t") for part in ("train", "val", "test")
        for line in (folder / f"basic_{part}.tsv").read_text().splitlines()[1:]
    ]
    measured = [evaluate(source) for source, _ in rows]
    assert [value for value, *_ in measured] == [int(target) for _, target in rows]
    assert all(20 < length < 200 for _, length, _, _ in measured)
    assert max(depth for _, _, depth, _ in measured) == 10
    assert set().union(*(counts for *_, counts in measured)) == set(range(2, 11))
    assert len({source for source, _ in rows}) == 500
    parameters = json.loads((folder / "GENERATED.json").read_text())["parameters"]
    assert parameters["operator_probability"] == 0.25 and parameters["max_depth"] == 10


def test_generated_listops_have_the_published_sizes_unless_told_otherwise():
    parameters = inspect.signature(generate_listops).parameters
    published = {
        "train": 96_000, "val": 2_000, "test": 2_000, "min_length": 500, "max_length": 2_000
    }
    assert {name: parameters[name].default for name in published} == published


# ---- text ----------------------------------------------------------------------------------------


def write_imdb(data: Path, reviews: int = 20) -> None:
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            folder = data / "aclImdb" / part / label
            folder.mkdir(parents=True)
            for i in range(reviews):
                (folder / f"{i:02}_7.txt").write_text(f"It's {label}!<br />No. {i}, café", "utf-8")


def test_a_byte_is_its_value_plus_one_and_pos_is_label_one(tmp_path):
    write_imdb(tmp_path, 2)
    text = "It's neg!<br />No. 0, café".encode()
    rows = read(tmp_path, "imdb_lra", "test")
    assert rows[0] == ([[byte + 1 for byte in text]], 0)
    assert [label for _, label in rows] == [0, 0, 1, 1]
    assert TASKS["imdb_lra"].tokenizer.vocab_size == 257


def test_the_first_bytes_are_kept(tmp_path):
    write_imdb(tmp_path, 2)
    rows = read(tmp_path, "imdb_lra", "train", max_seq_len=8, num_segments=2)
    assert rows[0][0] == [[ord(c) + 1 for c in "It's neg"]]


def test_words_are_lower_case_runs_of_letters_digits_and_apostrophes(tmp_path):
    """Ids start at 2, by frequency, then in alphabetical order; 1 is the unknown word."""
    write_imdb(tmp_path)
    reader = open_dataset(make_config({"dataset": "imdb", "data_dir": str(tmp_path)}))
    words = reader.tokenizer.vocabulary
    # Every review has the first three words, and half of them each of the next two.
    assert words[:3] == ["café", "it's", "no"] and set(words[3:5]) == {"neg", "pos"}
    (review,), label = read(tmp_path, "imdb", "test")[0]  # It's neg!<br />No. 0, café
    assert review == [3, words.index("neg") + 2, 4, words.index("0") + 2, 2] and label == 0
    assert reader.tokenizer.encode("never IT'S").tolist() == [1, 3]
    assert reader.tokenizer.vocab_size == 20_002


# ---- images --------------------------------------------------------------------------------------

COLOURS = {  # gray = 0.2989 R + 0.5870 G + 0.1140 B, to the nearest
    (255, 0, 0): 76, (0, 255, 0): 150, (0, 0, 255): 29, (255, 255, 255): 255, (0, 0, 0): 0,
    (1, 1, 1): 1, (10, 20, 30): 18, (200, 100, 7): 119,
}


def test_cifar10_is_gray_in_raster_order_with_red_green_and_blue_weighted(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.zeros((10, 3, 1024), dtype=np.uint8)
    for place, color in enumerate(COLOURS):
        images[3, :, place] = color
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": images.reshape(10, 3072), b"labels": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}
        (folder / name).write_bytes(pickle.dumps(batch))
    rows = read(tmp_path, "cifar10", "train")
    assert [label for _, label in rows] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0] * 5
    (tokens,), label = rows[3]
    assert tokens == [gray + 1 for gray in COLOURS.values()] + [1] * (1024 - len(COLOURS))
    assert label == 6
    _, found = splits(tmp_path, "cifar10")
    assert [len(found[name]) for name in ("train", "val", "test")] == [45, 5, 10]


def test_pathfinder_rows_name_the_image_and_the_label_and_empty_images_are_counted(tmp_path):
    folder = tmp_path / "lra_release" / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for batch in (2, 10):  # in the order of the numbers, not of the letters
        images = folder / "imgs" / str(batch)
        images.mkdir(parents=True)
        for i in range(10):
            pixels = (np.arange(1024) // 4 % 256).astype(np.uint8).reshape(32, 32)
            pixels[0, 0] = 10 * batch + i
            Image.fromarray(pixels).save(images / f"sample_{i}.png")
        (folder / "metadata" / f"{batch}.npy").write_text("".join(
            f"imgs/{batch} sample_{i}.png {i} {int(i in (1, 4))} 1.0 14\n" for i in range(10)
        ))
    (folder / "imgs/2/sample_3.png").write_bytes(b"")
    config = make_config({"dataset": "pathfinder32", "data_dir": str(tmp_path)})
    reader = open_dataset(config)
    rows = [(document, label) for (document,), label in reader.examples("all")]
    assert [int(document[0]) for document, _ in rows] == [
        20, 21, 22, 24, 25, 26, 27, 28, 29, *range(100, 110)
    ]
    assert [label for _, label in rows] == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert rows[0][0][1:].tolist() == (np.arange(1, 1024) // 4 % 256).tolist()
    assert reader.skipped == 1 and reader.tokenizer.offset == 1


def test_generated_pathfinder_has_the_published_parameters(tmp_path):
    folder = generate_pathfinder(tmp_path, seed=0, images=4, workers=1)
    record = json.loads((folder / "GENERATED.json").read_text())
    published = {
        "contour_length": 14, "distractor_length": 4, "num_distractors": 5, "paddle_length": 2,
        "paddle_thickness": 0.5, "paddle_margin": 1, "seed_distance": 7.0, "marker_radius": 1.5,
        "continuity": 1.0, "padding": 1.0, "antialias_scale": 2, "snake_contrast": 2.0,
        "paddle_contrast": 0.75, "size": 32,
    }
    assert {key: record["parameters"][key] for key in published} == published
    assert record["counts"] == {"images": 4, "label_0": 2, "label_1": 2}
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])
    assert images.shape == (4, 32, 32) and images.dtype == np.uint8


# ---- pairs of documents --------------------------------------------------------------------------


def write_aan(data: Path) -> None:
    folder = data / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for part in ("train", "eval", "test"):
        rows = f'1.0\ta1\tb1\tq "{part}\tsecond\n0.0\ta2\tb2\t{"x" * 5_000}\ty\n'
        (folder / f"new_aan_pairs.{part}.tsv").write_text(rows)


def test_a_pair_is_two_documents_cut_to_half_the_sequence_each(tmp_path):
    write_aan(tmp_path)
    rows = read(tmp_path, "aan", "val")
    assert rows[0] == ([[ord(c) + 1 for c in 'q "eval'], [ord(c) + 1 for c in "second"]], 1)
    (first, second), label = rows[1]
    assert (first, second, label) == ([ord("x") + 1] * 4096, [ord("y") + 1], 0)


@pytest.mark.parametrize("row", [0, 1])
def test_the_second_document_starts_at_4096_whatever_the_first_one_holds(tmp_path, row):
    write_aan(tmp_path)
    config, found = splits(tmp_path, "aan")
    batch = collate(found["test"], np.array([row]), config, CPU)
    letter = "sy"[row]
    assert batch.tokens[0, 4096] == ord(letter) + 1
    mask = batch.mask[0]
    assert mask.sum() == ((7 + 6) if row == 0 else (4096 + 1))
    assert mask[:4096].sum() == (7 if row == 0 else 4096)
    assert (batch.tokens[0] != 0).equal(mask)


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_with_zeros_and_keeps_rows_and_labels_together(tmp_path):
    folder = tmp_path / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    sources = ["1", "[MAX 2 3 ]", "[SM 4 5 6 7 ]", "8 9"]
    for part in ("train", "val", "test"):
        (folder / f"basic_{part}.tsv").write_text("Source\tTarget\n" + "".join(
            f"{source}\t{label}\n" for label, source in enumerate(sources)
        ))
    config = small_config(data_dir=str(tmp_path))
    split = load_splits(open_dataset(config))["train"]
    batch = collate(split, np.array([2, 0, 3]), config, CPU)
    assert batch.labels.tolist() == [2, 0, 3]
    assert batch.tokens.tolist() == [
        [4, 10, 11, 12, 13, 5, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0], [14, 15, 0, 0, 0, 0, 0, 0]
    ]
    assert batch.mask.sum(dim=1).tolist() == [6, 1, 2] and (batch.tokens != 0).equal(batch.mask)
    # Padded to full segments if shapes must be few; without a mask if nothing is padded.
    whole = collate(split, np.array([0]), config, CPU, whole_segments=True)
    assert whole.tokens.shape == (1, 4)
    assert collate(split, np.array([1]), config, CPU).mask is None


def test_a_tenth_of_the_training_reviews_is_held_out_for_selection(tmp_path):
    write_imdb(tmp_path)
    _, found = splits(tmp_path, "imdb_lra")
    assert {name: len(split) for name, split in found.items()} == {
        "train": 36, "val": 4, "test": 40
    }
    starts = np.concatenate([found["train"].starts, found["val"].starts]).ravel()
    assert len(np.unique(starts)) == 40


def test_pathfinder_is_split_eight_to_one_to_one(tmp_path):
    folder = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    (folder / "imgs" / "0").mkdir(parents=True)
    for i in range(40):
        Image.new("L", (32, 32), i).save(folder / f"imgs/0/sample_{i}.png")
    rows = "".join(f"imgs/0 sample_{i}.png {i} {i % 2} 1.0\n" for i in range(40))
    (folder / "metadata" / "0.npy").write_text(rows)
    _, found = splits(tmp_path, "pathfinder32")
    assert [len(found[name]) for name in ("train", "val", "test")] == [32, 4, 4]
    starts = np.concatenate([split.starts.ravel() for split in found.values()])
    assert len(np.unique(starts)) == 40
