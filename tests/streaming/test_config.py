"""Configuration errors name the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from streaming.cli import serve
from streaming.config import (
    CONFIG_ENV,
    Config,
    ConfigError,
    load_config,
    parse_config,
    with_overrides,
)
from streaming.problems import RENAMED


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[server]\nprot = 1", "server.prot: unknown key"),
        ("[serve]\nport = 1", "serve: unknown key"),
        ('[server]\nport = "8765"', "server.port"),
        ("[server]\nport = 70000", "server.port"),
        ("[engine]\ntick_ms = 100", "multiple of 80"),
        ("[ingest]\nring_s = 45\nmax_ahead_s = 60", "ingest.ring_s"),
        ("[moss]\nwindow_s = 3.0", "moss.window_s"),
        ("[moss]\nwindow_s = 8.0\nevict_blocks = 3", "moss: .*evict_blocks is 3; expected at most 2"),
        ("[moss]\nwindow_s = 600.0", "moss: .*max_position is 8192; expected at least 10752"),
        ("[moss]\nanswer_tokens = 2000", "moss: .*answer_tokens is 2000; expected at most 1024"),
        ('[moss]\nmarkers = "none"', "moss.markers"),
        ("[server", "no TOML"),
        ("[transcript]\nedge_s = 0.5", r"transcript.edge_s: is now called transcript\.commit_delay_s$"),
        ("[transcript]\npatience_s = 2.0", "transcript.patience_s: .* transcript.unsure_commit_delay_s$"),
        ("[transcript]\nsure_score = 0.4", "transcript.sure_score: .* transcript.sure_confidence$"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    """Unknown keys, wrong types and impossible values, with the file they are in."""
    with pytest.raises(ConfigError, match=f"^some.toml: .*{named}"):
        parse_config(text, "some.toml")


@pytest.mark.parametrize("section", sorted(Config.model_fields))
@pytest.mark.parametrize(
    "value", ['"words"', "-1", "1e300", "1.5", "true", "[]", "[1]", "{}", "{x = 1}", "''"]
)
def test_what_is_wrong_is_told_in_plain_words(section: str, value: str) -> None:
    """Of every key, whatever it is given: what was expected, and no term of the library that checks it."""
    for key in type(getattr(Config(), section)).model_fields:
        try:
            parse_config(f"[{section}]\n{key} = {value}", "some.toml")
        except ConfigError as exc:
            for line in str(exc).splitlines():
                assert re.match(rf"some\.toml: (file: )?{section}(\.{key}(\.\w+)*)?(: | is )", line), line
                assert "expected" in line or "IPv4" in line, line
                assert not re.search(r"Input|Value error|valid |should|\{\w*\}", line.split(" (got ")[0]), (
                    line
                )


def test_a_renamed_key_leads_to_one_that_exists() -> None:
    """And is none itself any more."""
    for old, new in RENAMED.items():
        section, _, key = new.partition(".")
        fields = type(getattr(Config(), section)).model_fields
        assert key in fields
        assert old.removeprefix(f"{section}.") not in fields


def test_every_problem_has_its_line() -> None:
    """Not only the first."""
    with pytest.raises(ConfigError) as caught:
        parse_config("[server]\nport = -1\nhots = 'x'")
    assert len(str(caught.value).splitlines()) == 2


def test_an_empty_file_is_the_defaults() -> None:
    """Every setting has one."""
    assert parse_config("") == Config()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """It is never skipped in silence."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")


def test_overrides_are_checked_like_the_file() -> None:
    """And leave the rest alone."""
    config = with_overrides(parse_config("[server]\nport = 1"), {"server": {"host": "::1"}, "model": {}})
    assert (config.server.host, config.server.port) == ("::1", 1)
    with pytest.raises(ConfigError, match=r"command line: server\.port"):
        with_overrides(config, {"server": {"port": -1}})


@pytest.mark.parametrize("how", ["option", "environment", "folder"])
def test_serve_finds_its_configuration_and_says_what_is_wrong(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the file is named; the status is 2."""
    path = tmp_path / "config.toml"
    path.write_text("[server]\nprot = 1")
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    monkeypatch.chdir(tmp_path if how == "folder" else tmp_path.parent)
    if how == "environment":
        monkeypatch.setenv(CONFIG_ENV, str(path))
    result = CliRunner().invoke(serve, ["--config", str(path)] if how == "option" else [])
    assert result.exit_code == 2
    assert "server.prot: unknown key" in result.stderr
