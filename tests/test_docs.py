"""The protocol's page and schema are what the code says; the operator's page names what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from scripts.make_protocol_schema import page_text, schema_text
from streaming import protocol
from streaming.config import Config
from streaming.metrics import Metrics, Observed
from streaming.protocol import Close, Envelope, Flush, Lag, SessionClosed, encode, encode_client
from streaming.refusals import Refusal
from streaming.server.auth import parse_tokens
from tests.protocol_schema import SchemaCheck
from tests.streaming.support import receive_until, running_server, s16, utterances

DOCS = Path(__file__).resolve().parent.parent / "docs"
HOW = "run scripts/make_protocol_schema.py"


def read(name: str) -> str:
    """A file of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_schema_is_the_protocols() -> None:
    """The committed file is what the script writes, and a schema."""
    assert read("protocol.schema.json") == schema_text(), HOW
    Draft202012Validator.check_schema(json.loads(schema_text()))


def test_the_tables_are_the_protocols() -> None:
    """Every message, field, code and refusal, with a meaning for each code."""
    page = read("protocol.md")
    assert page_text(page) == page, HOW
    for codes in (protocol.CloseCode, protocol.HttpStatus):
        for code in codes:
            assert re.search(rf"\\| {code.value} \\| `{code.name}` \\| .+ \\|", page), code


def test_every_example_is_a_message() -> None:
    """By the schema, with no field that it does not name."""
    validator = Draft202012Validator(json.loads(read("protocol.schema.json")))
    blocks = re.findall(r"```json\n(.*?)```", read("protocol.md"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        validator.validate(json.loads(line))
        if "seq" in line:
            assert json.loads(encode(protocol.decode(line))) == json.loads(line)


def test_a_message_that_is_not_of_the_schema_is_noticed(schema_check: SchemaCheck) -> None:
    """A wrong type, a field that is missing, and one that the schema does not name."""
    encode(Envelope("a", 1, Lag("many")))  # type: ignore[arg-type]
    encode(Envelope("a", -1, Lag(1)))
    schema_check.see('{"type": "flush"}', is_ours=True)
    schema_check.see('{"type": "flush", "id": "a", "more": 1}', is_ours=True)
    encode_client(Flush("fine"))
    assert [fault.split(":")[0] for fault in schema_check.take()] == ["lag", "lag", "flush", "flush"]


async def test_the_check_sees_what_a_server_says_and_hears(schema_check: SchemaCheck) -> None:
    """Each message twice: where it is written, and where it is read."""
    before = schema_check.n_seen
    async with running_server() as running, running.stream("a") as connection:
        await connection.send(s16(utterances(1.0)))
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)
    assert schema_check.n_seen - before >= 2 * (len(found) + 1)


@pytest.mark.parametrize("kind", protocol.MESSAGE_TYPES)
def test_every_type_of_message_is_on_the_page(kind: str) -> None:
    """With a section of its own."""
    assert f"### `{kind}`\n" in read("protocol.md")


def test_every_path_and_pattern_is_on_the_page() -> None:
    """All that a client may ask for, and the names that its stream gets there."""
    page = read("protocol.md")
    for name, value in vars(protocol).items():
        if name.endswith(("_PATH", "_STREAMS")) and isinstance(value, str):
            assert f"`{value}" in page, name


# --- the operator's page -----------------------------------------------------------------


def sample_names() -> set[str]:
    """The names of all samples that /metrics has."""
    text = Metrics().render(Observed(0, 0, 0, 0, False, 0, 0, ())).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def families() -> set[str]:
    """The names of all metrics, as the page's table has them: without a histogram's endings."""
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in sample_names()}
    return {name for name in names if name.startswith("moss_live_")}


def test_every_metric_on_the_page_exists_and_every_one_is_on_it() -> None:
    """In the text, the table and the queries."""
    named = set(re.findall(r"\b(?:moss_live|process)_[a-z_]+", read("operate.md")))
    assert named <= sample_names() | families()
    assert families() <= named


def test_every_setting_on_the_pages_exists() -> None:
    """`section.key`, as in config.toml."""
    sections = Config().model_dump()
    pattern = rf"`({'|'.join(sections)})\.([a-z_]+)`"
    for name in ("operate.md", "protocol.md"):
        for section, key in re.findall(pattern, read(name)):
            is_message = f"{section}.{key}" in protocol.MESSAGE_TYPES
            assert is_message or key in sections[section], f"{name}: {section}.{key}"


def test_every_refusal_is_explained() -> None:
    """What it means, and what to do."""
    page = read("operate.md")
    table = page[page.index("## What each refusal means") : page.index("## Metrics")]
    assert {refusal.label for refusal in Refusal} <= set(re.findall(r"`([a-z_]+)`", table))


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("max_half_open", "256"),
        ("attempts_per_s", "10 a second"),
        ("attempts_burst", "100 at once"),
        ("address_connections", "64"),
        ("token_streams", "8"),
        ("token_subscribers", "500"),
        ("audio_speed", "50 times"),
        ("audio_burst_s", "60 s at once"),
        ("audio_ahead_s", "900 s"),
        ("handshake_timeout_s", "10 s"),
    ],
)
def test_the_limits_on_the_page_are_the_defaults(setting: str, shown: str) -> None:
    """The row that names the setting has its default."""
    [row] = [
        line for line in read("operate.md").splitlines() if line.startswith("|") and f"{setting}`" in line
    ]
    assert shown in row
    assert f"{getattr(Config().limits, setting):g}" in shown


def test_the_tokens_file_on_the_page_can_be_read() -> None:
    """With a real hash in the place of the dots."""
    [block] = [b for b in re.findall(r"```toml\n(.*?)```", read("operate.md"), re.DOTALL) if "[[token]]" in b]
    [entry] = parse_tokens(block.replace("sha256:...", f"sha256:{'0' * 64}"))
    assert entry.grant.max_subscribers == 10
