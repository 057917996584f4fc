"""`janax design`: what it reads and refuses, and what it writes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from janax.experiments import cli
from janax.experiments.design.config import Config
from janax.experiments.design.table import read
from janax.experiments.errors import UserError


def sequences(count, length=6, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(row) for row in np.array(list("ACGT"))[rng.integers(0, 4, (count, length))]]


def score(sequence):
    """Additive, with the optimum GGGGGG."""
    return sum({"A": 0.0, "C": 0.5, "G": 1.0, "T": -0.5}[letter] for letter in sequence)


def write(path, rows, header=("sequence", "score")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def table(path, **more):
    return read(Config(data=path, alphabet="dna", **more))


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.csv", [(s, score(s)) for s in sequences(60)])


def test_columns_are_found_by_name_by_kind_or_by_option(tmp_path):
    rows = [(i, s, 0.5 * i, score(s)) for i, s in enumerate(sequences(30))]
    named = table(write(tmp_path / "a.csv", rows, ("id", "Sequence", "other", "Fitness")))
    np.testing.assert_allclose(named.scores[:3], [score(s) for s in sequences(3)])
    by_kind = table(write(tmp_path / "b.csv", [(s, score(s)) for s in sequences(30)], ("what", "much")))
    assert by_kind.texts(by_kind.tokens, by_kind.lengths) == list(dict.fromkeys(sequences(30)))
    with pytest.raises(UserError, match=r"which column holds the scores\? Say --score-column NAME; the columns are id, what, other, much"):
        table(write(tmp_path / "c.csv", rows, ("id", "what", "other", "much")))
    chosen = table(tmp_path / "c.csv", score_column="other", sequence_column="what")
    np.testing.assert_allclose(chosen.scores[:3], [0, 0.5, 1])
    with pytest.raises(UserError, match="--score-column nothing: the file's columns are id, what, other, much"):
        table(tmp_path / "c.csv", score_column="nothing")


def test_fasta_and_tsv(tmp_path):
    records = "".join(f">design{i} score={score(s)}\n{s[:3]}\n{s[3:]}\n" for i, s in enumerate(sequences(30)))
    (tmp_path / "a.fasta").write_text(records)
    (tmp_path / "b.tsv").write_text("seq\ty\n" + "".join(f"{s}\t{score(s)}\n" for s in sequences(30)))
    for name in ("a.fasta", "b.tsv"):
        found = table(tmp_path / name)
        np.testing.assert_allclose(found.scores[:5], [score(s) for s in sequences(5)])
    (tmp_path / "c.fasta").write_text(">one\nACGT\n>two\nACGA\n")
    with pytest.raises(UserError, match=r"no header ends in a score; write `>name 1\.23`"):
        table(tmp_path / "c.fasta")


def test_what_is_left_out_or_averaged_is_said(tmp_path):
    rows = [(s, score(s)) for s in sequences(40)]
    rows += [(rows[0][0], rows[0][1] + 2), ("ACGTAC", ""), ("GGGTTT", "NA"), ("acgtaa", 0.25), ("ACG", 1.0)]
    found = table(write(tmp_path / "a.csv", rows))
    text = " ".join(found.notes)
    assert "2 rows without a score or a sequence were left out" in text
    assert "stand there more than once, with scores up to 2 apart; they have the mean" in text
    assert "Sequences are 3 to 6 letters long (most 6)" in text
    texts = found.texts(found.tokens, found.lengths)
    np.testing.assert_allclose(found.scores[texts.index(rows[0][0])], rows[0][1] + 1)
    assert "ACGTAA" in texts and found.tokens[texts.index("ACG")].tolist() == [0, 1, 2, 4, 4, 4]
    assert (table(tmp_path / "a.csv", minimize=True).scores == -found.scores).all()


@pytest.mark.parametrize(
    "rows,message",
    [
        ([(s, score(s)) for s in sequences(10)], "10 different sequences have scores, and a fit that can be judged needs 20"),
        ([(s, 1.5) for s in sequences(30)], "all scores are 1.5; there is nothing to learn from"),
        ([("ACGX", 1)] + [(s, score(s)) for s in sequences(30)], "row 2 holds 'X', which is none of ACGT .1 rows hold such letters"),
        ([(s, score(s)) for s in sequences(30)] + [("ACGTTT", "high")], "row 32 has the score 'high', expected a finite number"),
        ([], "holds no rows below a header"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        table(write(tmp_path / "a.csv", rows))


def test_other_letters_and_alphabets(tmp_path):
    path = write(tmp_path / "a.csv", [("ACGX", 1)] + [(s, score(s)) for s in sequences(30)])
    dropped = table(path, unknown="drop")
    assert "1 rows with letters other than ACGT were left out." in dropped.notes
    letters = tmp_path / "letters.txt"
    letters.write_text("A C\nG T X\n")
    assert read(Config(data=path, alphabet=str(letters))).letters == "ACGTX"
    with pytest.raises(UserError, match="neither dna nor protein nor a file"):
        read(Config(data=path, alphabet="rna"))
    letters.write_text("AAC")
    with pytest.raises(UserError, match="expected at least two letters, each once"):
        read(Config(data=path, alphabet=str(letters)))


def run(*arguments):
    return cli.main(["design", *map(str, arguments)])


def designs(out: Path):
    with (out / "designs.csv").open() as file:
        return list(csv.DictReader(file))


def test_designs_are_new_different_near_and_good(good, tmp_path, capsys):
    out = tmp_path / "out"
    limits = ("--num", 12, "--steps", 6, "--max-mutations", 3, "--min-distance", 2)
    assert run("--data", good, "--alphabet", "dna", "--out", out, *limits) == 0
    rows = designs(out)
    measured = {row["sequence"] for row in csv.DictReader(good.open())}
    texts = [row["sequence"] for row in rows]
    assert len(rows) == len(set(texts)) == 12 and not measured & set(texts)
    apart = [sum(a != b for a, b in zip(x, y)) for i, x in enumerate(texts) for y in texts[:i]]
    assert min(apart) >= 2
    for row in rows:
        nearest = min(sum(a != b for a, b in zip(row["sequence"], other)) for other in measured)
        assert nearest == int(row["distance"]) <= 3
        assert float(row["low"]) <= float(row["predicted"]) <= float(row["high"])
        np.testing.assert_allclose(float(row["predicted"]), score(row["sequence"]), atol=0.05)  # the truth is linear in the letters
    assert rows[0]["sequence"] == "GGGGGG"
    assert np.median([score(text) for text in texts]) > np.quantile([score(s) for s in measured], 0.9)
    shown = capsys.readouterr().out
    assert "Spearman" in shown and "designs.csv" in shown
    results = json.loads((out / "results.json").read_text())
    assert any("letters at their places" in str(row) for row in results["tables"][0]["rows"])
    assert (out / "report.html").exists()
    assert run("--data", good, "--alphabet", "dna", "--out", out, *limits) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_lower_is_better_and_lengths_may_differ(tmp_path):
    rows = [(s, score(s)) for s in (*sequences(40, 6), *sequences(20, 4, seed=1))]
    path, out = write(tmp_path / "a.csv", rows), tmp_path / "out"
    assert run("--data", path, "--alphabet", "dna", "--out", out, "--num", 6, "--steps", 3, "--minimize") == 0
    found = designs(out)
    assert {len(row["sequence"]) for row in found} <= {4, 6} and len(found) == 6
    assert float(found[0]["predicted"]) < np.median([value for _, value in rows])


def test_mistakes_are_one_sentence(good, tmp_path, capsys):
    assert run("--data", good, "--out", tmp_path / "o") == 2
    assert "design needs --alphabet" in capsys.readouterr().err
    assert run("--data", tmp_path / "none.csv", "--alphabet", "dna", "--out", tmp_path / "o") == 2
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "o").exists()
    assert run("--data", good, "--alphabet", "dna", "--out", tmp_path / "o", "--num", 0) == 2
    assert "num must be at least 1" in capsys.readouterr().err
