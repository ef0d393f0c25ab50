"""How a program ends."""

from vegab.exits import outcome


def test_an_interruption_is_no_failure() -> None:
    errors = (None, KeyboardInterrupt(), SystemExit(75), SystemExit(1), ValueError())
    said = ["finished", "interrupted", "interrupted", "failed", "failed"]
    assert [outcome(error) for error in errors] == said
