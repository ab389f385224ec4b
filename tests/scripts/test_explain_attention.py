"""docs/attention.md: its pointers hit the lines that they name, and its numbers are those that the script computes."""

from pathlib import Path

from scripts.explain_attention import DOCUMENT, NUMBERS, POINTER, REFERENCE, TABLES, forward, markdown, tensors, with_lines


def test_every_line_pointed_at_exists_and_contains_what_is_named():
    lines = REFERENCE.read_text().splitlines()
    pointers = POINTER.findall(DOCUMENT.read_text())
    assert len(pointers) > 15 and len(pointers) == DOCUMENT.read_text().count("reference.py#L")
    for code, shown, linked in pointers:
        assert shown == linked and code in lines[int(shown) - 1], f"run python scripts/explain_attention.py --write: {code} is not on line {shown}"


def test_the_numbers_are_the_scripts():
    shown = {name: text for text, name in ((block[0], block[1]) for block in NUMBERS.findall(DOCUMENT.read_text()))}
    assert shown.keys() == TABLES.keys()
    for name, make in TABLES.items():
        assert markdown(make()) in DOCUMENT.read_text(), f"run python scripts/explain_attention.py --write: {name} differs"


def test_the_script_finds_a_line_that_has_moved(monkeypatch, tmp_path):
    moved = Path(tmp_path / "reference.py")
    moved.write_text("\n\n" + REFERENCE.read_text())
    before = [int(line) for _, line, _ in POINTER.findall(DOCUMENT.read_text())]
    monkeypatch.setattr("scripts.explain_attention.REFERENCE", moved)
    assert [int(line) for _, line, _ in POINTER.findall(with_lines(DOCUMENT.read_text()))] == [line + 2 for line in before]


def test_the_mistake_is_in_the_one_factor():
    q, k, v, _ = tensors()
    right, wrong = forward(q, k, v, 512, True), forward(q, k, v, 512, False)
    assert right.equal(wrong), "one tile has nothing to rescale"
