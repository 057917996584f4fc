import dataclasses
import hashlib
import importlib.resources
import tomllib
from pathlib import Path

import numpy as np
import pytest

from janax.experiments.bib import pretraining, tasks
from janax.experiments.errors import UserError
from janax.models import presets, sequence

ROOT = Path(__file__).parents[2]
DATA = ROOT / "experiments" / "data" / "tfbind8"


def number(text):
    return int(tasks.codes(np.array([[tasks.DNA.index(letter) for letter in text]]))[0])


# TFBind8.


def test_the_table_is_that_of_the_benchmark():
    with np.load(DATA / "tfbind8.npz") as data:
        table, order, published = data["score"], data["bench_order"], data["offline_rows"]
        np.testing.assert_array_equal(data["tokens"], tasks.all_sequences(8))
    assert len(table) == 65_536 and len(order) == 65_792
    rows = tasks.offline_rows(table[order], "half")
    assert len(rows) == 32_898
    np.testing.assert_array_equal(rows, published)
    assert np.median(table[order]) == np.float32(0.43929616)
    assert sorted(np.flatnonzero(table == table.max())) == [number("AGGTATCA"), number("TGATACCT")]


@pytest.mark.parametrize("factor", tasks.FACTORS)
def test_scores_are_those_of_either_strand(factor):
    _, oracle = tasks.tfbind8(factor)
    sequences = tasks.all_sequences(8)
    scores = oracle(sequences)
    np.testing.assert_array_equal(scores, oracle(tasks.reverse_complement(sequences)))
    assert (scores.min(), scores.max()) == (0.0, 1.0)
    assert oracle.num_queries == 2 * 65_536


@pytest.mark.parametrize(
    ("factor", "split", "count", "best"),
    [
        ("SIX6_REF_R1", "half", 32_898, 0.43929616),
        ("PAX4_REF_R1", "half", 32_896, 0.4354),
        ("POU3F4_REF_R1", "half", 32_896, 0.4414),
        ("SIX6_REF_R1", "lowest5000", 5_000, 0.2419),
        ("PAX4_REF_R1", "lowest5000", 5_000, 0.2537),
        ("POU3F4_REF_R1", "lowest5000", 5_000, 0.2520),
    ],
)
def test_offline_splits(factor, split, count, best):
    offline, oracle = tasks.tfbind8(factor, split)
    assert offline.tokens.shape == (count, 8) and offline.scores.shape == (count,)
    assert (offline.letters, offline.y_min, offline.y_max) == ("ACGT", 0.0, 1.0)
    assert abs(offline.scores.max() - best) < (1e-8 if count == 32_898 else 1e-4)
    np.testing.assert_array_equal(oracle(offline.tokens), offline.scores)
    if split == "half" and factor == tasks.FACTORS[0]:
        np.testing.assert_allclose((offline.scores.mean(), offline.scores.std()), (0.3261, 0.0764), atol=5e-5)


@pytest.mark.parametrize(("split", "distinct"), [("half", 127), ("lowest5000", 128)])
def test_starts_are_the_best_offline_designs(split, distinct):
    offline, oracle = tasks.tfbind8(split=split)
    rows = tasks.starts(offline)
    assert len(rows) == 128
    scores = offline.scores[rows]
    assert np.all(np.diff(scores) <= 0) and np.sum(offline.scores > scores[-1]) < 128
    assert np.all(np.diff(rows)[np.diff(scores) == 0] > 0)  # equal scores in the table's order
    designs = offline.tokens[rows]
    report = tasks.offline_report(oracle(designs), designs, y_min=0, y_max=1, starts=designs, training=offline.tokens)
    assert (report.distinct, report.unmoved, report.from_start, report.known) == (distinct, 128, 0.0, 128)
    np.testing.assert_allclose((report.max, report.median), (0.439, 0.439) if split == "half" else (0.242, 0.241), atol=5e-4)


def test_equal_scores_are_split_in_the_tables_order():
    scores = np.arange(7000.0)[::-1] // 2
    rows = tasks.offline_rows(np.concatenate([scores, scores]), "lowest5000")
    np.testing.assert_array_equal(rows, np.concatenate([np.arange(4500, 7000), np.arange(11500, 14000)]))
    ties = np.zeros(6000)
    np.testing.assert_array_equal(tasks.offline_rows(ties, "lowest5000"), np.arange(5000))
    assert len(tasks.offline_rows(ties, "half")) == 6000


# What a method sees.


