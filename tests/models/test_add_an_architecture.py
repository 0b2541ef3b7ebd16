"""docs/how-to/add-an-architecture.md, followed to the letter."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fathom.models
from fathom.config import TrainingConfig
from fathom.encoding import fit_encoder
from fathom.ranker import Ranker
from fathom.training import train
from small_ranker import SPEC, plain_frame

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs" / "how-to" / "add-an-architecture.md"
NAME = "deep_crossing"
FILE, LINE, TEST = (
    f"src/fathom/models/{NAME}.py",
    "src/fathom/models/family.py",
    f"tests/models/test_{NAME}.py",
)


def blocks() -> dict[str, str]:
    """The code blocks, by the file that the line before each of them names."""
    found = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", HOW_TO.read_text(), re.M | re.S)
    return dict(found)


def with_lines_added(text: str, diff: str) -> str:
    """A text with a diff's new lines in it, each after the line that stands before it."""
    lines = text.splitlines()
    place = -1
    for line in diff.splitlines():
        if line == "...":
            continue
        if line.startswith("+"):
            place += 1
            lines.insert(place, line[1:])
        else:
            place = lines.index(line[1:], place + 1)
    return "\n".join(lines) + "\n"


def executed(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The how-to's files, and the new architecture among the others."""
    written = {name: tmp_path / name for name in (FILE, LINE, TEST)}
    for path in written.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    told = blocks()
    written[FILE].write_text(told[FILE])
    written[LINE].write_text(with_lines_added((ROOT / LINE).read_text(), told[LINE]))
    written[TEST].write_text(told[TEST])
    package = fathom.models
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(written[FILE].parent)])
    family = executed("fathom.models.family", written[LINE])
    monkeypatch.setitem(sys.modules, "fathom.models.family", family)
    yield written
    del sys.modules[f"fathom.models.{NAME}"]
    delattr(package, NAME)


def test_it_is_one_file_one_line_and_one_test():
    assert list(blocks()) == [FILE, LINE, TEST]
    added = [line for line in blocks()[LINE].splitlines() if line.startswith("+")]
    assert len(added) == 2  # the import, and the line
    assert not (ROOT / FILE).exists(), "it is an example; choose another if it has become real"


@pytest.mark.usefixtures("followed")
def test_the_new_architecture_stands_beside_the_others():
    from fathom.models.family import MODELS

    assert list(MODELS)[-1] == NAME
    assert len(MODELS) == 12


def test_its_own_test_passes(followed):
    tests = executed("test_of_the_how_to", followed[TEST])
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert names == ["test_a_logit_by_hand"]
    tests.test_a_logit_by_hand()


@pytest.mark.usefixtures("followed")
def test_the_checks_that_all_share_hold_for_it(tmp_path):
    checks = executed("checks_with_one_more", Path(__file__).with_name("test_family.py"))
    assert NAME in checks.CASES
    checks.test_a_logit_for_each_example(NAME, 5)
    checks.test_contributions_sum_to_the_logit(NAME)
    checks.test_examples_do_not_see_each_other(NAME)
    checks.test_gradients_are_those_of_finite_differences(NAME)
    checks.test_training_moves_every_weight_and_lowers_the_loss(NAME, "binary")
    checks.test_the_same_seed_gives_the_same_bits_and_another_others(NAME)
    checks.test_what_is_dropped_changes_training_and_not_scoring(NAME)
    checks.test_a_warm_start_carries_all_tables_of_a_name_by_key(NAME, tmp_path / "warm")


@pytest.mark.usefixtures("followed")
def test_it_is_trained_saved_and_loaded_as_any_other(tmp_path):
    frame = plain_frame()
    encoder = fit_encoder(frame, SPEC)
    batch = encoder.encode(frame)
    config = TrainingConfig(model=NAME, hidden=(8,), epochs=2, batch_size=64, device="cpu")
    trained = train(encoder.layout, batch, batch, config, "binary")
    assert trained.history[-1].train_loss < trained.history[0].train_loss
    ranker = Ranker(encoder, trained.model, config, {"trained_until": "2024-01-30"})
    version = ranker.save(tmp_path / "artifact")
    loaded = Ranker.load(tmp_path / "artifact")
    assert loaded.version == version
    np.testing.assert_array_equal(loaded.score(frame), ranker.score(frame))
    assert list(loaded.published_embeddings()) == ["user_embeddings", "item_embeddings"]


def test_a_diff_is_applied_where_its_context_is():
    text = "a\nb\nc\nb\nd\n"
    assert with_lines_added(text, " c\n b\n+new\n") == "a\nb\nc\nb\nnew\nd\n"
    assert with_lines_added(text, " a\n+one\n...\n d\n+two\n") == "a\none\nb\nc\nb\nd\ntwo\n"
    with pytest.raises(ValueError, match="'e' is not in list"):
        with_lines_added(text, " e\n+new\n")
