"""Properties of the generated ListOps data, checked against naive implementations."""

import functools
import hashlib
import json
import math
import os
import random
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import start_process, wait_for

import generate_lra
from data import listops
from data.generation import FORMAT_VERSION
from data.listops import generate_listops

SPLITS = ("train", "val", "test")
OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
# Two means of correct generators differ by more than this many standard errors about once in
# 16 000 comparisons; the seeds are fixed, so a pass stays a pass.
MAX_STANDARD_ERRORS = 4.0
# Bounds at which a recursive generator in Python is quick.
SHORT = {"min_length": 5, "max_length": 60}


def read_rows(folder: Path, split: str) -> list[tuple[str, str]]:
    header, *rows = (folder / f"basic_{split}.tsv").read_text().splitlines()
    assert header == "Source\tTarget"
    return [tuple(row.split("\t")) for row in rows]


def parse_pairs(source: str):
    """Read `( a b )` into (a, b), and anything else into the token itself."""
    tokens = iter(source.split(" "))

    def parse():
        token = next(tokens)
        if token != "(":
            assert token != ")"
            return token
        pair = (parse(), parse())
        assert next(tokens) == ")"
        return pair

    pairs = parse()
    assert next(tokens, None) is None
    return pairs


def to_tree(pairs):
    """Undo LRA's nesting ((((op, a), b), ...), ]) into (op, [a, b, ...]); digits become int."""
    if isinstance(pairs, str):
        return int(pairs)
    rest, end = pairs
    assert end == "]"
    args = []
    while not isinstance(rest, str):
        rest, arg = rest
        args.insert(0, to_tree(arg))
    assert rest in OPERATORS
    return rest, args


def render(tree) -> str:
    """Nest the tree into pairs and print them recursively, as LRA's to_string does."""

    def nest(tree):
        if isinstance(tree, int):
            return tree
        operator, args = tree
        pairs = operator
        for arg in args:
            pairs = (pairs, nest(arg))
        return (pairs, "]")

    def to_string(pairs) -> str:
        if isinstance(pairs, tuple):
            return "( " + to_string(pairs[0]) + " " + to_string(pairs[1]) + " )"
        return str(pairs)

    return to_string(nest(tree))


def evaluate(tree) -> int:
    return tree if isinstance(tree, int) else OPERATORS[tree[0]]([evaluate(a) for a in tree[1]])


def length_of(tree) -> int:
    return 1 if isinstance(tree, int) else 2 + sum(length_of(arg) for arg in tree[1])


def depth_of(tree) -> int:
    return 1 if isinstance(tree, int) else 1 + max(depth_of(arg) for arg in tree[1])


def operator_nodes(tree) -> list:
    if isinstance(tree, int):
        return []
    return [tree, *(node for arg in tree[1] for node in operator_nodes(arg))]


def naive_tree(rng: random.Random, depth: int = 1):
    """Draw one tree by the recursive definition of ListOps in LRA."""
    if depth < 10 and rng.random() < 0.25:
        args = [naive_tree(rng, depth + 1) for _ in range(rng.randint(2, 10))]
        return rng.choice(list(OPERATORS)), args
    return rng.randrange(10)


def naive_trees(seed: int, count: int, min_length: int, max_length: int) -> list:
    rng = random.Random(seed)
    distinct = {}
    while len(distinct) < count:
        tree = naive_tree(rng)
        if min_length < length_of(tree) < max_length:
            distinct.setdefault(render(tree), tree)
    return list(distinct.values())


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


