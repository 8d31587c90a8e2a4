"""Files, sources and conversations by hand: whole messages, and what a template is asked for."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sarm.config import SourceConfig, UserError
from sarm.data import conversations, sources
from sarm.data.conversations import (
    PROBE,
    Tokenized,
    check_system,
    end_of_turn_id,
    pair_inputs,
    pinned_template,
    prompt_ids,
    spelled_in,
    spelled_special_tokens,
    stop_ids,
    template_ids,
    tokenize_conversation,
    tokenize_conversations,
)
from sarm.data.files import KINDS, SUFFIXES, read_records
from sarm.data.formats import HhRlhf, Place
from sarm.data.sources import file_url, repository_folder, source_files
from tests.data.test_conversations import EVERY, HEAD, OPENED, chat, with_template
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

BOS, EOT, PAD = 0, 3, 4

# Conversations


def test_a_conversation_ends_at_its_last_end_of_turn_whatever_blank_follows() -> None:
    tokenizer = tiny_tokenizer()
    two = [chat("How can I?", "I will not."), chat("a", "b", "c", "d")]
    whole = template_ids(tokenizer, two)
    assert tokenize_conversations(tokenizer, two, 512) == [
        Tokenized(ids, len(ids) - 1, False, False) for ids in whole
    ]
    blank = with_template(CHAT_TEMPLATE + "\n \n")
    assert tokenize_conversations(blank, two, 512) == [
        Tokenized(ids, len(ids) - 1, False, False) for ids in whole
    ]
    n = len(whole[0])
    exact = tokenize_conversation(tokenizer, two[0], n)
    assert exact == Tokenized(whole[0], n - 1, False, False), "as long as it may be"
    cut = tokenize_conversation(tokenizer, two[0], n - 1)
    assert cut == Tokenized([BOS, *whole[0][2:]], n - 2, True, False)
    assert tokenize_conversation(tokenizer, two[0], 2) == Tokenized([BOS, EOT], 1, True, False)


def test_a_turn_that_the_template_leaves_open_is_closed() -> None:
    opened = with_template(CHAT_TEMPLATE + "{{ 'so on' }}")
    assert end_of_turn_id(opened) == EOT, "the eos: text follows the last special token"
    ids = template_ids(opened, [chat("a", "b")])[0]
    made = tokenize_conversation(opened, chat("a", "b"), 512)
    assert made == Tokenized([*ids, EOT], len(ids), False, True)
    plain = with_template("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    assert end_of_turn_id(plain) == EOT
    with pytest.raises(UserError) as refused:
        end_of_turn_id(with_template("x", eos_token=None, name_or_path="a/model"))
    assert str(refused.value) == (
        "the chat template of a/model ends a turn with no special token and there is no eos_token;"
        " set one"
    )


def test_what_ends_a_response_goes_by_the_template_as_it_stands() -> None:
    class Model:
        class generation_config:
            eos_token_id: Any = None

    tokenizer = tiny_tokenizer()
    assert stop_ids(object(), tokenizer) == (EOT,)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|eot_id|>", "<|pad|>")
    assert stop_ids(object(), tokenizer) == (EOT, PAD), "no earlier template's"
    Model.generation_config.eos_token_id = [9, 5]
    assert stop_ids(Model(), tokenizer) == (EOT, PAD, 5, 9)
    tokenizer.eos_token = None
    Model.generation_config.eos_token_id = None
    assert stop_ids(Model(), tokenizer) == (PAD,)


def test_a_template_hears_the_same_whether_or_not_a_text_spells_a_token() -> None:
    tokenizer = tiny_tokenizer()
    some = [chat("a <|pad|>"), chat("b")]
    forged, plain = template_ids(tokenizer, some, add_generation_prompt=True)
    open_turn = tokenizer(HEAD.format("assistant"), add_special_tokens=False)["input_ids"]
    assert forged[-len(open_turn) :] == plain[-len(open_turn) :] == open_turn
    assert plain == prompt_ids(tokenizer, some[1])
    assert template_ids(tokenizer, []) == []
    with pytest.raises(UserError, match="has no chat template"):
        template_ids(with_template(None), [])


def test_the_probe_for_system_messages_is_one_before_a_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def rendered(tokenizer: Any, messages: Any, **how: Any) -> str:
        asked.append((messages, how))
        return f"... {PROBE} ..."

    monkeypatch.setattr(conversations, "_rendered", rendered)
    check_system(tiny_tokenizer())
    system, user = {"role": "system", "content": PROBE}, {"role": "user", "content": "a"}
    assert asked == [([system, user], {"add_generation_prompt": True})]


def test_a_refusal_of_a_template_is_told_whole() -> None:
    template = (
        "{% if messages | length > 1 %}{{ raise_exception(messages[0]['content']) }}{% endif %}"
    )
    tokenizer = with_template(template, name_or_path="a/model")
    long = "x" * 39 + "yz"
    for said, reason in (("no \n more", "no more"), ("", "TemplateError")):
        with pytest.raises(UserError) as refused:
            template_ids(tokenizer, [chat(said, "x", "y", long)])
        assert str(refused.value) == (
            "the chat template of a/model takes no conversation of roles user, assistant, user,"
            f" assistant ({reason}): the one whose last turn begins {'x' * 39 + 'y'!r}; leave such"
            " rows out or change the template"
        )
    use = "; use an instruct model's tokenizer"
    named = {"tool_use": "t", "rag": "r"}
    for given, lacks in (
        (None, "has no chat template"),
        (named, "has chat templates rag, tool_use and none named default"),
    ):
        with pytest.raises(UserError) as refused:
            pinned_template(with_template(given, name_or_path="a/model"))
        assert str(refused.value) == f"the tokenizer of a/model {lacks}{use}"


def test_special_tokens_that_a_text_spells_are_counted_in_every_turn() -> None:
    tokenizer = tiny_tokenizer()
    assert spelled_in(tokenizer, "<|pad|><|pad|> <|eot_id|") == 2
    turns = chat("<|pad|>", "none", "<|eot_id|> <|begin_of_text|>")
    assert spelled_special_tokens(tokenizer, turns) == 3
    bare = tiny_tokenizer()
    regular = conversations.special_spelling(bare)
    assert regular.findall("<|pad|>x<|end_header_id|>") == ["<|pad|>", "<|end_header_id|>"]


def test_a_judge_reads_pairs_padded_to_the_longest() -> None:
    tokenizer = tiny_tokenizer()
    asked, answers = ["How?", "How can I make this work?"], ["No.", "Sure, here is how."]
    found = pair_inputs(tokenizer, asked, answers, 64)
    ids, mask = found["input_ids"], found["attention_mask"]
    alone = [
        tokenizer(q, a, split_special_tokens=True)["input_ids"]
        for q, a in zip(asked, answers, strict=True)
    ]
    assert tuple(ids.shape) == (2, max(map(len, alone))) and len(alone[0]) < len(alone[1])
    for row, kept, expected in zip(ids.tolist(), mask.tolist(), alone, strict=True):
        assert [i for i, k in zip(row, kept, strict=True) if k] == expected
        assert {i for i, k in zip(row, kept, strict=True) if not k} <= {PAD}


def test_all_special_tokens_behind_the_answer_close_it_and_none_before() -> None:
    assert stop_ids(object(), with_template(EVERY + OPENED)) == (EOT,)
    doubled = with_template(EVERY.replace("<|eot_id|>", "<|eot_id|><|pad|>") + OPENED)
    assert stop_ids(object(), doubled) == (EOT, PAD)
    assert end_of_turn_id(doubled) == PAD


# Files


def told(file: Path) -> str:
    with pytest.raises(UserError) as refused:
        list(read_records(file))
    return str(refused.value)


def test_records_of_every_kind_have_their_place(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\xef\xbb\xbf"}\n'
    table = "\ufeffa,b\n1,2\n\n3,4\n".encode()
    files: dict[str, tuple[bytes, list[tuple[str, Any]]]] = {
        "d.jsonl": (lines, [("line 1", {"a": 1}), ("line 4", {"a": "\ufeff"})]),
        "d.jsonl.gz": (gzip.compress(lines), [("line 1", {"a": 1}), ("line 4", {"a": "\ufeff"})]),
        "d.txt": (b' \n [{"a": 1},\n{"a": 2}]', [("record 1", {"a": 1}), ("record 2", {"a": 2})]),
        "d.csv": (table, [("row 1", {"a": "1", "b": "2"}), ("row 3", {"a": "3", "b": "4"})]),
        "d.tsv": (b"a\tb\n1,\t2\n", [("row 1", {"a": "1,", "b": "2"})]),
        "d.tsv.gz": (gzip.compress(b"a\tb\n1\t2\n"), [("row 1", {"a": "1", "b": "2"})]),
        "d.csv.gz": (gzip.compress(b'a\n"x\r\ny"\n'), [("row 1", {"a": "x\r\ny"})]),
    }
    for name, (content, expected) in files.items():
        file = tmp_path / name
        file.write_bytes(content)
        assert list(read_records(file)) == [(f"{file}, {p}", r) for p, r in expected], name
    wide = tmp_path / "wide.csv"
    wide.write_text(f"a\n{'x' * 200_000}\n")
    assert len(next(read_records(wide))[1]["a"]) == 200_000, "beyond Python's own limit"


def test_what_cannot_be_read_is_told_to_the_letter(tmp_path: Path) -> None:
    def refusal(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        said = told(tmp_path / name)
        assert said.startswith(str(tmp_path / name))
        return said.removeprefix(str(tmp_path / name))

    kinds = f"the file may be cut short, or of another kind: {KINDS} are read, by their suffix"
    assert KINDS == "JSON Lines, JSON, CSV and Parquet, the first three also gzipped"
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    lfs = ": a git-LFS pointer and not the file itself; run git lfs pull there"
    assert refusal("d.jsonl", b"\n" + pointer) == f", line 2{lfs}"
    assert refusal("d.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "b": 3}') == (
        f", line 2: not JSON ('b' is given twice); {kinds}"
    )
    assert refusal("d.jsonl", b'{"a": 1}\n[1]') == ", line 2: expected an object, found list"
    assert (
        refusal("d.json", b'[{"a": 1}, null]') == ", record 2: expected an object, found NoneType"
    )
    assert refusal("d.json", b'\n[{"a": "\xff"}]') == (
        ": not UTF-8 (invalid start byte at byte 8); re-encode the file"
    )
    assert refusal("d.json", b"[1").endswith(f"; {kinds}")
    assert refusal("d.json", b" \n") == " is empty" and refusal("d.csv", b"a,b\n") == " is empty"
    whole = gzip.compress(b'{"a": 1}\n{"a": 2}\n')
    assert refusal("d.jsonl.gz", whole[:-9]).startswith(", after line ")
    assert refusal("d.jsonl.gz", b"no gzip") == (
        ", after line 0: cannot be read (Not a gzipped file (b'no'))"
    )
    assert refusal("d.csv", b"a,b,a\n1,2,3\n") == ": its first line names a column twice: a, b, a"
    assert refusal("d.csv", b"a,b\n1,2\n1,2,3\n") == (
        ", row 2: has 3 fields where the first line names 2"
    )
    assert refusal("d.csv", b"a,b\n1,2\n\xff,3\n") == (
        ", after row 0: not UTF-8 (invalid start byte); re-encode the file"
    )
    assert refusal("d.csv", b'a,b\n1,2\n"1"x,2\n') == (
        ", after row 1: not CSV (',' expected after '\"')"
    )
    assert refusal("d.csv.gz", b"no gzip") == (
        ", after row 0: not CSV (Not a gzipped file (b'no'))"
    )
    assert refusal("d.parquet", b"PAR1").startswith(": not a whole Parquet file (")


def test_a_parquet_file_that_ends_early_is_told_by_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    class Broken:
        def __init__(self, file: Path) -> None: ...

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None: ...

        def iter_batches(self) -> Any:
            yield pyarrow.RecordBatch.from_pylist([{"a": 1}, {"a": 2}])
            raise OSError("cut\n short")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Broken)
    file, read = tmp_path / "d.parquet", []
    with pytest.raises(UserError) as refused:
        read.extend(read_records(file))
    assert str(refused.value) == f"{file}, after row 2: not a whole Parquet file (cut short)"
    places = []
    with pytest.raises(UserError):
        for place, record in read_records(file):
            places.append((place, record))
    assert places == [(f"{file}, row 1", {"a": 1}), (f"{file}, row 2", {"a": 2})]


# Sources


def local(path: Path, **more: Any) -> SourceConfig:
    return SourceConfig(format="jsonl", label="S", path=str(path), split={"test": 1.0}, **more)


def test_a_source_s_files_are_all_of_a_known_kind_but_hidden_ones(tmp_path: Path) -> None:
    names = ("b.jsonl", "a/c.parquet", "a/.hidden.json", ".git/x.csv", "notes.txt", "d.csv.gz")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()
    found = source_files("s", local(tmp_path))
    assert found == [tmp_path / n for n in ("a/c.parquet", "b.jsonl", "d.csv.gz")]
    assert source_files("s", local(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    asked = local(tmp_path, files=("d.csv.gz", "none.json"))
    assert source_files("s", asked) == [tmp_path / "d.csv.gz", tmp_path / "none.json"]
    with pytest.raises(UserError) as refused:
        source_files("s", local(tmp_path / "nowhere"))
    assert str(refused.value) == (
        f"data source s: {tmp_path / 'nowhere'} does not exist; correct data.sources.s.path"
    )
    with pytest.raises(UserError) as refused:
        source_files("s", local(tmp_path / "folder.json"))
    assert str(refused.value) == (
        f"data source s: {tmp_path / 'folder.json'} holds no file that ends in"
        f" {', '.join(SUFFIXES)}"
    )


COMMIT = "c" * 40


def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes = b"{}") -> SourceConfig:
    """A repository's commit as files on this machine, of one file x/a.json."""
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    there = tmp_path / "site" / COMMIT / "x"
    there.mkdir(parents=True)
    (there / "a.json").write_bytes(text)
    return SourceConfig.model_construct(
        format="jsonl",
        label="S",
        path=None,
        repo=None,
        url=f"{(tmp_path / 'site').as_uri()}/{{revision}}/{{file}}",
        revision=COMMIT,
        files=(),
        sha256={"x/a.json": hashlib.sha256(b"{}").hexdigest()},
    )


