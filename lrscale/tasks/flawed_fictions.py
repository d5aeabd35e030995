r"""Flawed Fictions: real stories, some with a continuity error planted by an editor (arXiv 2504.11900).

On the hub the data set is `kahuja/flawed-fictions`; its part `flawed_fictions` holds 414 stories, half
of them flawed. Split 70/15/15 with seed 42 the way LiteReason's published preparation does it
(shuffle, then cut: train first, int(0.15 n) for validation, int(0.15 n) for test), so that a row is in
the part in which the paper had it. RL is watched on the validation part, which is this task's `eval`;
the test part is for final figures and is read with `prompts("test", ...)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrscale.config.task import FlawedFictionsConfig
from lrscale.records import Prompt, Score
from lrscale.tasks.boxed import yes_or_no
from lrscale.tasks.prompting import continuity_prompt
from lrscale.tasks.rows import Encode, RowProblems, check_utf8, length_problem, read_jsonl, text_problem
from lrscale.tasks.task import Split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLIT_SEED = 42
HELD_OUT_SHARE = 0.15
HUB_PART = "flawed_fictions"
"""The part of the hub's data set that the paper uses (others hold long stories and further negatives)."""

_WITHOUT_NETWORK = """\
Without a network: on a machine that has one, run
  python -c "from datasets import load_dataset as load; load('kahuja/flawed-fictions').save_to_disk('flawed-fictions')"
copy the folder over, and set task.path to it (relative to the recipe)."""
_FILE_KINDS = {".csv": "csv", ".json": "json", ".parquet": "parquet"}


class FlawedFictions:
    """The benchmark as a task (method, section 7); see `Task`."""

    def __init__(self, config: FlawedFictionsConfig, *, recipe_dir: Path, encode: Encode | None = None) -> None:
        self.config = config
        problems = RowProblems()
        self._stories = []
        self._columns: list[dict[str, Any]] = []
        for place, row in _rows(config.path, recipe_dir, problems):
            problem = self._row_problem(row, encode)
            if problem:
                problems.add(place, problem)
                continue
            self._stories.append(row["story"])
            rest = {name: value for name, value in row.items() if name != "story"}
            self._columns.append({**rest, "answer": "Yes" if row["cont_error"] else "No"})
        problems.raise_if_any("task.path")
        self._parts = split_rows(len(self._stories))
        for part, rows in self._parts.items():
            if not rows:
                raise ValueError(
                    f"task.path: {config.path} has {len(self._stories)} rows, which leaves none for {part} "
                    "(70/15/15). Needed: at least 7 rows."
                )

    def prompts(self, split: Split | Literal["test"], *, markers: bool) -> list[Prompt]:
        """The stories of a part; `prompt_id` holds the row's number (from 0) in the data set as it was loaded."""
        return [
            Prompt(f"row-{row:06d}", self._text(self._stories[row], markers=markers), self._columns[row])
            for row in self._parts[split]
        ]

    def score(self, prompt: Prompt, completion: str) -> Score:
        r"""1 where the boxed answer is right; 0 where it is wrong, malformed or missing."""
        return Score(float(yes_or_no(completion) == prompt.columns["answer"]))

    def answered(self, completion: str) -> bool:
        """Whether the completion ends in a boxed Yes or No."""
        return yes_or_no(completion) is not None

    def _text(self, story: str, *, markers: bool) -> str:
        return continuity_prompt(story, style=self.config.prompt_style, markers=markers)

    def _row_problem(self, row: dict[str, Any], encode: Encode | None) -> str | None:
        for name in ("story", "cont_error"):
            if name not in row:
                return f"the column {name!r} is missing (columns: {', '.join(row) or 'none'})"
        problem = text_problem(row["story"], "story")
        if problem:
            return problem
        if not (isinstance(row["cont_error"], int | float) and row["cont_error"] in (0, 1)):
            return f"'cont_error' is {row['cont_error']!r:.60}, needed 0 or 1 (or false, true)"
        text = self._text(row["story"], markers=True)
        return length_problem(text, encode, self.config.max_prompt_tokens, "task.max_prompt_tokens")


def split_rows(count: int) -> dict[Split | Literal["test"], list[int]]:
    """Row numbers of each part of a data set of `count` rows, in the order in which they are used."""
    from datasets import Dataset  # takes seconds to import, and most runs do without

    order = Dataset.from_dict({"row": list(range(count))}).shuffle(seed=SPLIT_SEED)["row"][:]
    held_out = int(count * HELD_OUT_SHARE)
    train = count - 2 * held_out
    return {"train": order[:train], "eval": order[train : train + held_out], "test": order[train + held_out :]}


def _rows(path: str, recipe_dir: Path, problems: RowProblems) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each row with its place: `file:line` where the file has lines that are rows, else `path, row N`."""
    local = recipe_dir / Path(path).expanduser()
    if local.suffix == ".jsonl" and local.is_file():
        # Read here: the datasets library says of a broken line neither its number nor what is wrong.
        return ((f"{local}:{number}", row) for number, row in read_jsonl(local, "task.path", problems))
    if local.suffix in (".csv", ".json") and local.is_file() and not check_utf8(local, problems):
        return ()
    table = _one_part(_load(path, local), path)
    return ((f"{path}, row {number}", dict(row)) for number, row in enumerate(table))


def _load(path: str, local: Path) -> Dataset | DatasetDict:
    """The data set at a local path if there is one, else that of the hub; ValueError where there is neither."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()  # they would fill a log file
    meant_as_path = local.suffix in (".jsonl", *_FILE_KINDS) or path.startswith((".", "/", "~")) or path.count("/") > 1
    try:
        if not local.exists():
            if meant_as_path:
                raise FileNotFoundError("there is no such file or folder")
            return datasets.load_dataset(path)
        if local.is_file():
            if local.suffix not in _FILE_KINDS:
                raise ValueError(f"the suffix {local.suffix!r} is none of .jsonl, {', '.join(_FILE_KINDS)}")
            return datasets.load_dataset(_FILE_KINDS[local.suffix], data_files=str(local))
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return datasets.load_from_disk(str(local))
        return datasets.load_dataset(str(local))
    except (OSError, ValueError, DatasetsError) as error:
        source = str(local) if local.exists() or meant_as_path else f"the hub ({path})"
        raise ValueError(
            f"task.path: given {path}; nothing can be loaded from {source}: {_first_line(error)}\n"
            "Needed, with the columns story and cont_error: a hub id that this machine can reach or has in its cache; "
            "a .jsonl, .csv, .json or .parquet file, or a folder of such; or a folder written by save_to_disk.\n"
            f"{_WITHOUT_NETWORK}"
        ) from error


def _one_part(loaded: Dataset | DatasetDict, path: str) -> Dataset:
    """The part of the data set to use: the paper's, or the only one there is."""
    if not isinstance(loaded, dict):
        return loaded
    if HUB_PART in loaded:
        return loaded[HUB_PART]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise ValueError(
        f"task.path: {path} has the parts {', '.join(loaded)}. Needed: one part, or one called {HUB_PART}; "
        "lrscale makes the 70/15/15 split itself. Save the part you mean as a data set of its own."
    )


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"
