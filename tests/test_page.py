"""The HTML page that is one file: it is well formed, escapes every text and loads nothing."""

import base64
import re

import pytest
from helpers import PageReader

from dclr.evaluation.page import Html, details, page, picture, section, side_by_side, table, text

EVIL = '"><script>alert(1)</script>\udcff\n & co'


def test_a_page_is_well_formed_and_holds_its_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png bytes")
    content = page(
        "Runs",
        [
            "An introduction.",
            section("Loss", "One sentence.", table(["run", "loss"], [["a", "0.41"], ["b", 2]], numbers={"loss"})),
            section("Curves", picture(b"other bytes", "a curve", "the loss"), picture(tmp_path / "a.png", "another")),
        ],
    )
    found = PageReader(content)
    assert found.title == "Runs"
    assert found.headings == ["Runs", "Loss", "Curves"]
    assert found.cells == ["run", "loss", "a", "0.41", "b", "2"]
    assert content.count('<td class="number">') == content.count("<tr><td>") == 2
    assert [base64.b64decode(source.split(",")[1]) for source in found.sources] == [b"other bytes", b"png bytes"]
    assert found.descriptions == ["a curve", "another"]
    assert "<p>An introduction.</p>" in content
    assert "<p>One sentence.</p>" in content
    assert "<figcaption>the loss</figcaption>" in content
    assert re.findall(r"https?:|@import|url\(", content) == []
    assert "default-src 'none'" in content


def test_every_text_is_escaped():
    inside = [EVIL, section(EVIL, EVIL, table([EVIL], [[EVIL]], numbers={EVIL}), picture(b"", EVIL, EVIL))]
    content = page(EVIL, inside)
    content.encode()
    assert "<script" not in content
    assert "&lt;script" in content
    found = PageReader(content)
    plain = EVIL.replace("\udcff", "\\udcff").replace("\n", "\\n")
    assert (found.title, found.headings, found.cells, found.descriptions) == (plain, [plain] * 2, [plain] * 2, [plain])


def test_parts_next_to_each_other_and_parts_that_are_opened():
    both = side_by_side(picture(b"1", "one"), picture(b"2", "two"))
    found = PageReader(page("t", [details("All <settings>", "A sentence.", both)]))
    assert found.descriptions == ["one", "two"]
    assert "<summary>All &lt;settings&gt;</summary>\n<p>A sentence.</p>" in details("All <settings>", "A sentence.")


def test_html_is_not_escaped_twice():
    assert text(Html("<b>1</b>")) == "<b>1</b>"
    assert text(text("a & b")) == "a &amp; b"
    assert "<td><b>1</b></td>" in table(["n"], [[Html("<b>1</b>")]])


def test_a_row_needs_a_cell_for_each_column():
    with pytest.raises(ValueError, match="shorter"):
        table(["a", "b"], [["1"]])


def test_the_reader_of_these_tests_refuses_pages_that_are_not_well_formed():
    for wrong in ("<p><b>text</p></b>", "<p>text", "</p>", "<section><p>text</section>"):
        with pytest.raises(AssertionError):
            PageReader(wrong)