def _arrays(record):
    return [np.asarray(field) for field in record]


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_what_is_offline_depends_on_no_other_score(split):
    """Scores outside the offline rows are exchanged, lowest and highest kept: not a bit of what a method sees changes."""
    with np.load(DATA / "tfbind8.npz") as data:
        table, order = data["score"], data["bench_order"]
    offline, oracle = tasks.table_problem("a table", table, split=split, order=order)
    hidden = np.setdiff1d(np.arange(65_536), tasks.codes(offline.tokens))
    free = hidden[table[hidden] < 1]
    other = table.copy()
    other[free] = np.random.default_rng(0).permutation(table[free])
    changed, wrong = tasks.table_problem("a table", other, split=split, order=order)
    for mine, theirs in zip(_arrays(offline), _arrays(changed)):
        np.testing.assert_array_equal(mine, theirs)
    assert np.mean(oracle(tasks.all_sequences(8)) != wrong(tasks.all_sequences(8))) > 0.3
    assert max(array.size for array in _arrays(offline)) == 8 * len(offline.scores)  # nothing as large as the table
    assert not any(isinstance(field, tasks.Oracle) or callable(field) for field in offline)


def test_a_method_that_asks_the_oracle_is_caught():
    offline, oracle = tasks.tfbind8(split="lowest5000")

    def cheat(offline):
        return offline.tokens[np.argsort(-oracle(offline.tokens))[:128]]

    with oracle.sealed(), pytest.raises(RuntimeError, match="oracle of tfbind8/SIX6_REF_R1/lowest5000: queried while methods design"):
        cheat(offline)
    assert oracle.num_queries == 0
    assert len(cheat(offline)) == 128 and oracle.num_queries == 5000  # open again


def test_the_oracle_wants_designs_of_its_task():
    _, oracle = tasks.tfbind8()
    with pytest.raises(ValueError, match=r"oracle: 'designs' has shape \(1, 7\), expected \[m l\] with l=8"):
        oracle(np.zeros((1, 7), int))
    with pytest.raises(ValueError, match="oracle: tokens are between 0 and 4, expected 0 to 3"):
        oracle(np.array([[0, 0, 0, 0, 0, 0, 0, 4]]))
    with pytest.raises(ValueError, match=r"oracle: tokens have shape \(1, 8\) and dtype float64, expected \[n l\] integers"):
        oracle(np.zeros((1, 8)))


# The panel.


def test_the_panel_leaves_out_every_replicate_of_the_design_tasks():
    panel = tasks.panel(["SIX6_REF_R1"])
    assert len(panel.names) == 55 and not any(name.startswith("SIX6") for name in panel.names)
    assert panel.scores.shape == (32_896, 55) and panel.pairs.shape == (32_896, 2, 8)
    np.testing.assert_array_equal(tasks.reverse_complement(panel.pairs[:, 0]), panel.pairs[:, 1])
    assert len(np.unique(tasks.codes(panel.pairs.reshape(-1, 8)))) == 65_536
    both = tasks.panel(tasks.FACTORS)
    assert len(both.names) == 51 and {name.partition("_")[0] for name in both.names}.isdisjoint({"SIX6", "PAX4", "POU3F4"})
    with np.load(DATA / "tfbind8.npz") as data:
        true = data["escore"][tasks.codes(panel.pairs[:, 0])]
    correlation = np.corrcoef(panel.scores.T, true)[-1, :-1]
    assert panel.names[int(np.argmax(correlation))] == "CRX_REF_R1" and abs(correlation.max() - 0.56) < 0.005
    with pytest.raises(ValueError, match="panel: 'without' names 'SIX7', expected some of ARX, BCL6"):
        tasks.panel(["SIX7_REF_R1"])


def test_bound_sequences():
    bound = pretraining.bound_sequences(tasks.panel("SIX6"))
    assert len(np.unique(tasks.codes(bound.reshape(-1, 8)))) == 18_636


# Other tasks.


def test_a_table_of_ten_letters_can_be_dropped_in(tmp_path):
    (tmp_path / "tfbind10").mkdir()
    weights = np.random.default_rng(0).standard_normal((10, 4))
    table = weights[np.arange(10), tasks.all_sequences(10)].sum(axis=1)
    np.savez(tmp_path / "tfbind10" / "tfbind10.npz", score=table)
    offline, oracle = tasks.tfbind10(tmp_path)
    assert len(offline.scores) == 4**10 // 2 and (offline.y_min, offline.y_max) == (0.0, 1.0)
    best = weights.argmax(axis=1)[None]
    assert oracle(best) == 1.0 and offline.scores.max() < 1
    assert len(tasks.tfbind10(tmp_path, "lowest5000").offline.scores) == 5000
    with pytest.raises(UserError, match=r"tfbind10.npz does not come with the package; name the directory that holds it by --data-dir"):
        tasks.tfbind10(None)
    with pytest.raises(ValueError, match=r"table_problem: 'scores' has shape \(63,\), expected \[v\^l\] with v=4"):
        tasks.table_problem("x", np.zeros(63))
    with pytest.raises(ValueError, match="table_problem: 'scores' of 'x' must be finite"):
        tasks.table_problem("x", np.full(64, np.nan))
    with pytest.raises(ValueError, match="offline_rows: 'scores' has 64 rows, expected at least 5000"):
        tasks.table_problem("x", np.arange(64.0), split="lowest5000")
    with pytest.raises(ValueError, match="offline_rows: 'split' is 'third', expected one of 'half', 'lowest5000'"):
        tasks.table_problem("x", np.arange(64.0), split="third")
    with pytest.raises(ValueError, match="tfbind8: 'factor' is 'SIX6', expected one of 'SIX6_REF_R1'"):
        tasks.tfbind8("SIX6")


