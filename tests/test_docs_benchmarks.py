"""The tables of the pages in docs/ and of the README, against the committed results."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"


@pytest.fixture
def script_of(monkeypatch):
    """Runs a script of benchmarks/, and returns what it defines."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: runpy.run_path(str(BENCHMARKS / name))


@pytest.mark.parametrize(
    ("name", "function", "page"),
    [
        ("benchmarks_page.py", "updated", "docs/benchmarks.md"),
        ("benchmarks_page.py", "updated_readme", "README.md"),
        ("estimators_page.py", "updated", "docs/estimators.md"),
        ("papers_page.py", "updated", "docs/paper-experiments.md"),
        ("performance_page.py", "updated", "docs/performance.md"),
    ],
)
def test_the_tables_of_a_page_are_what_the_results_say(name, function, page, script_of):
    written = (ROOT / page).read_text(encoding="utf-8")
    assert script_of(name)[function](written) == written, f"run python benchmarks/{name}"


def test_every_comparison_has_its_section_with_a_command_that_makes_it(script_of):
    script = script_of("benchmarks_page.py")
    page = PAGE.read_text(encoding="utf-8")
    files = sorted((ROOT / "benchmarks" / "results").glob("compare_*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        (section,) = re.findall(rf"^### {content['task']}\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL)
        assert f"    {content['command']}\n" in section
        assert f"python benchmarks/compare.py --task {content['task']}" in content["command"]
        for method in {row["method"] for row in content["rows"]}:
            (line,) = re.findall(rf"^\| {re.escape(method)} \|.*", section, flags=re.MULTILINE)
            medians = [
                f"{content['statistics']['methods'][method]['scores'][s]['median']:#.3g}" for s in script["LOSSES"]
            ]
            assert all(f"| {median} [" in line for median in medians)


def test_a_page_without_marks_is_refused(script_of):
    with pytest.raises(ValueError, match="must have the lines"):
        script_of("benchmarks_page.py")["updated"]("# Benchmarks\n")


def test_the_tables_of_agreement_are_what_the_results_say(script_of):
    script = script_of("agreement.py")
    rows = json.loads((BENCHMARKS / "results" / "agreement.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "choosing-an-estimator.md").read_text(encoding="utf-8")
    updated = script["tables"].updated(page, "agreement", script["sections"](rows))
    assert updated == page, "run python benchmarks/agreement.py --out ... --page docs/choosing-an-estimator.md"