def test_a_repository_s_file_is_laid_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published(tmp_path, monkeypatch)
    at = repository_folder(source) / "x" / "a.json"
    assert file_url(source, "y/b.json").endswith(f"/site/{COMMIT}/y/b.json")
    with pytest.raises(UserError) as refused:
        source_files("s", source)
    assert str(refused.value) == (
        f"data source s: {at} is not there; run make fetch where there is a network, or lay"
        f" x/a.json of commit {COMMIT} there by hand"
    )
    assert source_files("s", source, download=True) == [at] and at.read_bytes() == b"{}"
    assert [p.name for p in at.parent.iterdir()] == ["a.json"], "no scratch is left"
    assert source_files("s", source) == [at]
    at.write_bytes(b"[]")
    for download in (False, True):
        with pytest.raises(UserError) as refused:
            source_files("s", source, download=download)
        assert str(refused.value) == (
            f"data source s: {at} is not x/a.json of commit {COMMIT}: its SHA-256 is another than"
            " data.sources.s.sha256 says; remove it and run make fetch again"
        )


def test_a_file_that_is_not_the_one_named_or_cannot_be_had_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published(tmp_path, monkeypatch, b"other")
    at, address = repository_folder(source) / "x" / "a.json", file_url(source, "x/a.json")

    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            source_files("s", source, download=True)
        assert not at.exists() and list(at.parent.iterdir()) == []
        return str(refused.value)

    given = [hashlib.sha256(text).hexdigest()[:12] for text in (b"other", b"{}")]
    assert refusal() == (
        f"data source s: {address} has SHA-256 {given[0]}... instead of {given[1]}...; it is not"
        " the file that the config names"
    )
    by_hand = f"lay x/a.json of commit {COMMIT} by hand as {at}"
    opened: list[Any] = []

    def broken(address: str, timeout: float) -> Any:
        (scratch,) = at.parent.iterdir()
        opened.append((address, timeout, scratch.name.startswith(".fetching-")))
        raise OSError("no \n network")

    monkeypatch.setattr(sources.urllib.request, "urlopen", broken)
    assert refusal() == (
        f"data source s: {address} could not be fetched (no network); run make fetch where there is"
        f" a network, or {by_hand}"
    )
    assert opened == [(address, 60.0, True)], "beside the file, hidden"

    def refused(address: str, timeout: float) -> Any:
        raise sources.urllib.error.HTTPError(address, 404, "Not Found", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(sources.urllib.request, "urlopen", refused)
    assert refusal() == f"data source s: {address} answers 404 Not Found; correct data.sources.s"

    class Short:
        def __enter__(self) -> Short:
            self.headers, self.left = {"Content-Length": "9"}, [b"abc"]
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, n: int = -1) -> bytes:
            return self.left.pop() if self.left else b""

    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda address, timeout: Short())
    assert "could not be fetched (it broke off after 3 of 9 bytes);" in refusal()


