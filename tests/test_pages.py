import re
import tomllib
from glob import glob
from pathlib import Path

import pytest

from wsserver.pages import HEADERS, POLICY, WEB, load_pages

ROOT = Path(__file__).parent.parent
PAGES = load_pages()
OWN = [path for path in WEB.rglob("*") if path.is_file() and "vendor" not in path.parts]


def test_every_file_is_there_by_its_path_and_the_front_page_at_the_root() -> None:
    assert {f"/{path.relative_to(WEB).as_posix()}" for path in WEB.rglob("*") if path.is_file()} | {"/"} == PAGES.keys()
    assert PAGES["/"].body == PAGES["/index.html"].body == (WEB / "index.html").read_bytes()


@pytest.mark.parametrize(
    ("path", "content_type"),
    [("/", "text/html"), ("/style.css", "text/css"), ("/app.js", "text/javascript"), ("/icon.svg", "image/svg+xml")],
)
def test_a_browser_is_told_what_a_file_is_and_not_to_guess(path: str, content_type: str) -> None:
    headers = PAGES[path].response().headers
    assert headers["Content-Type"].startswith(content_type)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_only_the_client_is_for_other_pages_too() -> None:
    assert {path for path, page in PAGES.items() if "Access-Control-Allow-Origin" in page.headers} == {
        "/client.js",
        "/client.d.ts",
    }


def test_the_policy_has_no_exception() -> None:
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert set(POLICY.values()) == {"'none'", "'self'", "'script'"}
    assert all("*" not in value for value in POLICY.values())


def test_an_answer_is_a_new_one_each_time() -> None:
    first = PAGES["/"].response()
    first.headers["Server"] = "x"
    assert "Server" not in PAGES["/"].response().headers


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_a_file_names_no_other_place_and_makes_no_markup(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\son\w+=\"|style=\"|<style|\beval\(", text)


def test_an_installed_wheel_has_them_all() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = settings["package-data"]["wsserver"]
    found = {name for pattern in data for name in glob(pattern, root_dir=WEB.parent, recursive=True)}
    assert {str(path.relative_to(WEB.parent)) for path in WEB.rglob("*") if path.is_file()} <= found
