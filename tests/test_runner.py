"""A node runs when something that its result follows from changed, and only then."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset
from pydantic import BaseModel

from fathom.pipelines.datasets import AtomicDataset, FolderDataset
from fathom.runner import STAMPS, ReceiptDataset, UpToDateRunner

#: Names of the nodes that ran, in their order.
ran: list[str] = []


def noting(name, function):
    """A node's function that says when it is called."""

    def called(*inputs):
        ran.append(name)
        return function(*inputs)

    return called


def node(name, inputs, outputs, function=lambda *values: sum(values), tags=None):
    return Node(noting(name, function), inputs, outputs, name=name, tags=tags)


def file(folder: Path, name: str) -> AtomicDataset:
    return AtomicDataset({"type": "json.JSONDataset", "filepath": str(folder / f"{name}.json")})


def catalog_of(folder: Path, *names: str, **others) -> DataCatalog:
    files = {name: file(folder, name) for name in (*names, STAMPS)}
    return DataCatalog({**files, **others})


def run(nodes, catalog, runner=UpToDateRunner) -> list[str]:
    """Run, and say which nodes did."""
    ran.clear()
    runner().run(Pipeline(nodes), catalog)
    return list(ran)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a project, in which the process stands, with ``raw`` = 7 in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.json").write_text("7")
    return tmp_path


