"""Writes the tables of docs/benchmarks.md and of the README anew, from benchmarks/results and from nothing else.

python benchmarks/benchmarks_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables

from optuna_greedyhg.report.comparison import LOSSES, MethodRow, Statistics, statistics_of
from optuna_greedyhg.report.runs import run_from_json
from optuna_greedyhg.report.statistics import mean_and_half_width
from optuna_greedyhg.report.wording import number, p_value, plus_minus
from optuna_greedyhg.tasks import TASKS

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
REFERENCE = "tpe"
SUMMARY = ("task", "method", "test loss", "difference to tpe ± 95%", "seeds won", "p", "tpe's end reached")
COMPARISON = (
    "method",
    "trials",
    "validation loss",
    "test loss",
    "on the way",
    "on the way, to tpe's ± 95%",
    "tpe's end reached, validation",
    "test",
    "seconds",
)
USUAL = "usual"
ABLATION = (
    "choice",
    "seeds",
    "validation loss",
    "test loss",
    f"validation, to {USUAL}'s ± 95%",
    "test",
    "on the way, validation",
    "test",
    "refined trials",
)
_PAIRED = ("val_loss", "test_loss", "mean_val_loss", "mean_test_loss")


def comparisons() -> dict[str, dict[str, Any]]:
    """What ``benchmarks/compare.py`` has written, by task, in the order of ``greedyhg tasks``."""
    found = {content["task"]: content for content in map(_read, RESULTS.glob("compare_*.json"))}
    return {task: found[task] for task in TASKS if task in found}


def statistics_in(content: Mapping[str, Any]) -> Statistics:
    """Those of a comparison's rows, made anew."""
    return statistics_of([run_from_json(row) for row in content["rows"]], REFERENCE, content["budget"])


def summary(page: str = "") -> str:
    """Every task and every method that refines: the test loss beside TPE's at equal cost; sections are of ``page``."""
    lines = []
    for task, content in comparisons().items():
        its = statistics_in(content)
        reference = next(row for row in its.rows if row.name == REFERENCE)
        lines.append([f"[{task}]({page}#{task})", REFERENCE, number("test_loss", reference.scores["test_loss"].median)])
        lines[-1] += [""] * (len(SUMMARY) - len(lines[-1]))
        lines += [["", row.name, *_beside(row, its.n_seeds)] for row in its.rows if "+" in row.name]
    return tables.table(SUMMARY, lines)


def _beside(row: MethodRow, n_seeds: int) -> list[str]:
    paired, anytime = row.against["test_loss"], row.anytime["test_loss"]
    return [
        number("test_loss", row.scores["test_loss"].median),
        plus_minus("test_loss", paired.mean_difference, paired.half_width),
        f"{paired.wins} of {n_seeds}",
        p_value(row.p_corrected["test_loss"]),
        _share(anytime.reached),
    ]


def comparison_sections() -> str:
    """A section for every task, with its command and a row for every method."""
    return "\n\n".join(_section(task, content) for task, content in comparisons().items())


def _section(task: str, content: Mapping[str, Any]) -> str:
    its = statistics_in(content)
    file = f"compare_{task.replace('-', '_')}.json"
    seeds = "1 seed" if its.n_seeds == 1 else f"{its.n_seeds} seeds"
    how = (
        f"{TASKS[task]}; {seeds}, {content['n_full_trainings']:g} full trainings each. "
        f"[`{file}`](../benchmarks/results/{file}), on {content['machine']['processor']}, torch "
        f"{content['versions']['torch']}, made by"
    )
    renewed = content.get("renewed", {"methods": []})
    again = f"    {renewed['command']}\n" if renewed["methods"] else ""
    lines = _lines(its, elsewhere=renewed["methods"])
    return f"### {task}\n\n{how}\n\n    {content['command']}\n{again}\n{tables.table(COMPARISON, lines)}"


def _lines(its: Statistics, elsewhere: Sequence[str]) -> Iterator[list[str]]:
    """One line a method; without the seconds of those that were run at another time."""
    for row in its.rows:
        low, high = row.n_trials
        val, test = row.anytime["val_loss"], row.anytime["test_loss"]
        versus = test.against
        yield [
            row.name,
            f"{low}" if low == high else f"{low}–{high}",
            *(_with_quartiles(row, score) for score in LOSSES),
            number("test_loss", test.mean.median),
            "" if versus is None else plus_minus("test_loss", versus.mean_difference, versus.half_width),
            _share(val.reached),
            _share(test.reached),
            "" if row.name in elsewhere else f"{row.seconds.median:.0f}",
        ]


def _with_quartiles(row: MethodRow, score: str) -> str:
    x = row.scores[score]
    return f"{number(score, x.median)} [{number(score, x.first_quartile)}, {number(score, x.third_quartile)}]"


def _share(reached: float) -> str:
    return f"{100 * reached:.0f}%" if reached < float("inf") else "never"


def ablations() -> str:
    """A table for every task: studies in which one choice is otherwise, beside the usual ones of the same seeds."""
    path = RESULTS / "ablations.json"
    rows = _read(path)["rows"] if path.exists() else []
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["cell"]["task"], []).append(row)
    return "\n\n".join(f"### Choices on {task}\n\n{_ablation(its)}" for task, its in by_task.items())


def _ablation(rows: Sequence[Mapping[str, Any]]) -> str:
    made_by, (task, budget) = rows[-1]["made_by"], (rows[0]["cell"][key] for key in ("task", "budget"))
    n_seeds = 1 + max(row["cell"]["seed"] for row in rows)
    by_choice: dict[str, dict[int, Mapping[str, float]]] = {}
    for row in rows:
        by_choice.setdefault(row["cell"]["choice"], {})[row["cell"]["seed"]] = row["result"]
    lines = [_choice_line(choice, its, by_choice[USUAL]) for choice, its in by_choice.items()]
    how = (
        f"{budget:g} full trainings each, on {made_by['machine']['processor']}, torch {made_by['versions']['torch']}. "
        "All choices there are, on these seeds:"
    )
    command = f"python benchmarks/ablations.py --tasks {task} --seeds {n_seeds} --budget {budget:g}"
    return f"{how}\n\n    {command}\n\n{tables.table(ABLATION, lines)}"


def _choice_line(
    choice: str, its: Mapping[int, Mapping[str, float]], usual: Mapping[int, Mapping[str, float]]
) -> list[str]:
    """Medians over all its seeds, and mean differences to the usual studies of the same seeds."""
    medians = {key: statistics.median(result[key] for result in its.values()) for key in next(iter(its.values()))}
    differences = [
        ""
        if choice == USUAL
        else plus_minus(key, *mean_and_half_width([its[seed][key] - usual[seed][key] for seed in its]))
        for key in _PAIRED
    ]
    return [
        choice,
        f"{len(its)}",
        *(number(key, medians[key]) for key in LOSSES),
        *differences,
        f"{medians['n_refined']:.0f} of {medians['n_trials']:.0f}",
    ]


def updated(page: str) -> str:
    """The page with all its tables written anew."""
    parts = {"summary": summary(), "comparisons": comparison_sections(), "ablations": ablations()}
    for name, text in parts.items():
        page = tables.updated(page, name, text)
    return page


def updated_readme(page: str) -> str:
    """The README with its one table written anew."""
    return tables.updated(page, "summary", summary("docs/benchmarks.md"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path, write in {PAGE: updated, README: updated_readme}.items():
        path.write_text(write(path.read_text(encoding="utf-8")), encoding="utf-8")
