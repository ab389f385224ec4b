from pathlib import Path

import pytest

from training import compositions
from training.config import ConfigError, load_config

ROWS = [pytest.param(row, id="-".join(row.keys)) for row in compositions.ROWS]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_refused_and_its_remedy_accepted(row):
    with pytest.raises(ConfigError) as caught:
        load_config("configs/base.yaml", row.example)
    (fault,) = str(caught.value).splitlines()[1:]
    assert fault.split(": ")[1] == row.keys[0]
    for text in (row.reason, row.remedy):
        assert all(part in fault for part in text.translate(str.maketrans("{}", "||")).split("|")[::2])
    load_config("configs/base.yaml", [*row.example, *row.instead])


@pytest.mark.parametrize("row", ROWS)
def test_a_rows_keys_exist_and_its_predicate_reads_no_other_section(row):
    """Sections with faults of their own are not there to be read."""
    config, _ = load_config("configs/base.yaml")
    for key in row.keys:
        section, name = key.split(".")
        assert name in type(getattr(config, section)).model_fields
    alone = type("Alone", (), {section: getattr(config, section) for section in row.sections})
    assert not row.refused(alone)


def test_the_table_has_a_line_for_every_row():
    lines = compositions.table().splitlines()[2:]
    assert len(lines) == len(compositions.ROWS) and all(line.count("|") == 4 for line in lines)


def test_the_documentation_shows_the_table():
    page = Path(__file__).parents[2] / "docs/modes.md"
    assert compositions.table() in page.read_text(encoding="utf-8"), "put what python -m training.compositions prints into docs/modes.md"