#: raw → tens → sum; raw → ones → sum. 7 has no tens and 7 ones.
DIGITS = [
    node("cut_tens", "raw", "tens", lambda n: n // 10),
    node("cut_ones", "raw", "ones", lambda n: n % 10),
    node("add", ["tens", "ones"], "sum"),
]


@pytest.fixture
def digits(folder):
    """The catalog of `DIGITS` after a first run."""
    catalog = catalog_of(folder, "raw", "tens", "ones", "sum")
    assert run(DIGITS, catalog) == ["cut_ones", "cut_tens", "add"]
    return catalog


# --- what is read ------------------------------------------------------------------------------


def test_a_second_run_runs_nothing(digits, caplog):
    with caplog.at_level(logging.INFO, "fathom.runner"):
        assert run(DIGITS, digits) == []
    assert caplog.messages[:3] == ["unchanged: cut_ones", "unchanged: cut_tens", "unchanged: add"]
    assert caplog.messages[3] == "3 of 3 nodes were unchanged"
    assert digits.load("sum") == 7


def test_a_changed_input_runs_all_that_follows_from_it(digits):
    digits.save("raw", 23)  # 2 tens and 3 ones
    assert run(DIGITS, digits) == ["cut_ones", "cut_tens", "add"]
    assert digits.load("sum") == 5


def test_a_node_that_made_the_same_again_stops_the_wave(digits):
    digits.save("raw", 70)  # ones and tens change places: their sum is 7 again
    after = node("write", "sum", "page", str)
    catalog = catalog_of(Path.cwd(), "raw", "tens", "ones", "sum", "page")
    assert run([*DIGITS, after], catalog) == ["cut_ones", "cut_tens", "add", "write"]
    digits.save("raw", 16)  # 1 + 6
    assert run([*DIGITS, after], catalog) == ["cut_ones", "cut_tens", "add"]
    digits.save("raw", 17)  # the tens stay
    assert run([*DIGITS, after], catalog) == ["cut_ones", "cut_tens", "add", "write"]


def test_a_file_that_is_only_newer_is_no_news(digits, folder):
    shutil.copy(folder / "raw.json", folder / "copy")
    (folder / "copy").replace(folder / "raw.json")
    (folder / "sum.json").touch()
    assert run(DIGITS, digits) == []


def test_a_folder_is_its_files_but_for_hidden_ones(folder):
    def count(_: object) -> int:
        return len(list((folder / "raw").glob("*")))

    class Folder(FolderDataset):
        def load(self) -> str:
            return str(self._path)

    catalog = catalog_of(folder, "n", raw=Folder("raw", "nothing"))
    nodes = [node("count", "raw", "n", count)]
    (folder / "raw/2026").mkdir(parents=True)
    (folder / "raw/2026/W01").write_text("a")
    assert run(nodes, catalog) == ["count"]
    (folder / "raw/.W02").write_text("half-written")
    assert run(nodes, catalog) == []
    (folder / "raw/2026/W01").rename(folder / "raw/2026/W02")
    assert run(nodes, catalog) == ["count"]
    (folder / "raw/2026/W03").write_text("")
    assert run(nodes, catalog) == ["count"]


def test_an_input_that_comes_into_being_is_news(folder):
    class Optional(AtomicDataset):
        def load(self) -> int:
            return super().load() if self._exists() else 0

    late = Optional({"type": "json.JSONDataset", "filepath": "late.json"})
    catalog = catalog_of(folder, "raw", "sum", late=late)
    nodes = [node("add", ["raw", "late"], "sum")]
    assert run(nodes, catalog) == ["add"]
    assert run(nodes, catalog) == []
    (folder / "late.json").write_text("1")
    assert run(nodes, catalog) == ["add"]
    assert catalog.load("sum") == 8


def test_what_a_node_left_itself_is_no_news(folder):
    """An incremental node reads its own former output; else it would run again after every run."""

    class Former(AtomicDataset):
        def load(self) -> list[int]:
            return super().load() if self._exists() else []

    former = Former({"type": "json.JSONDataset", "filepath": str(folder / "seen.json")})
    catalog = catalog_of(folder, "raw", "seen", former=former)
    nodes = [node("collect", ["raw", "former"], "seen", lambda new, old: [*old, new])]
    assert run(nodes, catalog) == ["collect"]
    assert run(nodes, catalog) == []
    catalog.save("raw", 8)
    assert run(nodes, catalog) == ["collect"]
    assert run(nodes, catalog) == []
    assert catalog.load("seen") == [7, 8]


# --- parameters, code, configuration -----------------------------------------------------------


class Settings(BaseModel):
    factor: int = 1


@dataclass(frozen=True)
class Bounds:
    low: int = 0


@pytest.mark.parametrize(
    ("before", "same", "after"),
    [
        (Settings(), Settings(factor=1), Settings(factor=2)),
        (Bounds(), Bounds(low=0), Bounds(low=1)),
        ({"a": [1], "b": None}, {"b": None, "a": [1]}, {"a": [1, 1], "b": None}),
        ("text", "text", "other"),
        (datetime(2026, 1, 1), datetime(2026, 1, 1), datetime(2026, 1, 2)),
    ],
)
def test_a_parameter_is_compared_by_its_value(folder, before, same, after):
    nodes = [node("use", ["raw", "params:x"], "n", lambda raw, x: raw)]

    def catalog(value):
        return catalog_of(folder, "raw", "n", **{"params:x": MemoryDataset(value)})

    assert run(nodes, catalog(before)) == ["use"]
    assert run(nodes, catalog(same)) == []
    assert run(nodes, catalog(after)) == ["use"]


def test_changed_code_runs_again(folder, monkeypatch):
    package = folder / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("from theirs.sums import double\n")
    (package / "sums.py").write_text("def double(n):\n    return 2 * n\n")
    monkeypatch.syspath_prepend(folder)
    from theirs import double

    nodes = [node("mine", "raw", "n", double), Node(double, "raw", "m", name="theirs")]
    catalog = catalog_of(folder, "raw", "n", "m")
    run(nodes, catalog)
    first = catalog.load(STAMPS)
    (package / "page.html").write_text("no code")
    run(nodes, catalog)
    assert catalog.load(STAMPS) == first
    (package / "other.py").write_text("A = 1\n")  # the package's, whether it is used or not
    run(nodes, catalog)
    again = catalog.load(STAMPS)
    assert again["mine"] == first["mine"]  # the function that calls `double` is of this file
    assert again["theirs"]["key"]["the code"] != first["theirs"]["key"]["the code"]
    for name in ("theirs", "theirs.sums"):
        del sys.modules[name]


def test_another_way_of_reading_a_file_runs_again(folder):
    (folder / "raw.txt").write_bytes("ä".encode())
    nodes = [node("measure", "text", "n", len)]

    def catalog(**options):
        definition = {"type": "text.TextDataset", "filepath": str(folder / "raw.txt"), **options}
        return catalog_of(folder, "n", text=AtomicDataset(definition))

    assert run(nodes, catalog()) == ["measure"]
    assert run(nodes, catalog()) == []
    other = catalog(fs_args={"open_args_load": {"encoding": "latin-1"}})
    assert run(nodes, other) == ["measure"]
    assert other.load("n") == 2


def test_a_node_that_reads_its_inputs_in_another_order_runs_again(folder):
    catalog = catalog_of(folder, "raw", "one", "n")
    catalog.save("one", 1)
    minus = [node("take", ["raw", "one"], "n", lambda a, b: a - b)]
    assert run(minus, catalog) == ["take"]
    swapped = [node("take", ["one", "raw"], "n", lambda a, b: a - b)]
    assert run(swapped, catalog) == ["take"]
    assert catalog.load("n") == -6


def test_a_project_may_be_moved(digits, folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, elsewhere, dirs_exist_ok=True)
    monkeypatch.chdir(elsewhere)
    assert run(DIGITS, catalog_of(elsewhere, "raw", "tens", "ones", "sum")) == []


# --- what was written --------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("8")])
def test_an_output_that_was_removed_or_edited_is_made_again(digits, folder, harm, caplog):
    harm(folder / "tens.json")
    with caplog.at_level(logging.INFO, "fathom.runner"):
        assert run(DIGITS, digits) == ["cut_tens"]
    assert "cut_tens has to run: tens is not as it left it" in caplog.messages
    assert digits.load("tens") == 0


def test_a_run_that_failed_goes_on_where_it_was(folder, caplog):
    broken = [True]

    def ones(n):
        if broken:
            raise ValueError("no ones today")
        return n % 10

    nodes = [DIGITS[0], node("cut_ones", ["raw", "tens"], "ones", lambda n, _: ones(n)), DIGITS[2]]
    catalog = catalog_of(folder, "raw", "tens", "ones", "sum")
    with pytest.raises(ValueError, match="no ones today"):
        run(nodes, catalog)
    assert "run the same command: what is finished is kept" in caplog.text
    broken.clear()
    assert run(nodes, catalog) == ["cut_ones", "add"]


class Dying(AtomicDataset):
    """A file whose saving may be the last thing that a process does."""

    fatal = False

    def save(self, data) -> None:
        if Dying.fatal:
            raise KeyboardInterrupt
        super().save(data)


@pytest.mark.parametrize("last", ["tens", "ones", STAMPS])
def test_a_run_that_was_killed_between_two_writes_goes_on(folder, monkeypatch, last):
    """Before the first output, between the first and the second, and before the stamp."""
    names = ("tens", "ones", STAMPS)
    definition = {"type": "json.JSONDataset", "filepath": str(folder / f"{last}.json")}
    others = {name: file(folder, name) for name in ("raw", *names) if name != last}
    catalog = DataCatalog({**others, last: Dying(definition)})
    nodes = [node("cut", "raw", ["tens", "ones"], lambda n: [n // 10, n % 10])]
    run(nodes, catalog)
    catalog.save("raw", 23)
    monkeypatch.setattr(Dying, "fatal", True)
    with pytest.raises(KeyboardInterrupt):
        run(nodes, catalog)
    monkeypatch.setattr(Dying, "fatal", False)
    catalog.save("raw", 7)  # even if the input is again what the last complete run had
    expected = [] if last == STAMPS else ["cut"]  # the process died before it began
    assert run(nodes, catalog) == expected
    assert (catalog.load("tens"), catalog.load("ones")) == (0, 7)


def test_a_full_run_in_between_is_no_harm(digits):
    assert run(DIGITS, digits, SequentialRunner) == ["cut_ones", "cut_tens", "add"]
    assert run(DIGITS, digits) == []
    digits.save("raw", 23)
    run(DIGITS, digits, SequentialRunner)
    digits.save("raw", 7)
    assert run(DIGITS, digits) == ["cut_ones", "cut_tens", "add"]


def test_a_part_of_a_pipeline_can_be_run(digits):
    digits.save("raw", 23)
    assert run(DIGITS[:1], digits) == ["cut_tens"]
    assert run(DIGITS, digits) == ["cut_ones", "add"]


# --- what is not in files ----------------------------------------------------------------------


def test_nodes_that_hand_something_on_in_memory_always_run(folder, caplog):
    nodes = [
        node("double", "raw", "twice", lambda n: 2 * n),  # `twice` is not in the catalog
        node("halve", "twice", "n", lambda n: n // 2),
        node("write", "n", "page", str),
    ]
    catalog = catalog_of(folder, "raw", "n", "page")
    assert run(nodes, catalog) == ["double", "halve", "write"]
    with caplog.at_level(logging.INFO, "fathom.runner"):
        assert run(nodes, catalog) == ["double", "halve"]  # and what they wrote is the same
    assert "halve has to run: twice is not in a file" in caplog.messages


def test_what_lies_on_another_machine_may_have_changed(folder):
    remote = JSONDataset(filepath="memory://raw.json")
    remote.save(1)
    catalog = catalog_of(folder, "n", raw=remote)
    nodes = [node("fetch", "raw", "n", lambda n: n)]
    assert [run(nodes, catalog) for _ in range(2)] == [["fetch"], ["fetch"]]


def test_kedros_own_datasets_are_files_too(folder):
    catalog = catalog_of(folder, "n", raw=JSONDataset(filepath=str(folder / "raw.json")))
    nodes = [node("copy", "raw", "n", lambda n: n)]
    assert [run(nodes, catalog) for _ in range(2)] == [["copy"], []]


def test_a_node_without_outputs_always_runs(folder):
    nodes = [node("tell", "raw", None, lambda n: None)]
    catalog = catalog_of(folder, "raw")
    assert [run(nodes, catalog) for _ in range(2)] == [["tell"], ["tell"]]


def test_a_node_that_looks_at_the_world_always_runs(folder):
    world = ["rain"]
    nodes = [
        node("look", None, "weather", lambda: world[0], tags=["any", "always"]),
        node("dress", "weather", "coat", lambda weather: weather == "rain"),
    ]
    catalog = catalog_of(folder, "weather", "coat")
    assert run(nodes, catalog) == ["look", "dress"]
    assert run(nodes, catalog) == ["look"]
    world[0] = "sun"
    assert run(nodes, catalog) == ["look", "dress"]


def test_a_receipt_answers_for_what_was_made_elsewhere(folder):
    def build(n):
        (folder / "store").mkdir(exist_ok=True)
        (folder / "store/model").write_text(str(n))
        (folder / "pointer").write_text(str(n))
        return {"version": n, "covers": ["store", "pointer"]}

    catalog = catalog_of(folder, "raw", "page", built=ReceiptDataset(str(folder / "built.json")))
    nodes = [
        node("build", "raw", "built", build),
        node("write", "built", "page", lambda receipt: receipt["version"]),
    ]
    assert run(nodes, catalog) == ["build", "write"]
    assert run(nodes, catalog) == []
    for harm in (
        lambda: shutil.rmtree(folder / "store"),
        lambda: (folder / "store/model").write_text("x"),
        lambda: (folder / "store/more").write_text("x"),
        lambda: (folder / "pointer").unlink(),
    ):
        harm()
        assert run(nodes, catalog)[0] == "build"
        (folder / "store/more").unlink(missing_ok=True)
        run(nodes, catalog)
        assert run(nodes, catalog) == []


def test_a_receipt_may_say_that_nothing_is_there_yet(folder):
    catalog = catalog_of(folder, "raw", built=ReceiptDataset(str(folder / "built.json")))
    nodes = [node("refuse", "raw", "built", lambda n: {"covers": ["pointer"]})]
    assert [run(nodes, catalog) for _ in range(2)] == [["refuse"], []]
    (folder / "pointer").write_text("made by hand")
    assert run(nodes, catalog) == ["refuse"]


def test_a_receipt_may_name_what_must_be_there_however_it_grows(folder):
    def apply(n):
        (folder / "registry.db").write_text("views")
        return {"needs": ["registry.db"]}

    catalog = catalog_of(folder, "raw", applied=ReceiptDataset(str(folder / "applied.json")))
    nodes = [node("apply", "raw", "applied", apply)]
    assert [run(nodes, catalog) for _ in range(2)] == [["apply"], []]
    (folder / "registry.db").write_text("views and more views")
    assert run(nodes, catalog) == []
    (folder / "registry.db").unlink()
    assert [run(nodes, catalog) for _ in range(2)] == [["apply"], []]


def test_a_receipt_may_expire(folder):
    now = datetime.now(timezone.utc)
    moments = iter([now + timedelta(hours=1), now - timedelta(seconds=1), None])
    catalog = catalog_of(folder, "raw", built=ReceiptDataset(str(folder / "built.json")))

    def check(_):
        moment = next(moments)
        return {"expires": moment and moment.isoformat()}

    nodes = [node("check", "raw", "built", check)]
    assert [run(nodes, catalog) for _ in range(2)] == [["check"], []]
    catalog.save("raw", 8)
    assert [run(nodes, catalog) for _ in range(3)] == [["check"], ["check"], []]


# --- the stamps --------------------------------------------------------------------------------


def test_the_stamps_say_why(digits, folder, caplog):
    digits.save("raw", 23)
    with caplog.at_level(logging.INFO, "fathom.runner"):
        run(DIGITS, digits)
    assert "cut_ones has to run: raw changed" in caplog.messages
    assert "add has to run: tens changed, ones changed" in caplog.messages
    stamp = json.loads((folder / f"{STAMPS}.json").read_text())["add"]
    assert set(stamp["outputs"]) == {"sum"}
    assert {"tens", "ones", "the code", "the libraries"} < set(stamp["key"])


def test_without_a_place_for_stamps_the_runner_says_what_to_do(folder):
    catalog = DataCatalog({"raw": file(folder, "raw"), "n": file(folder, "n")})
    with pytest.raises(ValueError, match=r"no entry 'node_stamps'.*--runner SequentialRunner"):
        run([node("copy", "raw", "n")], catalog)


def test_unreadable_stamps_count_for_nothing(digits, folder, caplog):
    (folder / f"{STAMPS}.json").write_text("{half")
    assert run(DIGITS, digits) == ["cut_ones", "cut_tens", "add"]
    assert "every node has to run" in caplog.text
    assert run(DIGITS, digits) == []


# --- whatever happened -------------------------------------------------------------------------

#: Node i reads some of the files before its own and writes file i; file 0 is raw.
GRAPHS = st.integers(1, 5).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, i), min_size=1, unique=True) for i in range(n)))
)
#: Which file is written to, or removed.
DEEDS = st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 3))), max_size=4)


