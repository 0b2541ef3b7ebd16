"""The runner of ``kedro run``: a node whose result is there already is skipped.

Like make, but by content. When a node's turn comes, its *key* is worked out: the node as it stands
in the pipeline, the code, the installed libraries, its parameters, and the content of each file
that it reads. When it has run and saved, it is stamped with its key and the content of what it
wrote. It is skipped when its key is that of its stamp and all its outputs are as stamped. So

* a node that ran again and wrote the same stops the wave: what follows it is skipped;
* a run that was killed goes on where it was, and an output that somebody deleted or edited is
  made again, since a stamp is written last and says what must be there;
* state outside of the catalog has to come in through files: a node tagged `ALWAYS` that looks at it
  (small, for it runs every time) and whose output the others read; or, where a node itself makes
  something outside, a `ReceiptDataset` that says where;
* a node with an input or output in memory, or without outputs, is never skipped.

``kedro run --runner SequentialRunner`` runs every node.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.runner import SequentialRunner
from kedro.runner.task import Task
from pydantic_core import to_jsonable_python

from fathom import files
from fathom.pipelines.datasets import AtomicDataset

#: Tag of nodes that look at the world outside of the catalog.
ALWAYS = "always"
#: The catalog's entry for the stamps of all nodes.
STAMPS = "node_stamps"
#: In place of a fingerprint: there is nothing, or it holds no longer.
ABSENT = "absent"

log = logging.getLogger(__name__)


class UpToDateRunner(SequentialRunner):
    """Runs the nodes that have to run, one after another, and skips the others.

    Raises:
        ValueError: the catalog has no entry `STAMPS`.
    """

    def __repr__(self) -> str:
        """Kedro-Viz shows how a run went only if its runner is called like this."""
        return "<kedro.runner.sequential_runner.SequentialRunner object that skips what is there>"

    def _run(
        self, pipeline: Pipeline, catalog: Any, hook_manager: Any = None, run_id: str | None = None
    ) -> None:
        stamps = Stamps(catalog)
        load_counts = Counter(chain.from_iterable(node.inputs for node in pipeline.nodes))
        skipped = 0
        for node in pipeline.nodes:
            key = stamps.key(node)
            if reasons := stamps.reasons(node, key):
                log.info("%s has to run: %s", node.name, ", ".join(reasons))
                stamps.remove(node)
                try:
                    Task(node, catalog, self._is_async, hook_manager, run_id).execute()
                except Exception:
                    log.warning(
                        "Once the cause is mended, run the same command: what is finished is kept."
                    )
                    raise
                stamps.write(node, key)
            else:
                skipped += 1
                log.info("unchanged: %s", node.name)
            self._release_datasets(node, catalog, load_counts, pipeline)
        log.info("%d of %d nodes were unchanged", skipped, len(pipeline.nodes))


class Stamps:
    """What each node last ran on and wrote, as a JSON dataset of the catalog."""

    def __init__(self, catalog: Any) -> None:
        if STAMPS not in catalog:
            raise ValueError(
                f"the catalog has no entry '{STAMPS}', a JSON file for what nodes last ran on; "
                "add it as in conf/base/catalog.yml, or use --runner SequentialRunner"
            )
        self._catalog = catalog
        self._content = Fingerprints()
        self._known_code: dict[Path, str] = {}
        self._stamps: dict[str, Any] = {}
        try:
            if catalog.exists(STAMPS):
                self._stamps = catalog.load(STAMPS)
        except DatasetError as error:
            log.warning("every node has to run, for the stamps cannot be read: %s", error)

    def key(self, node: Node) -> dict[str, str | None]:
        """All that a node's outputs follow from, by name; None for what is only in memory.

        An input that lies where an output of the same node does is what the node itself left
        there: its memory, not news.
        """
        own = {self._path(name) for name in node.outputs} - {None}
        inputs = [name for name in node.inputs if self._path(name) not in own]
        return {
            "its place in the pipeline": _sha256([str(node), self._definitions(node)]),
            "the code": self._code(node),
            "the libraries": self._libraries,
            **{name: self._fingerprint(name) for name in inputs},
        }

    def reasons(self, node: Node, key: dict[str, str | None]) -> list[str]:
        """Why a node has to run; none if what it would make is there."""
        if ALWAYS in node.tags:
            return ["it always does"]
        outputs = self._outputs(node)
        memory = [name for name, found in (key | outputs).items() if found is None]
        if memory or not outputs:
            return [f"{name} is not in a file" for name in memory] or ["it has no output"]
        stamp = self._stamps.get(node.name)
        if stamp is None:
            return ["it has no stamp"]
        before = stamp["key"]
        changed = [name for name in {**before, **key} if before.get(name) != key.get(name)]
        return [f"{name} changed" for name in changed] + [
            f"{name} is not as it left it"
            for name, found in outputs.items()
            if found == ABSENT or stamp["outputs"].get(name) != found
        ]

    def remove(self, node: Node) -> None:
        """Take a node's stamp away, before it runs."""
        if self._stamps.pop(node.name, None):
            self._catalog.save(STAMPS, self._stamps)

    def write(self, node: Node, key: dict[str, str | None]) -> None:
        """Stamp a node that has run on ``key`` and saved its outputs."""
        self._stamps[node.name] = {"key": key, "outputs": self._outputs(node)}
        self._catalog.save(STAMPS, self._stamps)

    def _outputs(self, node: Node) -> dict[str, str | None]:
        return {name: self._fingerprint(name) for name in node.outputs}

    def _fingerprint(self, name: str) -> str | None:
        """Of the content of a dataset; None if it is in memory."""
        dataset = self._catalog[name]
        if name == "parameters" or name.startswith("params:"):
            return _sha256(dataset.load())
        if isinstance(dataset, ReceiptDataset):
            return dataset.fingerprint(self._content)
        path = _path_of(dataset)
        return None if path is None else self._content(path)

    def _path(self, name: str) -> Path | None:
        return _path_of(self._catalog[name])

    def _code(self, node: Node) -> str:
        """Of the package or module that a node's function belongs to, and of this package."""
        paths = _module(node.func), Path(__file__).parent
        for path in {*paths} - self._known_code.keys():
            self._known_code[path] = self._content(path, "*.py")
        return _sha256([self._known_code[path] for path in paths])

    @cached_property
    def _libraries(self) -> str:
        """Of the interpreter's and all installed libraries' versions."""
        folders = [Path(entry) for entry in sys.path if Path(entry).is_dir()]
        installed = {path.name for folder in folders for path in folder.glob("*.dist-info")}
        return _sha256([sys.version, sorted(installed)])

    def _definitions(self, node: Node) -> str:
        """The catalog's entries for a node, wherever the project's folder is."""
        mine = [self._entries.get(name) for name in (*node.inputs, *node.outputs)]
        return json.dumps(mine, sort_keys=True, default=repr).replace(str(Path.cwd()), ".")

    @cached_property
    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = self._catalog.to_config()[0]
        return entries


