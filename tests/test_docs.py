"""The documentation: every page runs, shows what it prints and can be reached, and the site builds without warnings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_mixup import errors
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.measures.catalog import OWN
from manifold_mixup.lab.measures.registry import MEASURES
from support_docs import ROOT, blocks, run, shell_problems

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CARDS = sorted((DOCS / "methods").glob("*.md"))
SECTIONS = ["What", "Use", "Details", "Suggested settings", "Cost", "Caveats", "Evidence", "Source"]

# The compiler makes an object of every autograd function that it traces, and looks at the grad of what is no leaf:
# torch warns of the one, and hides the other warning from users, but not from a filter that makes warnings errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


# ------------------------------------------------------------------ every page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_of_the_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)
    assert shell_problems(page) == []


def test_the_pages_that_are_run_are_the_pages():
    assert {"index.md", "guides/where_to_mix.md", "guides/errors.md", "guides/execution.md"} <= set(map(name, PAGES))
    assert sum(len(blocks(page, "python")) for page in PAGES) > 20


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_a_method_card_has_the_sections_of_all_cards(card):
    text = re.sub(r"^```.*?^```", "", card.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    for section in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]:
        assert len(section.split()) >= 10, "a section has to say something, if only why there is nothing to say"


def test_there_is_a_card():
    assert CARDS


def test_the_guide_shows_every_error():
    page = DOCS / "guides" / "errors.md"
    shown = set(re.findall(r"^(\w+): ", "\n".join(b.content for b in blocks(page, "text")), re.MULTILINE))
    assert shown >= set(errors.__all__) - {"ManifoldMixupError"}


def named(page: str) -> set[str]:
    """What a guide sets in code type, word by word."""
    return set(re.findall(r"`([^`\s]+)`", (DOCS / "guides" / page).read_text(encoding="utf-8")))


def test_the_guide_names_every_data_set():
    assert set(DATASETS) - named("data.md") == set()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda measure: measure.name)
def test_the_guide_names_every_measure_and_all_its_numbers(measure):
    page = (DOCS / "guides" / "measures.md").read_text(encoding="utf-8")
    assert re.search(rf"^##+ {measure.name}$", page, re.MULTILINE), "it has no section"
    numbers = named("measures.md")
    assert [pattern for pattern in measure.metrics if not any(re.fullmatch(pattern, n) for n in numbers)] == []


def test_the_guide_names_the_numbers_of_the_spiral():
    assert set(OWN) - named("measures.md") == set()


# ------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning (a dead link, a page that is not in the navigation) an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **QUIET})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


QUIET = {"NO_MKDOCS_2_WARNING": "1"}


def test_the_site_has_every_page(site):
    for page in PAGES:
        built = page.with_name("index.html") if page.stem in ("index", "README") else page.with_suffix(".html")
        assert (site / built.relative_to(DOCS)).exists(), page


def test_the_site_loads_nothing_from_the_network(site):
    loaded = r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
    found = {url for page in site.rglob("*.html") for url in re.findall(loaded, page.read_text(encoding="utf-8"))}
    styles = {
        u for css in site.rglob("*.css") for u in re.findall(r"url\(['\"]?(https?:[^)]+)", css.read_text("utf-8"))
    }
    assert found | styles == set()


# ------------------------------------------------------------------ these tests can fail


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_a_block_that_raises_fails_and_names_the_line(tmp_path):
    page = page_of(tmp_path, "text\n\n```python\nx = 1\n```\n\n```python\ny = x\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run(page)
    assert error.traceback[-1].lineno + 1 == 9


def test_a_block_that_warns_fails(tmp_path):
    with pytest.raises(UserWarning):
        run(page_of(tmp_path, "```python\nimport warnings\nwarnings.warn('old')\n```\n"))


@pytest.mark.parametrize(
    ("shown", "same"),
    [
        ("1 2  \n3", True),
        ("1 2\n4", False),
        ("1 2", False),
        ("1 ...\n3", True),
        ("1 ... 4", False),
        ("...", True),
        ("1 2\n3 ... 4", False),
    ],
)
def test_what_a_page_shows_must_be_what_is_printed(tmp_path, shown, same):
    page = page_of(tmp_path, f"```python\nprint('1 2\\n3')\n```\n\n```text\n{shown}\n```\n")
    if same:
        run(page)
    else:
        with pytest.raises(AssertionError, match=r"page\.md, line 5"):
            run(page)


def test_a_text_block_after_prose_is_nobodys_output(tmp_path):
    code, output = "```python\nprint(1)\n```\n\n", "```text\n2\n```\n"
    run(page_of(tmp_path, f"{code}words\n\n{output}"))
    with pytest.raises(AssertionError, match="prints"):
        run(page_of(tmp_path, code + output))


def test_blocks_inside_lists_are_found(tmp_path):
    page = page_of(tmp_path, "- a list\n\n    ```python\n    raise KeyError\n    ```\n")
    with pytest.raises(KeyError):
        run(page)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make demo  # a target", None),
        ("make dmeo", "dmeo"),
        ("manifold-mixup methods && make test", None),
        ("manifold-mixup mehtods", "mehtods"),
        ("CUDA_VISIBLE_DEVICES=0 manifold-mixup compare --recipe spiral --seeds 5", None),
        ("manifold-mixup compare --recpie spiral", "--recpie"),
        ("pip install '.[lab]'", None),
        ("pip install 'manifold-mixup[lba]'", "lba"),
        ("python benchmarks/interpolation.py --rounds 3", None),
        ("python benchmarks/extrapolation.py", "extrapolation"),
    ],
)
def test_shell_lines_name_what_exists(tmp_path, line, problem):
    problems = shell_problems(page_of(tmp_path, f"```bash\n{line}\n```\n"))
    assert [bool(problems), *[problem in p for p in problems]] == ([True, True] if problem else [False])