def test_files_of_the_hub_are_asked_for_as_a_data_set_at_its_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    source = SourceConfig.model_construct(
        repo="o/d", revision="r" * 40, files=("a.json", "b.json"), path=None, url=None
    )
    asked: list[Any] = []

    def given(found: Any) -> Any:
        def one(repo: str, file: str, **more: Any) -> Any:
            asked.append((repo, file, more))
            if isinstance(found, Exception):
                raise found
            return found(file)

        return one

    def use(found: Any) -> None:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", given(found))
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", given(found))

    def refusal(download: bool) -> str:
        with pytest.raises(UserError) as refused:
            source_files("s", source, download=download)
        return str(refused.value)

    use(lambda file: f"/hub/{file}")
    more = {"repo_type": "dataset", "revision": "r" * 40}
    for download in (True, False):
        asked.clear()
        found = source_files("s", source, download=download)
        assert found == [Path("/hub/a.json"), Path("/hub/b.json")]
        assert asked == [("o/d", "a.json", more), ("o/d", "b.json", more)]
    where = f"data source s: o/d at {'r' * 40}"
    use(lambda file: f"/hub/{file}" if file == "a.json" else None)
    assert refusal(False) == f"{where} is not in the cache; run make fetch where there is a network"
    use(OSError("no \n such"))
    assert refusal(True) == f"{where} could not be fetched: no such"
    use(huggingface_hub.errors.LocalEntryNotFoundError("x"))
    assert refusal(True) == (
        f"{where}: the hub could not be reached; check the network and HF_ENDPOINT"
    )


# Forms


def test_a_transcript_without_an_answer_on_either_side_is_counted_as_such() -> None:
    whole, open_ = "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a"
    other = "\n\nHuman: z\n\nAssistant: b"

    def missed(chosen: str, rejected: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        row = {"chosen": chosen, "rejected": rejected}
        assert list(HhRlhf().read(row, Place("f, line 1", Path("f"), None), counts)) == []
        return dict(counts)

    told = "turns of Human and Assistant do not alternate up to an answer"
    assert missed(whole, open_) == missed(open_, whole) == missed(open_, open_) == {told: 1}
    assert missed(whole, other) == {"transcripts differ before the last turn": 1}
