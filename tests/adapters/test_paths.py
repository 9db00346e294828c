"""The names and paths that users may give."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adapters.errors import AdapterNameInvalid
from adapters.paths import (
    MAX_NAME_LENGTH,
    UNFINISHED_SUFFIXES,
    check_name,
    folder_name,
    resolve_under,
    served_name,
)

ALPHANUMERIC = string.ascii_letters + string.digits


@given(
    st.text(ALPHANUMERIC, min_size=1, max_size=1), st.text(ALPHANUMERIC + "._-", max_size=MAX_NAME_LENGTH - 1)
)
def test_good_names(first: str, rest: str) -> None:
    assume(not (first + rest).endswith(UNFINISHED_SUFFIXES))
    assert check_name(first + rest) == first + rest


@given(st.text(max_size=8), st.characters(exclude_characters=ALPHANUMERIC + "._-"), st.text(max_size=8))
def test_no_name_has_another_character(before: str, bad: str, after: str) -> None:
    assume(not before.startswith("ft"))
    with pytest.raises(AdapterNameInvalid, match="cannot name an adapter"):
        check_name(before + bad + after)


@given(st.text(ALPHANUMERIC + "._/:-", min_size=1, max_size=30))
def test_a_fine_tuned_model_has_a_folder_of_its_own(rest: str) -> None:
    assume(not rest.endswith(UNFINISHED_SUFFIXES))
    name = f"ft:{rest}"
    folder = folder_name(check_name(name))
    assert set(folder) <= set(ALPHANUMERIC + "._-")
    assert served_name(folder) == name


@given(st.text(ALPHANUMERIC + "._-", max_size=20) | st.from_regex(r"ft_3a[a-z0-9_]*", fullmatch=True))
def test_no_two_folders_mean_one_name(folder: str) -> None:
    assert folder_name(served_name(folder)) == folder


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-flag", "_x", "a" * 129, "a\n", "a/b", "ü", "a\0", "a.tmp", "a.partial"],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(AdapterNameInvalid):
        check_name(name)


@given(st.text(max_size=20))
def test_every_accepted_path_stays_below_the_root(path: str) -> None:
    root = Path("/nowhere/adapters")
    try:
        found = resolve_under(root, path)
    except AdapterNameInvalid:
        return
    assert root in found.parents
    assert ".." not in found.parts


def test_relative_and_absolute_paths(tmp_path: Path) -> None:
    assert resolve_under(tmp_path, "a") == tmp_path / "a"
    assert resolve_under(tmp_path, "a/./b") == tmp_path / "a" / "b"
    assert resolve_under(tmp_path, tmp_path / "a") == tmp_path / "a"


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../x", "a/../b", "a/..", "/etc/passwd", "/", "a\0b", "a" * 5000]
)
def test_paths_that_lead_elsewhere(path: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterNameInvalid, match="is not a path below the adapter folder"):
        resolve_under(tmp_path, path)


def test_a_neighbour_with_the_same_beginning_is_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(AdapterNameInvalid):
        resolve_under(tmp_path / "adapters", str(tmp_path / "adapters-secret" / "a"))


def test_links_below_the_root_are_refused_but_the_root_may_be_one(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "a").mkdir(parents=True)
    (real / "link").symlink_to(real / "a")
    (tmp_path / "root").symlink_to(real)
    assert resolve_under(tmp_path / "root", "a") == tmp_path / "root" / "a"
    for path in ("link", "link/below"):
        with pytest.raises(AdapterNameInvalid, match="links are not followed"):
            resolve_under(real, path)