def test_proteins_are_read_from_a_directory(tmp_path):
    (tmp_path / "aav").mkdir()
    tokens, scores = np.array([[0, 1], [2, 3], [0, 1], [4, 4]], np.uint8), np.array([1.0, 5.0, 4.0, 2.0], np.float32)
    path = tmp_path / "aav" / "aav2_28mer.npz"
    np.savez(path, alphabet=np.array(list(tasks.AMINO_ACIDS)), tokens=tokens, score=scores, wildtype=np.array([0, 2], np.uint8))
    library = tasks.protein("aav", tmp_path)
    np.testing.assert_array_equal(library.tokens, [[0, 1], [2, 3], [4, 4]])
    np.testing.assert_array_equal(library.scores, [2.5, 5.0, 2.0])
    assert library.letters == tasks.AMINO_ACIDS
    half = tasks.lower_half(library)
    np.testing.assert_array_equal(half.tokens, [[0, 1], [4, 4]])
    assert (half.y_min, half.y_max) == (2.0, 5.0)
    np.testing.assert_array_equal(tasks.lower_half(library, [3.0, 1.0, 2.0]).tokens, [[2, 3], [4, 4]])
    with pytest.raises(ValueError, match=r"lower_half: 'scores' has shape \(2,\), expected \[n\] with n=3 sequences"):
        tasks.lower_half(library, [1.0, 2.0])
    with pytest.raises(UserError, match=r"--data-dir .* has no e4b/e4b.npz; name a directory that has it"):
        tasks.protein("e4b", tmp_path)
    with pytest.raises(ValueError, match="protein: 'name' is 'gfp', expected one of 'avgfp', 'aav', 'e4b'"):
        tasks.protein("gfp", tmp_path)


# Reports.


def test_the_report_of_a_few_designs():
    designs = np.array([[0, 1, 2], [0, 1, 2], [3, 3, 3], [0, 0, 0]])
    scores = np.array([3.0, 3.0, 1.0, 5.0])
    starts, training = np.array([[0, 1, 1], [0, 1, 2], [3, 3, 3], [1, 1, 1]]), np.array([[0, 0, 1], [3, 3, 3]])
    report = tasks.offline_report(scores, designs, y_min=1.0, y_max=5.0, starts=starts, training=training)
    assert report == tasks.Report(
        count=4,
        max=1.0,
        median=0.5,
        mean=0.5,
        distinct=3,
        regret={"1": 0.5},
        from_start=1.0,
        unmoved=2,
        to_training=1.25,
        known=1,
    )
    many = tasks.offline_report(np.arange(128.0), np.arange(128)[:, None], y_min=0.0, y_max=127.0)
    assert many.regret == {"1": 1.0, "10": 1 - 9 / 127, "100": 1 - 99 / 127}
    assert many.from_start is None and many.known is None
    for bad in ({"scores": scores[:3]}, {"starts": starts[:2]}, {"training": starts[:, :2]}, {"y_max": 1.0}):
        with pytest.raises(ValueError, match="offline_report: "):
            tasks.offline_report(**({"scores": scores, "designs": designs, "y_min": 1.0, "y_max": 5.0} | bad))


def test_copies_are_replaced_by_the_next_best():
    designs = np.array([[0, 0], [1, 1], [0, 0], [0, 0], [2, 2]], np.int32)
    ranking = np.array([[1, 1], [3, 3], [0, 0], [2, 2], [1, 2]])
    np.testing.assert_array_equal(tasks.replace_duplicates(designs, ranking), [[0, 0], [1, 1], [3, 3], [1, 2], [2, 2]])
    np.testing.assert_array_equal(designs[2], [0, 0])
    with pytest.raises(ValueError, match="replace_duplicates: 'ranking' ends with 1 copies left to replace"):
        tasks.replace_duplicates(designs, ranking[:4])


def test_rank_correlation():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 20, 200), rng.standard_normal(200)
    np.testing.assert_allclose(tasks.spearman(a, a + b), scipy_stats.spearmanr(a, a + b).statistic, rtol=1e-12)
    assert np.isclose(tasks.spearman(np.arange(5), np.arange(5) ** 3), 1) and np.isnan(tasks.spearman(np.ones(3), np.arange(3)))


