"""A server's URL holds a password, which nobody is shown, however the URL is written."""

from __future__ import annotations

import pytest

from ledger import Guard, LedgerError, UsageError
from ledger_stores.base import without_password


@pytest.mark.parametrize("scheme", ["postgresql", "redis"])
@pytest.mark.parametrize("mark", ["/", "#", "?", "@", "[", "%zz"])
def test_a_password_that_should_be_encoded_is_refused_unseen(scheme: str, mark: str) -> None:
    """The error says what to write instead, and shows no piece of the password."""
    guard = Guard(f"{scheme}://ann:hun{mark}ter2@127.0.0.1:1/0", quiet=True)

    with pytest.raises(UsageError, match=r"ann@127\.0\.0\.1:1/0.*percent-encoded") as refused:
        guard(pytest.fail, "ran")

    assert "hun" not in str(refused.value)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["postgresql", "redis"])
@pytest.mark.parametrize("where", ["ann:hun%2Fter2@127.0.0.1:1/0", "127.0.0.1:1/0?password=hunter2"])
def test_a_password_is_in_no_error_of_a_driver(scheme: str, where: str) -> None:
    """A server that is not there is named without it."""
    with pytest.raises(LedgerError) as refused:
        Guard(f"{scheme}://{where}", quiet=True)(pytest.fail, "ran")

    assert "127.0.0.1:1/0" in str(refused.value)
    assert "hun" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://h/db", "postgresql://h/db"),
        ("postgresql://u@h/db?sslpassword=x&a=b", "postgresql://u@h/db?sslpassword=****&a=b"),
        ("postgresql:///db?host=/tmp&PASSWORD=x@y", "postgresql:///db?host=/tmp&PASSWORD=****"),
        ("redis://:x@[::1]:6379/0", "redis://[::1]:6379/0"),
        ("ledger.db", "ledger.db"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    """All but passwords."""
    assert shown == without_password(url)
