"""`densityrl preferences`: figures of a file of choices, and tables out of it and into it."""

import csv
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from densityrl.cli import app, main
from densityrl.preference import read_preferences
from densityrl.preference.agreement import agreement, describe_agreement
from densityrl.preference.store import Pair, PreferenceStore, Sample


def run(*arguments):
    """Output of a command that ends well."""
    result = CliRunner().invoke(app, ["preferences", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that does not; its message, of one line."""

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["densityrl", "preferences", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        said = capsys.readouterr()
        message = said.err.strip()
        assert message.startswith("densityrl: ")
        assert "\n" not in message
        assert said.out == ""
        return message

    return refused


@pytest.fixture
def database(tmp_path):
    """ann prefers 0 to 1 and 3 to 2, after she took back the contrary, and skips the third."""
    path = tmp_path / "choices.db"
    with PreferenceStore(path, create=True) as store:
        store.describe({"truncation_psi": 1.0})
        for number in range(3):
            store.plan(number, Pair(Sample(2 * number, 1.0), Sample(2 * number + 1, 1.0), "random"))
        store.add_annotator("ann")
        one, two, three = store.upcoming("ann", 3, pairs=3, repeats=0)
        store.choose("ann", one.id, "first", request="a", seconds=2.0)
        store.undo("ann", store.choose("ann", two.id, "first", request="b"))
        store.choose("ann", two.id, "second", request="c", seconds=4.0)
        store.choose("ann", three.id, "skip", request="d", reason="a hole")
    return path


def rows(path):
    table = read_preferences(path)
    return list(
        zip(table.winners.tolist(), table.losers.tolist(), table.annotators.tolist(), strict=True)
    )


def test_stats(database):
    with PreferenceStore(database) as store:
        figures = agreement(store)
    said = run("stats", "--db", database)
    assert said == describe_agreement(figures) + "\n"
    assert "ann: 3 choices (3 random), 2 decided, 0 ties, 1 skipped, 1 undone" in said
    assert "median time of a choice: 3.0 s" in said


def test_stats_for_programs(database):
    figures = json.loads(run("stats", "--db", database, "--json"))
    with PreferenceStore(database) as store:
        assert figures == json.loads(json.dumps(agreement(store), allow_nan=False))
    assert figures["decided"] == 2
    assert figures["annotators"]["ann"]["skip_reasons"] == {"a hole": 1}
    assert figures["krippendorff_alpha"] is None


def test_stats_of_a_new_file(tmp_path):
    PreferenceStore(tmp_path / "new.db", create=True).close()
    assert run("stats", "--db", tmp_path / "new.db") == "pairs: none\ndecided, for training: 0\n"


def test_export(database, tmp_path):
    out = tmp_path / "out.csv"
    assert run("export", "--db", database, "--out", out) == f"2 decided pairs in {out}\n"
    assert rows(out) == rows(database) == [(0, 1, "ann"), (3, 2, "ann")]
    assert out.read_text().startswith("winner,loser,annotator,seconds,time,source\n")


def test_export_of_the_log(database, tmp_path):
    out = tmp_path / "log.csv"
    assert run("export", "--db", database, "--out", out, "--log") == f"4 choices in {out}\n"
    with out.open(newline="") as file:
        log = list(csv.DictReader(file))
    assert [row["answer"] for row in log] == ["first", "first", "second", "skip"]
    assert [bool(row["undone"]) for row in log] == [False, True, False, False]
    assert log[3]["reason"] == "a hole"


def test_export_replaces_a_file_and_leaves_the_store(database, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("before")
    run("export", "--db", database, "--out", out)
    once = out.read_bytes()
    run("export", "--db", database, "--out", out)
    assert out.read_bytes() == once != b"before"


def test_import_into_a_new_file(tmp_path):
    (tmp_path / "ranks.csv").write_text("rank1,rank2,rank3\n4,3,2\n8,7,\n")
    new = tmp_path / "new.db"
    said = run("import", "--db", new, "--preferences", tmp_path / "ranks.csv")
    assert said == f"4 pairs added to {new}; 0 were there already\n"
    expected = [(4, 3), (4, 2), (3, 2), (8, 7)]
    assert rows(new) == [(winner, loser, "imported") for winner, loser in expected]
    said = run("stats", "--db", new)
    assert said.startswith("pairs: 4 imported\ndecided, for training: 4\n")
    assert "imported: 4 choices (4 imported), 4 decided" in said
    again = run("import", "--db", new, "--preferences", tmp_path / "ranks.csv")
    assert again == f"0 pairs added to {new}; 4 were there already\n"


def test_import_with_a_name_and_a_truncation(tmp_path):
    (tmp_path / "pairs.csv").write_text("winner,loser,annotator\n1,2,\n1,2,bob\n")
    new = tmp_path / "new.db"
    arguments = ("import", "--db", new, "--preferences", tmp_path / "pairs.csv")
    run(*arguments, "--annotator", "cy", "--truncation-psi", 0.7)
    assert rows(new) == [(1, 2, "cy"), (1, 2, "bob")]
    with PreferenceStore(new) as store:
        assert store.pairs() == [Pair(Sample(1, 0.7), Sample(2, 0.7), "imported")]
        assert store.about() == {"truncation_psi": 0.7}


def test_a_csv_goes_out_and_in_again(database, tmp_path):
    out, new = tmp_path / "out.csv", tmp_path / "new.db"
    run("export", "--db", database, "--out", out)
    said = run("import", "--db", database, "--preferences", out)
    assert said == f"0 pairs added to {database}; 2 were there already\n"
    said = run("import", "--db", new, "--preferences", out)
    assert said == f"2 pairs added to {new}; 0 were there already\n"
    assert rows(new) == rows(database)


def test_import_of_another_store(database, tmp_path):
    run("import", "--db", tmp_path / "all.db", "--preferences", database)
    assert rows(tmp_path / "all.db") == rows(database)


def test_no_such_file(refused, tmp_path):
    absent = tmp_path / "absent.db"
    for arguments in (("stats",), ("stats", "--json"), ("export", "--out", tmp_path / "out.csv")):
        message = refused(*arguments, "--db", absent)
        assert message == f"densityrl: {absent} does not exist; `densityrl annotate` makes it"
    message = refused("import", "--db", absent, "--preferences", tmp_path / "absent.csv")
    assert "cannot read" in message
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_no_store(refused, tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("winner,loser\n1,2\n")
    for arguments in (("stats",), ("import", "--preferences", table)):
        assert f"{table} is no store of preferences" in refused(*arguments, "--db", table)
    assert table.read_text() == "winner,loser\n1,2\n"


def test_nothing_to_export(refused, tmp_path):
    PreferenceStore(tmp_path / "new.db", create=True).close()
    out = tmp_path / "out.csv"
    assert "holds no decided pairs yet" in refused(
        "export", "--db", tmp_path / "new.db", "--out", out
    )
    assert not out.exists()
    assert run("export", "--db", tmp_path / "new.db", "--out", out, "--log").startswith("0 choices")


def test_nowhere_to_export_to(refused, database, tmp_path):
    out = tmp_path / "nowhere" / "out.csv"
    assert f"cannot write {out}" in refused("export", "--db", database, "--out", out)


def test_imports_that_are_refused(refused, database, tmp_path):
    table = tmp_path / "pairs.csv"
    arguments = ("import", "--db", database, "--preferences", table)
    table.write_text("winner,loser,annotator\n70,71,ann\n1,0,ann\n")
    assert "'ann' prefers 1 to 0 in the table" in refused(*arguments)
    table.write_text("winner,loser\n70,x\n")
    assert "line 2: 'x' is not a seed" in refused(*arguments)
    table.write_text("winner,loser\n70,71\n")
    assert "give the same, or another --db" in refused(*arguments, "--truncation-psi", 0.7)
    assert "printable characters" in refused(*arguments, "--annotator", "")
    with PreferenceStore(database) as store:
        assert len(store.pairs()) == 3
        assert len(store.choices(undone=True)) == 4
        assert store.annotators() == ["ann"]


def test_a_truncation_that_is_no_number(refused, tmp_path):
    (tmp_path / "pairs.csv").write_text("winner,loser\n1,2\n")
    arguments = ("--db", tmp_path / "new.db", "--preferences", tmp_path / "pairs.csv")
    refused("import", *arguments, "--truncation-psi", "nan")
    assert not (tmp_path / "new.db").exists()


def test_neither_needs_torch():
    script = (
        "import sys, densityrl.cli\n"
        "try: densityrl.cli.main()\n"
        "finally: print(sorted({'torch', 'skimage', 'PIL'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["stats", "--help"], ["stats", "--db", "absent.db"]):
        shown = subprocess.run(
            [sys.executable, "-c", script, "preferences", *arguments],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        assert shown.rstrip().endswith("[]")
