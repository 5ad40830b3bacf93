"""The tables of docs/benchmarks.md, against the committed results."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "docs" / "make_benchmarks_tables.py"))


def test_the_tables_are_what_the_results_say(script):
    page = PAGE.read_text(encoding="utf-8")
    assert script["updated"](page) == page, "run python docs/make_benchmarks_tables.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["updated_readme"](readme) == readme, "run python docs/make_benchmarks_tables.py"


def test_every_comparison_has_its_section_with_a_command_that_makes_it(script):
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


def test_a_page_without_marks_is_refused(script):
    with pytest.raises(ValueError, match="must have the lines"):
        script["updated"]("# Benchmarks\n")


@pytest.mark.parametrize(
    ("script", "page"), [("papers_page.py", "paper-experiments.md"), ("performance_page.py", "performance.md")]
)
def test_the_tables_of_a_page_are_what_the_results_say(script, page, monkeypatch):
    benchmarks = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert runpy.run_path(str(benchmarks / script))["updated"](written) == written, f"run python benchmarks/{script}"


def test_the_tables_of_agreement_are_what_the_results_say(monkeypatch):
    benchmarks = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    script = runpy.run_path(str(benchmarks / "agreement.py"))
    rows = json.loads((benchmarks / "results" / "agreement.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "choosing-an-estimator.md").read_text(encoding="utf-8")
    updated = script["tables"].updated(page, "agreement", script["sections"](rows))
    assert updated == page, "run python benchmarks/agreement.py --out ... --page docs/choosing-an-estimator.md"
