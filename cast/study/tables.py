"""The rows of the paper's tables, read from a YAML file and checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from cast.baselines import DESIGNS
from cast.baselines.two_stream import Adapters
from cast.ground.files import parse_yaml
from cast.ground.renamed import renamed
from cast.model.config import make_config

#: The paper's own rows.
ROWS = Path(__file__).with_name("rows.yaml")


@dataclass(frozen=True)
class Model:
    """The construction of a row's model; see the head of `rows.yaml`."""

    design: str = "cast"
    config: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    single: tuple[str, str] | None = None
    members: tuple[str, ...] = ()
    miniature: str = ""
    open: str = ""

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise ValueError(f"design is {self.design!r}; there are {', '.join(DESIGNS)}")
        if self.single is not None and (len(self.single) != 2 or self.single[1] not in get_args(Adapters)):
            kinds = ", ".join(get_args(Adapters))
            raise ValueError(f"single is {list(self.single)}; it must be an expert and its adapters ({kinds})")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")
        make_config("base", **self.config)

    def layers(self, depth: int) -> tuple[int, ...] | None:
        """Blocks with an exchange, for CASTConfig: at least the last one."""
        return None if self.share == 1 else tuple(range(depth - max(1, round(depth * self.share)), depth))


@dataclass(frozen=True)
class Row:
    """A line of a table. `paper`: top-1 accuracy of verb, noun and action in percent, None if it has none."""

    label: str
    model: str
    paper: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """Rows that the paper compares."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class StudyPlan:
    """Tables, and the models that their rows name."""

    tables: tuple[Table, ...]
    models: Mapping[str, Model]

    def trained(self) -> list[str]:
        """Models to train, each once, in the order of the tables; members replace their ensemble."""
        names: dict[str, None] = {}
        for table in self.tables:
            for row in table.rows:
                model = self.models[row.model]
                if not model.miniature:
                    names |= dict.fromkeys(model.members or (row.model,))
        return list(names)


def read_plan(path: str | os.PathLike[str] = ROWS) -> StudyPlan:
    """All tables of a file.

    Raises:
        ValueError: other keys, an impossible model, or a row that names an unknown one.
    """
    try:
        content = parse_yaml(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if (
        not isinstance(content, dict)
        or content.keys() != {"models", "tables"}
        or not all(isinstance(part, dict) for part in content.values())
    ):
        raise ValueError(
            f"{path} must have the keys 'models' and 'tables', each with entries by name, as {ROWS.name} of the "
            "package has"
        )
    models = {str(name): _model(f"{path}, model {name}", entry or {}) for name, entry in content["models"].items()}
    tables = tuple(_table(str(path), str(name), entry, models) for name, entry in content["tables"].items())
    for name, model in models.items():
        for member in model.members:
            if member not in models:
                raise ValueError(f"{path}, model {name}: unknown member {member!r}; there are {', '.join(models)}")
            if models[member].members or models[member].miniature:
                raise ValueError(f"{path}, model {name}: the member {member!r} is not trained itself")
    return StudyPlan(tables, models)


def select(names: Sequence[str]) -> StudyPlan:
    """The tables with these names: of the paper (`table1a`, ..., or `all`), or all of a YAML file.

    Single rows (`lateral`, `rows/lateral`, the names of their recipes) become a separate table.

    Raises:
        ValueError: an unknown name, or two different models or tables with the same name.
    """
    paper = read_plan()
    rows = [row for name in names if (row := _row_named(name, paper))]
    others = [name for name in names if not _row_named(name, paper)]
    plans = [read_plan(name) for name in others if name.endswith((".yaml", ".yml"))]
    wanted = [name for name in others if not name.endswith((".yaml", ".yml"))]
    known = {table.name: table for table in paper.tables}
    for name in wanted:
        if name not in (*known, "all"):
            raise ValueError(
                f"unknown table {name!r}; there are all, {', '.join(known)}, rows by their names "
                f"({', '.join(paper.models)}), or a YAML file of your own"
            )
    if rows:
        chosen = Table("chosen", "Chosen rows", "Paper", tuple(dict.fromkeys(rows)))
        plans.insert(0, StudyPlan((chosen,), paper.models))
    if "all" in wanted:
        wanted = list(known)
    if wanted:
        plans.insert(0, StudyPlan(tuple(known[name] for name in dict.fromkeys(wanted)), paper.models))
    models: dict[str, Model] = {}
    for plan in plans:
        for name, model in plan.models.items():
            if models.setdefault(name, model) != model:
                raise ValueError(f"two files define the model {name!r} differently; rename one")
    tables: dict[str, Table] = {}
    for table in (table for plan in plans for table in plan.tables):
        if tables.setdefault(table.name, table) != table:
            raise ValueError(f"two files define the table {table.name!r} differently; rename one")
    return StudyPlan(tuple(tables.values()), models)


def _row_named(name: str, paper: StudyPlan) -> Row | None:
    """The row of a model or of its recipe, with its name as label; None for any other name."""
    path = Path(name)
    called = path.stem if "rows" in path.parts and path.suffix in ("", ".yaml") else name
    rows = (row for table in paper.tables for row in table.rows if row.model == called)
    if called not in paper.models or (path.is_file() and path.resolve().parent.parent.name != "recipes"):
        return None
    return Row(called, called, next((row.paper for row in rows), None))


def _model(where: str, entry: Mapping[str, Any]) -> Model:
    allowed = [f.name for f in fields(Model)]
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: is {entry!r}; it must be fields by name: {', '.join(allowed)}")
    if unknown := sorted(set(entry) - set(allowed)):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    values = dict(entry)
    for name in ("single", "members"):
        if name in values:
            if not isinstance(values[name], list):
                raise ValueError(f"{where}: {name} is {values[name]!r}; it must be a list of names")
            values[name] = tuple(values[name])
    try:
        return Model(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _paper(where: str, figures: Any) -> tuple[float, float, float] | None:
    if figures is None:
        return None
    if not isinstance(figures, list) or len(figures) != 3:
        raise ValueError(f"{where}: paper is {figures!r}; it must be [verb, noun, action] in percent")
    verb, noun, action = map(float, figures)
    return verb, noun, action


def _table(path: str, name: str, entry: Mapping[str, Any], models: Mapping[str, Model]) -> Table:
    rows = []
    listed = entry.get("rows") if isinstance(entry, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(row, Mapping) and "label" in row for row in listed):
        raise ValueError(f"{path}, {name}: needs 'rows', a list whose entries have a 'label' and a 'model'")
    for row in listed:
        if row.get("model") not in models:
            raise ValueError(f"{path}, {name}: unknown model {row.get('model')!r}; there are {', '.join(models)}")
        rows.append(Row(str(row["label"]), row["model"], _paper(f"{path}, {name}, {row['label']}", row.get("paper"))))
    return Table(name, str(entry.get("title", name)), str(entry.get("source", path)), tuple(rows))


__getattr__: Callable[[str], object] = renamed(__name__, {"Plan": "StudyPlan"})