def test_sequences_and_their_numbers():
    sequences = tasks.all_sequences(3, 5)
    assert sequences.shape == (125, 3)
    np.testing.assert_array_equal(tasks.codes(sequences, 5), np.arange(125))
    assert tasks.strings(tasks.all_sequences(2)[:5], tasks.DNA) == ["AA", "AC", "AG", "AT", "CA"]
    np.testing.assert_array_equal(tasks.nearest(np.array([[0, 1], [2, 2]]), np.array([[0, 0], [1, 1]])), [1, 2])


# What is shipped.


def test_the_data_is_shipped_as_it_was_checked():
    readme = (DATA / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = {
        path
        for pattern in project["tool"]["setuptools"]["package-data"]["janax.experiments"]
        for path in (ROOT / "experiments").glob(pattern)
    }
    assert set(DATA.iterdir()) <= shipped
    for path in DATA.glob("*.npz"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() + f"  {path.name}" in readme
    assert importlib.resources.files("janax.experiments").joinpath("data/tfbind8/tfbind8.npz").is_file()


# Pre-training.

TINY = dataclasses.replace(sequence.DNA_KMERS, config=dataclasses.replace(presets.DNA_KMERS, width=16, depth=1, heads=2, hidden=16))
SHORT = pretraining.Recipe(num_steps=30, batch_size=64, learning_rate=1e-2)


@pytest.mark.slow
def test_pre_training_learns_and_repeats_itself(tmp_path):
    objective = pretraining.Objective(regression=1.0, masked=0.1)
    calls = []

    def compute():
        calls.append(1)
        return pretraining.dna(1, without=["SIX6"], model=TINY, objective=objective, recipe=SHORT, held_out=100)

    trained = compute()
    assert trained.info["sequences"] == 2 * (32_896 - 100)
    assert trained.info["r2"] > 0.3 and trained.info["nats"] < 4.3 and 0 <= trained.info["accuracy"] < 0.3  # log 69 = 4.23
    again = pretraining.kept(tmp_path / "encoder", TINY, compute)
    read = pretraining.kept(tmp_path / "encoder", TINY, compute)
    assert len(calls) == 2 and again.model == read.model == TINY and again.info == trained.info
    sequences = tasks.all_sequences(8)[::97]
    phi = pretraining.all_features(trained, sequences)
    assert phi.shape == (676, 16) and phi.dtype == np.float64
    for other in (again, read):
        np.testing.assert_array_equal(pretraining.all_features(other, sequences), phi)
    with pytest.raises(ValueError, match="holds another network than the one asked for"):
        pretraining.kept(tmp_path / "encoder", sequence.DNA_KMERS, compute)


def test_masked_pre_training_of_proteins():
    rng = np.random.default_rng(0)
    model = dataclasses.replace(
        sequence.PROTEIN_SMALL, config=dataclasses.replace(presets.PROTEIN_SMALL, width=16, depth=1, heads=2, hidden=16, max_length=20)
    )
    tokens = np.where(rng.random((300, 20)) < 0.1, rng.integers(0, 20, (300, 20)), rng.integers(0, 20, 20)).astype(np.int32)
    trained = pretraining.protein(0, tokens, model=model, recipe=dataclasses.replace(SHORT, num_steps=60, batch_size=32))
    assert trained.info["sequences"] == 285 and trained.info["nats"] < 2.5  # log 20 = 3.0 without the positions' residues


def test_the_ridge_recovers_scores_that_are_linear():
    sequences = tasks.all_sequences(6)
    phi = np.concatenate([np.eye(4)[sequences].reshape(-1, 24), np.ones((4096, 1))], axis=1)
    problem = tasks.table_problem("linear", phi @ np.random.default_rng(0).standard_normal(25))
    quality = pretraining.ridge_quality(phi, *problem)
    assert quality["spearman"] > 0.999 and quality["top_max"] == 1.0


def test_pre_training_errors():
    with pytest.raises(ValueError, match=r"Objective: 'regression' is 0.0 and 'masked' 0.0, expected one above 0"):
        pretraining.Objective()
    with pytest.raises(ValueError, match="Recipe: 'num_steps' must be positive, got 0"):
        pretraining.Recipe(num_steps=0)
    batch = sequence.Batch(np.zeros((4, 8), np.int32))
    with pytest.raises(ValueError, match="train: the objective regresses, and 'training' or 'validation' has no targets"):
        pretraining.train(TINY, pretraining.REGRESSION, SHORT, batch, batch, seed=0)
    with pytest.raises(FloatingPointError, match="pre-training: the loss is nan after 30 steps"):
        bad = sequence.Batch(np.zeros((4, 8), np.int32), None, np.full((4, 2), np.inf, np.float32))
        pretraining.train(TINY, pretraining.REGRESSION, SHORT, bad, bad, seed=0)