@settings(max_examples=20)
@given(GRAPHS, st.lists(DEEDS, min_size=1, max_size=3))
def test_a_run_ends_as_if_every_node_had_run(tmp_path_factory, graph, history):
    """Whatever is edited and removed between runs; and what nobody touched is not run again."""
    folder = tmp_path_factory.mktemp("graph")
    names = [f"f{i}" for i in range(len(graph) + 1)]
    catalog = catalog_of(folder, *names)
    nodes = [
        node(f"n{i}", [names[j] for j in reads], names[i + 1], lambda *v: sum(v) % 3)
        for i, reads in enumerate(graph)
    ]
    catalog.save("f0", 1)
    for deeds in [[], *history]:
        for place, value in deeds:
            path = folder / f"{names[place % len(names)]}.json"
            if value is not None:
                path.write_text(str(value))
            elif place % len(names):
                path.unlink(missing_ok=True)
        run(nodes, catalog)
        found = {name: catalog.load(name) for name in names}
        assert run(nodes, catalog) == []
        run(nodes, catalog, SequentialRunner)
        assert found == {name: catalog.load(name) for name in names}


def test_a_dataset_that_fails_to_load_is_an_error_as_ever(folder):
    catalog = catalog_of(folder, "raw", "n")
    (folder / "raw.json").write_text("{")
    with pytest.raises(DatasetError, match="Failed while loading data"):
        run([node("copy", "raw", "n")], catalog)
