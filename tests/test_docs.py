"""The documentation as a site: built strictly, complete, and without anything from elsewhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpcore import kernels

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `make docs` makes them: a dead link or anchor ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING -" not in done.stderr, done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert len(pages) > 15
    front = (site / "index.html").read_text()
    missing = {page for page in pages if f'href="{page}.html' not in front}
    assert missing <= {"index"}
    assert all((site / f"{page}.html").exists() for page in pages)


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r'<(?:link|script|img|iframe)\b[^>]*(?:href|src)="(?:https?:)?//[^"]*"')
    for page in site.glob("*.html"):
        assert not fetched.findall(page.read_text()), page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*[\"']?https?:", sheet.read_text()), sheet.name


def test_formulas_are_drawn_without_a_script(site):
    page = (site / "kernels.html").read_text()
    fences = (DOCS / "kernels.md").read_text().count("```math")
    assert page.count("<math ") >= fences >= 7
    assert "\\frac" not in page


def test_the_kernel_page_has_every_kernel_with_its_signature():
    page = (DOCS / "kernels.md").read_text()
    names = {"add_layer_norm", "bias_dropout_residual", "bias_gelu", "cross_entropy"}
    names |= {"layer_norm", "masked_softmax", "packed_attention"}
    assert set(re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)) == names
    for name in names:
        signature = inspect.signature(getattr(kernels, name))
        plain = signature.replace(
            parameters=[
                parameter.replace(annotation=inspect.Parameter.empty)
                for parameter in signature.parameters.values()
            ],
            return_annotation=inspect.Signature.empty,
        )
        assert f"\n`{name}{plain}`\n" in page


def _anchors(markdown: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", markdown, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_of_the_pages_outside_the_site_lead_somewhere(name):
    page = ROOT / name
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text()), target