@pytest.fixture(scope="module")
def full_length(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full")
    return generate_listops(out, seed=3, train=300, val=40, test=60, workers=1)


@pytest.fixture(scope="module")
def full_length_rows(full_length: Path) -> list[tuple[str, str]]:
    return [row for split in SPLITS for row in read_rows(full_length, split)]


@pytest.fixture(scope="module")
def short_trees(tmp_path_factory: pytest.TempPathFactory) -> list:
    out = tmp_path_factory.mktemp("short")
    folder = generate_listops(out, seed=4, train=8_000, val=1, test=1, workers=1, **SHORT)
    return [to_tree(parse_pairs(source)) for source, _ in read_rows(folder, "train")]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    one, three = (
        generate_listops(tmp_path / str(n), seed=7, train=2_000, val=30, test=30, workers=n)
        for n in (1, 3)
    )
    names = sorted(path.name for path in one.iterdir())
    assert names == ["GENERATED.json", "basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
    assert names == sorted(path.name for path in three.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (three / name).read_bytes()


def test_another_seed_gives_other_sequences(full_length: Path, tmp_path: Path) -> None:
    other = generate_listops(tmp_path, seed=8, train=300, val=40, test=60, workers=1)
    assert not set(read_rows(full_length, "train")) & set(read_rows(other, "train"))


def test_every_target_is_the_value_of_its_source(full_length_rows) -> None:
    for source, target in full_length_rows:
        assert target == str(evaluate(to_tree(parse_pairs(source))))


def test_depth_and_number_of_arguments_stay_in_range(full_length_rows) -> None:
    trees = [to_tree(parse_pairs(source)) for source, _ in full_length_rows]
    assert max(depth_of(tree) for tree in trees) == 10
    num_args = {len(node[1]) for tree in trees for node in operator_nodes(tree)}
    assert num_args == set(range(2, 11))


def test_every_source_is_its_pair_tree_printed(full_length_rows) -> None:
    for source, _ in full_length_rows:
        assert source == render(to_tree(parse_pairs(source)))


def test_known_tree_is_written_exactly() -> None:
    tree = ("[MAX", [3, ("[SM", [9, 4])])
    source = "( ( ( [MAX 3 ) ( ( ( [SM 9 ) 4 ) ] ) ) ] )"
    assert render(tree) == source and to_tree(parse_pairs(source)) == tree
    # The same tree as columns: the root, its two arguments, the two digits below.
    levels = [
        listops.Level(np.array([0]), np.array([2]), np.array([1])),
        listops.Level(np.array([0, 0]), np.array([0, 2]), np.array([3, 3])),
        listops.Level(np.array([0, 0]), np.array([0, 0]), np.array([9, 4])),
    ]
    values, sizes = listops.evaluate_and_measure(levels)
    codes = listops.lay_out(levels, sizes)
    assert b" ".join(listops.PIECES[code] for code in codes).decode() == source
    assert values.tolist() == [3]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_plain_python(name: str) -> None:
    rng = random.Random(0)
    groups = [[rng.randrange(10) for _ in range(rng.randint(2, 10))] for _ in range(300)]
    actual = listops.apply_operators(
        np.full(len(groups), list(OPERATORS).index(name)),
        np.array([len(group) for group in groups]),
        np.array([digit for group in groups for digit in group]),
    )
    assert actual.tolist() == [OPERATORS[name](group) for group in groups]


def test_lengths_lie_strictly_between_the_bounds(full_length_rows, short_trees) -> None:
    for source, _ in full_length_rows:
        counted = [token for token in source.split(" ") if token not in "()"]
        assert 500 < len(counted) < 2_000
    lengths = {length_of(tree) for tree in short_trees}
    # With this many sequences both extremes occur, so an off-by-one error would be found.
    assert (min(lengths), max(lengths)) == (6, 59)


def test_no_sequence_occurs_twice(tmp_path: Path) -> None:
    """At length 4 there are 4 operators x 100 digit pairs, so repeats are drawn all the time."""
    folder = generate_listops(
        tmp_path, seed=0, train=200, val=50, test=50, workers=1, min_length=3, max_length=5
    )
    sources = [source for split in SPLITS for source, _ in read_rows(folder, split)]
    assert len(set(sources)) == 300


@pytest.mark.parametrize(
    "statistic",
    [
        pytest.param(length_of, id="length"),
        pytest.param(lambda tree: length_of(tree) ** 2, id="squared length"),
        pytest.param(depth_of, id="depth"),
        pytest.param(evaluate, id="value"),
        pytest.param(lambda tree: evaluate(tree) == 0, id="value is 0"),
        pytest.param(lambda tree: len(tree[1]), id="arguments of the root"),
        pytest.param(lambda tree: isinstance(tree[1][0], int), id="first argument is a digit"),
        pytest.param(lambda tree: isinstance(tree[1][-1], int), id="last argument is a digit"),
        pytest.param(lambda tree: len(operator_nodes(tree)), id="operators"),
        pytest.param(lambda tree: len(operator_nodes(tree)[-1][1]), id="arguments of the last"),
        *(
            pytest.param(lambda tree, name=name: tree[0] == name, id=f"root is {name[1:]}")
            for name in OPERATORS
        ),
    ],
)
def test_distribution_is_that_of_the_recursive_definition(short_trees, statistic) -> None:
    ours = [float(statistic(tree)) for tree in short_trees]
    naive = [float(statistic(tree)) for tree in naive_reference()]
    standard_error = math.sqrt(
        statistics.variance(ours) / len(ours) + statistics.variance(naive) / len(naive)
    )
    difference = statistics.fmean(ours) - statistics.fmean(naive)
    assert abs(difference) < MAX_STANDARD_ERRORS * standard_error


@functools.cache
def naive_reference() -> list:
    return naive_trees(seed=1, count=4_000, **SHORT)


def test_record_describes_the_files(full_length: Path) -> None:
    record = json.loads((full_length / "GENERATED.json").read_text())
    assert record["task"] == "listops"
    assert record["seed"] == 3
    assert record["counts"] == {"train": 300, "val": 40, "test": 60}
    assert record["parameters"]["min_length"] == 500
    assert record["parameters"]["max_length"] == 2_000
    assert record["format_version"] == FORMAT_VERSION
    assert record["numpy"] == np.__version__
    assert record["sha256"] == {
        f"basic_{split}.tsv": hashlib.sha256(
            (full_length / f"basic_{split}.tsv").read_bytes()
        ).hexdigest()
        for split in SPLITS
    }


def test_command_writes_what_the_function_writes(full_length: Path, tmp_path: Path) -> None:
    options = "--seed 3 --train 300 --val 40 --test 60 --workers 1".split()
    assert generate_lra.main(["listops", "--out", str(tmp_path), *options]) == 0
    for path in full_length.iterdir():
        written = tmp_path / "lra_release" / "listops-1000" / path.name
        assert written.read_bytes() == path.read_bytes()


def test_existing_file_is_never_overwritten(tmp_path: Path, capsys) -> None:
    target = tmp_path / "lra_release" / "listops-1000" / "basic_val.tsv"
    target.parent.mkdir(parents=True)
    target.write_text("precious")
    assert generate_lra.main(["listops", "--out", str(tmp_path), "--seed", "0"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(target.parent) in message
    assert "exists; remove it or choose another" in message
    assert files_under(tmp_path) == [target] and target.read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--train", "0"], "train"),
        (["--train", "many"], "--train"),
        (["--workers", "0"], "workers"),
        (["--seed", "-1"], "seed"),
        (["--min_length", "0"], "min_length"),
        (["--min_length", "1", "--max_length", "4"], "max_length"),
        (["--color", "red"], "--color"),
    ],
)
def test_wrong_argument_exits_2_with_one_line(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    try:
        status = generate_lra.main(["listops", "--out", str(tmp_path), "--seed", "0", *options])
    except SystemExit as exit_:
        status = exit_.code
    message = capsys.readouterr().err
    assert status == 2
    assert message.count("\n") == 1 and named in message
    assert not list(tmp_path.iterdir())


def test_request_for_more_than_exists_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="400 distinct sequences"):
        generate_listops(
            tmp_path, seed=0, train=1_000, val=1, test=1, workers=1, min_length=3, max_length=5
        )
    assert not files_under(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_no_file(error: BaseException, tmp_path: Path, monkeypatch) -> None:
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(type(error)):
        generate_listops(tmp_path, seed=0, train=5, val=5, test=5, workers=1)
    assert not files_under(tmp_path)


@pytest.mark.parametrize("moment", ["imports of the workers", "rows"])
def test_ctrl_c_leaves_no_file_and_no_worker(moment: str, tmp_path: Path) -> None:
    process = start_process(
        "generate_lra.py", "listops", "--out", tmp_path, "--seed", 0, "--workers", 2,
        cwd=tmp_path, start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if moment == "rows":
        reached = lambda: any(path.stat().st_size for path in tmp_path.rglob("*.tsv"))  # noqa: E731
    else:  # two workers and the resource tracker of multiprocessing are started
        reached = lambda: len(children.read_text().split()) >= 3  # noqa: E731
    wait_for(process, reached)
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=60)  # workers hold the pipe until they end
    assert process.returncode == 130
    assert "Traceback" not in message
    assert not files_under(tmp_path)