class Fingerprints:
    """SHA-256 of files and of folders; a file is read again when its inode says that it changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}

    def __call__(self, path: Path, pattern: str = "*") -> str:
        """Of a file's content, or of the names and contents in a folder, hidden ones left out."""
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            return ABSENT
        inside = ((p.relative_to(path), p) for p in path.rglob(pattern) if p.is_file())
        shown = sorted((n, p) for n, p in inside if not any(x.startswith(".") for x in n.parts))
        return _sha256([[name.as_posix(), self._file(p)] for name, p in shown])

    def _file(self, path: Path) -> str:
        stat = path.stat()
        state = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state not in self._known:
            self._known[state] = files.sha256(path)
        return self._known[state]


class ReceiptDataset(AtomicDataset):
    """A JSON file by which a node answers for what it made outside of the catalog.

    The dataset is as the node left it only while that is, too. The JSON object may hold

    * ``covers``: paths of the files and folders that were made and stay as they are;
    * ``needs``: paths of those that must be there, whatever others add to them, as a database;
    * ``expires``: the moment, ISO 8601, from which the node would find something else.
    """

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        super().__init__({"type": "json.JSONDataset", "filepath": filepath}, metadata=metadata)

    def fingerprint(self, content: Callable[[Path], str]) -> str:
        """Of the file and of all that it covers; `ABSENT` if the receipt no longer holds."""
        if not self._path.exists():
            return ABSENT
        receipt = self.load()
        expires = receipt.get("expires")
        if expires and datetime.fromisoformat(expires) <= datetime.now(timezone.utc):
            return ABSENT
        if not all(Path(path).exists() for path in receipt.get("needs", ())):
            return ABSENT
        covered = [content(Path(path)) for path in receipt.get("covers", ())]
        return _sha256([content(self._path), *covered])


def _path_of(dataset: AbstractDataset[Any, Any]) -> Path | None:
    """Where a dataset's content lies on this machine: ours say ``_path``, Kedro's ``_filepath``."""
    path = getattr(dataset, "_path", None) or getattr(dataset, "_filepath", None)
    if path is None or getattr(dataset, "_protocol", "file") != "file":
        return None
    return Path(path).absolute()


def _module(function: Callable[..., Any]) -> Path:
    """The folder of the package that a function belongs to, or the file of a lone module."""
    while isinstance(function, partial):
        function = function.func
    file = Path(str(sys.modules[function.__module__.partition(".")[0]].__file__))
    return file.parent if file.name == "__init__.py" else file


def _sha256(value: Any) -> str:
    """Of a value that JSON can hold, of parameters too: models, data classes, dates."""
    text = json.dumps(to_jsonable_python(value, fallback=repr), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
