"""Rows from any source are read by their content with the same tokens, or refused with advice."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.records import Reading, check_there, fingerprint, read_rows, rename_columns
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.errors import DataError
from tests.helpers.rows import chats, pairs

datasets.disable_progress_bars()


def rows_of(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [rename_columns(row, None).data for row in read_rows(source, **options)]


# -- the same rows from every source ----------------------------------------------------------------------------------

# Arbitrary text without characters that text files cannot contain (surrogates, null characters).
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
KEYS = st.sampled_from(["city", "item", "count", "deep"])
# In Arrow, a key has the same type in all rows.
SHAPES: dict[str, Any] = {
    "city": TEXT,
    "item": TEXT,
    "count": st.integers(-(2**53), 2**53),
    "deep": st.lists(st.fixed_dictionaries({"a": st.integers(0, 9)}, optional={"b": TEXT}), max_size=2),
}
ARGUMENTS = st.sets(KEYS, min_size=1).flatmap(lambda keys: st.fixed_dictionaries({key: SHAPES[key] for key in keys}))


@st.composite
def tool_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows with one tool call each, with different arguments."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        call = {"function": {"name": draw(st.sampled_from(["f", "g"])), "arguments": draw(ARGUMENTS)}}
        messages = [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        rows.append({"messages": messages, "number": draw(st.integers(0, 99))})
    return rows


def lines(rows: list[Any], end: str = "\n", mark: str = "", **options: Any) -> str:
    return end.join(mark + json.dumps(row, **options) for row in rows) + end


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def stream(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    with ipc.new_stream(buffer, table(rows).schema) as writer:
        writer.write_table(table(rows))
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as out:
        out.write(data)
    return bytes(buffer.getvalue().to_pybytes())


def to_buffer(write: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


TEXT_FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lambda rows: lines(rows, ensure_ascii=False).encode(),
    "crlf.JSONL": lambda rows: lines(rows, "\r\n").encode(),
    "mac.ndjson": lambda rows: lines(rows, "\r").encode(),
    "blank.jsonl": lambda rows: lines(rows, "\n\n \n").encode().rstrip(),
    "marks.jsonl": lambda rows: lines(rows, mark="\ufeff").encode(),
    "utf16.jsonl": lambda rows: lines(rows, ensure_ascii=False).encode("utf-16"),
    "utf32.json": lambda rows: lines(rows, ensure_ascii=False).encode("utf-32"),
    "lines.json": lambda rows: lines(rows).encode(),
    "array.jsonl": lambda rows: json.dumps(rows).encode(),
    "array.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode(),
    "pretty.jsonl": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "within.json": lambda rows: json.dumps({"version": 2, "data": rows}).encode(),
    "splits.json": lambda rows: json.dumps({"test": [{"a": 1}], "train": rows}).encode(),
    "unknown.dat": lambda rows: lines(rows).encode(),
    "noending": lambda rows: lines(rows).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows).encode()),
    "members.json.gz": lambda rows: b"".join(gzip.compress(lines([row]).encode()) for row in rows),
    "a.jsonl.zst": lambda rows: zstd(lines(rows).encode()),
    "a.jsonl.bz2": lambda rows: bz2.compress(lines(rows).encode()),
    "a.json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
    "not_said.jsonl": lambda rows: gzip.compress(lines(rows).encode()),
    "pandas.jsonl": lambda rows: pd.DataFrame(rows).to_json(orient="records", lines=True).encode(),
}
ARROW_FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.parquet": lambda rows: to_buffer(lambda f: parquet.write_table(table(rows), f)),
    "dictionary.PARQUET": lambda rows: to_buffer(lambda f: parquet.write_table(table(rows), f, row_group_size=1)),
    "datasets.parquet": lambda rows: to_buffer(lambda f: datasets.Dataset.from_list(rows).to_parquet(f)),
    "a.feather": lambda rows: to_buffer(lambda f: feather.write_feather(table(rows), f)),
    "stream.arrow": stream,
    "a.parquet.gz": lambda rows: gzip.compress(to_buffer(lambda f: parquet.write_table(table(rows), f))),
    "not_said.json": lambda rows: to_buffer(lambda f: parquet.write_table(table(rows), f)),
}
HAS_JSON = hasattr(datasets, "Json")  # older ones have none
IN_MEMORY: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "columns": lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
    "splits": lambda rows: {"train": rows, "test": []},
    "frame": pd.DataFrame,
    "frame of arrays": lambda rows: pd.read_parquet(io.BytesIO(ARROW_FILES["a.parquet"](rows))),
    "table": table,
    "batch": lambda rows: table(rows).combine_chunks().to_batches()[0],
    "batches": lambda rows: table(rows).to_reader(),
    "dataset": lambda rows: datasets.Dataset.from_list(rows),
    "as numpy": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "transformed": lambda rows: datasets.Dataset.from_list(rows).with_transform(lambda batch: batch),
    "selected": lambda rows: datasets.Dataset.from_list([*rows, *rows]).select(range(len(rows))),
    "iterable": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "splits of datasets": lambda rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    "list of containers": lambda rows: [datasets.Dataset.from_list(rows[:1]), *rows[1:]],
}
if HAS_JSON:
    IN_MEMORY["json columns"] = lambda rows: datasets.Dataset.from_list(
        rows, features=datasets.Features(messages=datasets.List(datasets.Json()), number=datasets.Value("int64"))
    )
SOME = settings(
    max_examples=12, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", [*TEXT_FILES, *ARROW_FILES])
@SOME
@given(rows=tool_rows())
def test_files_give_the_rows_that_were_written(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((TEXT_FILES | ARROW_FILES)[name](rows))
    assert rows_of(path, split="train") == rows
    assert rows_of([str(path), path], split="train") == [*rows, *rows]


@pytest.mark.parametrize("name", IN_MEMORY)
@SOME
@given(rows=tool_rows())
def test_containers_give_the_rows_that_were_put_in(name: str, rows: list[dict[str, Any]]) -> None:
    assert rows_of(IN_MEMORY[name](rows), split="train") == rows


def asked(call: Any) -> dict[str, Any]:
    """A row that ends with a tool call."""
    answer = {"role": "assistant", "content": "b", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "a"}, answer]}


ONE, TWO = asked({"city": "x"}), asked({"item": "y"})


@pytest.mark.parametrize("form", [list, lambda d: d.to_pandas().to_dict("records"), lambda d: d.data.table.to_pylist()])
def test_list_of_a_dataset_gives_the_rows_of_the_dataset(form: Callable[[Any], Any]) -> None:
    found = form(datasets.Dataset.from_list([ONE, TWO, ONE]))
    assert rows_of(found) == [ONE, TWO, ONE]
    assert rows_of(found[:1]) == [ONE], "a part of it too: users have no tool_calls, which shows where it is from"


def test_nulls_of_the_user_are_kept(tmp_path: Path) -> None:
    """In JSON always; in a list unless it looks like one from Arrow; in Arrow as maps or JSON."""
    call = {"name": "f", "arguments": {"city": None, "item": "x"}}
    other = {"name": "f", "arguments": {"city": "y", "item": None, "count": None}}
    rows = [{"tools": [{"a": None}], **asked(one)} for one in (call, other)]
    for name in ("a.jsonl", "a.json", "array.jsonl", "splits.json"):
        (tmp_path / name).write_bytes(TEXT_FILES.get(name, TEXT_FILES["lines.json"])(rows))
        assert rows_of(tmp_path / name, split="train") == rows
    assert rows_of(rows) == rows
    assert rows_of(pd.DataFrame(rows)) == rows
    always = [{"tools": [{"type": "string", "default": None}]}] * 3
    assert rows_of(always) == always, "no row has a value, so that nothing was filled in"
    if HAS_JSON:
        columns = datasets.Features(tools=datasets.List(datasets.Json()), messages=datasets.List(datasets.Json()))
        assert rows_of(datasets.Dataset.from_list(rows, features=columns)) == rows
    maps = pa.array([[("city", None), ("item", "x")]], pa.map_(pa.string(), pa.string()))
    parquet.write_table(pa.table({"arguments": maps}), tmp_path / "maps.parquet")
    assert rows_of(tmp_path / "maps.parquet") == [{"arguments": {"city": None, "item": "x"}}]


def test_null_column_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": None, "scores": [1.0, None]}, {"prompt": "b", "answer": "c", "scores": []}]
    parquet.write_table(table(rows), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == rows
    frame = pd.DataFrame([{"prompt": "a", "label": 1, "answer": None}, {"prompt": "b", "label": None, "answer": "c"}])
    assert rows_of(frame) == [
        {"prompt": "a", "label": 1.0, "answer": None},
        {"prompt": "b", "label": None, "answer": "c"},
    ]


def test_every_source_trains_the_same_tokens(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ (m.tool_calls or []) | tojson }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"city": "x"}, {"item": [{"a": 1}]})]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [c]}]}
        for c in call
    ]

    def trained(source: Any) -> list[tuple[list[int], list[int]]]:
        data = SFTDataModule(source, tokenizer=tokenizer, show_example=False)
        data.setup("fit")
        assert (data.fingerprints() == {}) == (name == "iterable")
        return [(row.ids, row.loss_mask) for row in data.prepared["train"].rows]

    name = "rows"
    wanted = trained(rows)
    for name, write in (TEXT_FILES | ARROW_FILES).items():
        (tmp_path / name).write_bytes(write(rows))
        assert trained(tmp_path / name) == wanted, name
    for name, make in IN_MEMORY.items():
        if name != "json columns":
            assert trained(make([{**row, "number": 1} for row in rows])) == wanted, name


# -- CSV files --------------------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufeff"), min_size=1, max_size=10)


@SOME
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": CELLS, "answer": CELLS | st.none()}), min_size=1, max_size=5),
    by=st.sampled_from(["csv", "tsv", "pandas", "pandas with its index", "datasets", "semicolons", "utf-16", "gz"]),
)
def test_csv_files_give_the_rows_that_were_written(rows: list[dict[str, Any]], by: str, tmp_path: Path) -> None:
    name = {"tsv": "a.tsv", "gz": "a.csv.gz"}.get(by, "a.CSV")
    path = tmp_path / name
    if by.startswith("pandas"):
        pd.DataFrame(rows).to_csv(path, index=by != "pandas")
    elif by == "datasets":
        datasets.Dataset.from_list(
            rows, features=datasets.Features(prompt=datasets.Value("string"), answer=datasets.Value("string"))
        ).to_csv(path)
    else:
        buffer = io.StringIO()
        delimiter = {"tsv": "\t", "semicolons": ";"}.get(by, ",")
        writer = csv.DictWriter(buffer, ["prompt", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        data = buffer.getvalue().encode("utf-16" if by == "utf-16" else "utf-8-sig")
        path.write_bytes(gzip.compress(data) if by == "gz" else data)
    if any(list(row.values()) == ["prompt", "answer"] for row in rows):
        return
    assert rows_of(path) == rows


def test_cells_are_converted_by_column(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What's “this”?"}, {"role": "assistant", "content": None}]
    frame = pd.DataFrame(
        {
            "messages": [json.dumps(messages), str(messages)],
            "prompt": ["[1, 2]", json.dumps(messages)],
            "is_good": [True, False],
            "margin": [0.5, None],
            "answer": ["5", "[6]"],
            "tools": ['[{"name": "f"}]', None],
        }
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    rows = [rename_columns(row, {"label": "is_good"}).data for row in read_rows(tmp_path / "a.csv")]
    assert [row["messages"] for row in rows] == [messages, messages]
    assert [row["prompt"] for row in rows] == ["[1, 2]", messages]
    assert [row["label"] for row in rows] == [True, False]
    assert [row["is_good"] for row in rows] == ["True", "False"]
    assert [row["margin"] for row in rows] == [0.5, None]
    assert [row["answer"] for row in rows] == ["5", "[6]"]
    assert [row["tools"] for row in rows] == [[{"name": "f"}], None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\na,b,c\n", r"a\.csv:2: 3 cells, but the header \(line 1\) has 2 cells"),
        ('prompt,answer\n"a\nb",c\nd\n', r"a\.csv:4: 1 cell, but the header"),
        ("prompt,answer\na,b\nprompt,answer\nc,d\n", r"a\.csv:3: this line repeats the header"),
        ("prompt,prompt\na,b\n", r"a\.csv:1: the header has 'prompt' twice"),
        ("prompt,,answer\na,b,c\n", r"a\.csv:1: a column of the header has no name \(after 'prompt'\)"),
        (",answer\na,b\n", r"a\.csv:1: the first column has no name"),
        ('prompt,answer\n"a,b\n', r"a\.csv:2: .* cannot be parsed \(unexpected end of data\)"),
        ('{"prompt": "a"}\n', r"a\.csv:1: the file has the name of a table, but begins like JSON"),
        ("prompt,answer\n", r"a\.csv: there are no rows"),
        (
            "messages\n\"[{'role': 'user'} {'role': 'user'}]\"\n",
            r"a\.csv:2: 'messages' contains .* not JSON; .* json.dumps",
        ),
        ("prompt\n\"[{'role': 'user' 'content': 'a'}]\"\n", r"a\.csv:2: 'prompt' contains .* not JSON"),
    ],
)
def test_malformed_tables_are_refused(text: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text(text)
    data = PromptDataModule(validation=tmp_path / "a.csv", tokenizer=tokenizer)
    with pytest.raises(DataError, match=message):
        data.setup("validate")


def test_labels_in_a_table_are_converted(tmp_path: Path, tokenizer: Any) -> None:
    from rlhf_lightning.data.preference import PreferenceDataModule

    (tmp_path / "a.csv").write_text("prompt,response,label\na,one,1\nb,two,False\nc,three,1.0\n")
    data = PreferenceDataModule(tmp_path / "a.csv", kind="labels", tokenizer=tokenizer)
    data.setup("fit")
    assert [row.label for row in data.prepared["train"].rows] == [1, 0, 1]
    (tmp_path / "b.csv").write_text("prompt,response,label\na,one,yes\n")
    with pytest.raises(DataError, match=r"b\.csv:2: 'label' is 'yes'; it must be 1"):
        PreferenceDataModule(tmp_path / "b.csv", kind="labels", tokenizer=tokenizer).setup("fit")


# -- lines of text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.txt", 'Hi\n\n"Ho" he said\n[1] and {x}\n', ["Hi", '"Ho" he said', "[1] and {x}"]),
        ("a.TXT", "\ufeffHi\r\n\ufeffHo\r\n", ["Hi", "Ho"]),
        ("a.txt.gz", "Hi\nHo", ["Hi", "Ho"]),
        ("a.txt", '"Hi"\n"Ho"\n', ["Hi", "Ho"]),
        ("a.txt", '{"prompt": "Hi"}\n{"prompt": "Ho"}\n', ["Hi", "Ho"]),
        ("a.json", '["Hi", "Ho"]', ["Hi", "Ho"]),
        ("a.jsonl", '{"prompt": "Hi"}\n"Ho"\n', ["Hi", "Ho"]),
    ],
)
def test_text_files_of_prompts_are_read_by_line(name: str, text: str, wanted: list[str], tmp_path: Path) -> None:
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert rows_of(tmp_path / name, text_key="prompt") == [{"prompt": prompt} for prompt in wanted]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", '{"prompt": "Hi"}\nHo\n', r"a\.txt:2: not a JSON object, but line 1 is one; .* data\.lines: true"),
        ("a.txt", '{"prompt": "Hi"}\n{"prompt": \n', r"a\.txt:2: not a JSON object"),
        ("a.txt", "{broken\n{broken\n", r"a\.txt:1: not valid JSON"),
        ("a.jsonl", "Hi\nHo\n", r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", '"Hi"\n["Ho"]\n', r"a\.jsonl:2: this is a JSON list; each line must be one JSON object"),
        ("a.jsonl", '"{\\"prompt\\": \\"Hi\\"}"\n', r"a\.jsonl:1: the row is encoded twice"),
        (
            "a.md",
            "# Hi\n",
            r"a\.md: the format is unknown: not JSON, and its extension \.md is unknown; .*\.txt for a prompt",
        ),
        ("prompts", "Hi\n", r"prompts: the format is unknown: not JSON, and it has no extension"),
        ("a.txt", "H\x00i\x00", r"a\.txt:1: contains a null character"),
    ],
)
def test_ambiguous_text_files_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, "prompt")


def test_data_lines_reads_any_file_by_line(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "prompts").write_text('Hi\n{"not": "parsed"}\n\n"Ho"\n')
    data = PromptDataModule(validation=tmp_path / "prompts", lines=True, tokenizer=tokenizer)
    data.setup("validate")
    said = [row.messages[0]["content"] for row in data.prepared["validation"].rows]
    assert said == ["Hi", '{"not": "parsed"}', '"Ho"']
    assert data.prepared["validation"].reading.blank == 1


# -- refused sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", b"PK\x03\x04", "an archive; unpack it"),
        ("a.jsonl", to_buffer(lambda f: zipfile.ZipFile(f, "w").writestr("a", "b")), "an archive; unpack it"),
        ("a.xlsx", b"PK\x03\x04", r"a spreadsheet; save it as \.csv"),
        ("a.pkl", b"\x80\x04", r"Python objects; save the rows as \.jsonl"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "an archive"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-5], "cannot be decompressed .*is the file complete"),
        ("a.jsonl.zst", zstd(b'{"a": 1}\n' * 9)[:-5], "cannot be decompressed"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 9)[:-5], "cannot be decompressed"),
        ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n' * 9)[:-5], "cannot be decompressed"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"y": 1}]}', r"several lists of objects \(a, b\)"),
        ("a.json", b'{"system": "s", "rows": [{"x": 1}]}', "'system' is outside the rows"),
        ("a.json", b'{"train": [{"x": 1}], "test": [{"y": 1}]}', "several splits; splits are 'train', 'test'"),
        ("a.jsonl", b'{"a": 1, "a": 2}', ":1: not valid JSON .the key 'a' appears twice"),
        ("a.json", b'[{"a": 1},\n\n{"a": }]', ":3: not valid JSON"),
        ("a.arrow", b"nonsense", "not a readable Arrow file"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.json", b"\xef\xbb\xbf", "no rows"),
        ("a.parquet", ARROW_FILES["a.parquet"]([{"a": 1}])[:-6], "not a readable Parquet file"),
    ],
)
def test_unsupported_files_are_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_rows(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"prompt": "a"}, "must contain columns .* or splits"),
        ({"prompt": ["a"], "answer": ["b", "c"]}, r"the columns have different lengths \(prompt 1, answer 2\)"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must contain columns .* or splits"),
        ({"train": [{"a": 1}], "test": [{"a": 1}]}, "no split 'validation'; splits are 'train', 'test'"),
        (datasets.DatasetDict(train_sft=datasets.Dataset.from_list([{"a": 1}])), "splits are 'train_sft'"),
        ({"a", "b"}, "it has no order"),
        (b"rows", "give the path of a file"),
        (io.StringIO("{}"), "give the path of a file"),
        (3, "no rows can be read from 3"),
        ([["a"]], r"list\[0\]: the row is a list; it must be a dict"),
        ([], "the list: there are no rows"),
        (iter([]), "no rows"),
        (pd.DataFrame([[1]]), "the name of column 0 is not text"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns have the name 'a'"),
        (pa.table([[1], [2]], names=["a", "a"]), "two columns have the name 'a'"),
        ("https://host/rows.jsonl", "a URL; download the file"),
        ("", "the file name is empty"),
    ],
)
def test_unsupported_containers_are_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(source, split="validation")


# -- names ------------------------------------------------------------------------------------------------------------


def test_patterns_folders_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for part in (1, 2, 10):
        (tmp_path / "parts" / "in").mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / f"rows-{part}.jsonl").write_text(lines([{"part": part}]))
    wanted = [{"part": 1}, {"part": 2}, {"part": 10}]
    (tmp_path / "parts" / "README.md").write_text("what this is")
    named = [
        "parts",
        "parts/*.jsonl",
        "~/parts",
        "~/parts/rows-*.jsonl",
        (tmp_path / "parts").as_uri(),
        Path("~/parts"),
    ]
    for name in named:
        assert rows_of(name) == wanted, name
        assert fingerprint(name) == fingerprint([tmp_path / "parts" / f"rows-{part}.jsonl" for part in (1, 2, 10)])
        check_there(str(name))
    assert rows_of(["parts/rows-2.jsonl", "~/parts/rows-1?.jsonl"]) == wanted[1:]
    (tmp_path / "parts" / "test.jsonl").write_text("{}")
    with pytest.raises(
        DataError, match=r"parts: the files in this folder are not parts of one dataset \(rows-1\.jsonl, .*pattern"
    ):
        read_rows("parts")
    for name, message in (("parts/in", "this is a folder; give a file"), ("parts/*.csv", "no file matches")):
        with pytest.raises(DataError, match=message):
            check_there(name)


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(pairs(3)), datasets.Dataset.from_list(pairs(5)[3:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "one") == pairs(3)
    assert rows_of(str(tmp_path / "two"), split="test") == rows_of(f"{tmp_path / 'two'}:test") == pairs(5)[3:]
    with pytest.raises(DataError, match="two: there are several splits; splits are 'train', 'test'"):
        read_rows(tmp_path / "two")
    check_there(f"{tmp_path / 'two'}:test")
    assert fingerprint(tmp_path / "two") == fingerprint(f"{tmp_path / 'two'}:test")


def test_fingerprints_of_python_objects() -> None:
    rows = chats(3)
    wanted = fingerprint(rows)
    for name, make in IN_MEMORY.items():
        if name in ("columns", "splits", "frame", "table", "dataset", "splits of datasets", "tuple"):
            assert fingerprint(make(rows), "train") == wanted, name
            assert fingerprint(make(chats(2)), "train") != wanted, name


def test_generator_is_read_once_and_kept(tokenizer: Any) -> None:
    taken = []

    def rows() -> Iterator[dict[str, Any]]:
        for row in chats(3):
            taken.append(row)
            yield row

    data = SFTDataModule(rows(), tokenizer=tokenizer, show_example=False)
    data.setup("fit")
    assert data.fingerprints() == {"train": fingerprint(chats(3))}
    data.prepared.clear()
    data.setup("fit")
    assert len(data.prepared["train"].rows) == len(taken) == 3


def test_all_invalid_lines_are_collected_for_a_check(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\na,b\nc\nd,e,f\ng,h\n")
    reading = Reading(unreadable=[])
    assert rows_of(tmp_path / "a.csv", reading=reading) == [
        {"prompt": "a", "answer": "b"},
        {"prompt": "g", "answer": "h"},
    ]
    assert [where.rpartition(":")[2] for where, _ in reading.unreadable or []] == ["3", "4"]


def test_polars_frames_are_read_through_arrow() -> None:
    class DataFrame:
        """The part of polars that is used, because the tests run without polars."""

        __module__ = "polars.dataframe.frame"
        columns = ("messages",)

        def to_arrow(self) -> pa.Table:
            return table([ONE, TWO])

    class LazyFrame:
        __module__ = "polars.lazyframe.frame"

        def collect(self) -> DataFrame:
            return DataFrame()

    assert rows_of(DataFrame()) == [ONE, TWO]
    assert rows_of({"train": DataFrame()}, split="train") == [ONE, TWO]
    with pytest.raises(DataError, match=r"this is a polars LazyFrame; pass the result of its collect\(\)"):
        read_rows(LazyFrame())


def test_dataloader_is_refused() -> None:
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            return [ONE, TWO][index]

    assert rows_of(Rows()) == [ONE, TWO]
    with pytest.raises(DataError, match="a DataLoader, which yields batches; pass the dataset"):
        read_rows(DataLoader(Rows()))


def test_lines_of_text_are_prompts_for_predict(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("Hi\nHo\n")
    data = SFTDataModule(predict=tmp_path / "a.txt", tokenizer=tokenizer, show_example=False)
    data.setup("predict")
    assert [row.messages[0]["content"] for row in data.prepared["predict"].rows] == ["Hi", "Ho"]
    with pytest.raises(DataError, match=r"a\.txt:1: not valid JSON"):
        SFTDataModule(tmp_path / "a.txt", tokenizer=tokenizer).setup("fit")


def test_files_written_from_arrow_train_like_the_rows(tmp_path: Path, caplog: Any) -> None:
    """Nulls from Arrow in files of `to_json` and in cells printed by pandas are dropped; other columns keep theirs."""
    rows = [{**ONE, "answer": {"unit": None}}, {**TWO, "answer": {"unit": "C"}}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.to_json(tmp_path / "b.json", lines=False)
    dataset.to_pandas().to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    with caplog.at_level("INFO"):
        for name in ("a.jsonl", "b.json", "c.jsonl"):
            assert rows_of(tmp_path / name) == rows, name
    assert "null keys of messages and tools are dropped" in caplog.text
    pd.DataFrame(list(dataset))[["messages"]].to_csv(tmp_path / "d.csv", index=False)
    assert rows_of(tmp_path / "d.csv") == [{"messages": row["messages"]} for row in rows]


def test_misspelled_columns_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """White space around the column names of a table is ignored; other spellings are refused, or can be mapped."""
    (tmp_path / "a.csv").write_text("prompt, system\nhi,Be kind\n")
    assert rows_of(tmp_path / "a.csv") == [{"prompt": "hi", "system": "Be kind"}]
    for column in ("System", "TOOLS", " images", "Functions"):
        with pytest.raises(DataError, match=re.escape(f"{column!r}: null")):
            PromptDataModule([{"prompt": "hi", column: "x"}], tokenizer=tokenizer).setup("fit")
    with pytest.raises(DataError, match="label: 'Label'"):
        SFTDataModule([{**chats(1)[0], "Label": False}], tokenizer=tokenizer).setup("fit")
    for columns in ({"system": "System"}, {"System": None}):
        data = SFTDataModule([{**chats(1)[0], "System": "x"}], tokenizer=tokenizer, columns=columns)
        data.setup("fit")
        assert ("x" in data.prepared["train"].rows[0].show(tokenizer).split("user")[0]) == ("system" in columns)


def test_integers_beyond_float_precision(tokenizer: Any) -> None:
    row = {**pairs(1)[0], "margin": 10**400}
    with pytest.raises(DataError, match="it must be a number"):
        PreferenceDataModule([row], tokenizer=tokenizer).setup("fit")
    ranking = {"prompt": "a", "responses": ["b", "c"], "scores": [10**400, 10**401]}
    data = PreferenceDataModule([ranking], kind="rankings", tokenizer=tokenizer)
    data.setup("fit")
    assert data.prepared["train"].rows[0].ranks == [1, 0]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records", "table"])
def test_pandas_frames_written_as_json(orient: Any, tmp_path: Path) -> None:
    """`to_json` writes columns of objects by default; `to_dict` returns the same in Python."""
    rows = [{"prompt": f"Question {i}?", "answer": str(i)} for i in range(12)]
    pd.DataFrame(rows).to_json(tmp_path / "a.json", orient=orient)
    found = rows_of(tmp_path / "a.json")
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    if orient != "table":
        given = pd.DataFrame(rows).to_dict("dict" if orient == "columns" else orient)
        assert rows_of(given) == rows


@pytest.mark.parametrize(
    "rows",
    [
        [{1: 2, "prompt": "Q", "completion": "A"}],
        [{("a", "b"): 2, "prompt": "Q", "completion": "A"}],
        {0: ["x"], "prompt": ["Q"], "completion": ["A"]},
    ],
)
def test_names_that_are_not_text_are_refused(rows: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"the name .* of a column is not text, in \{.*use text for all names"):
        SFTDataModule(rows, tokenizer=tokenizer).setup("fit")
    messages = [{"role": "user", "content": "Q", None: 1}, {"role": "assistant", "content": "A"}]
    with pytest.raises(DataError, match=r"list\[0\]: message 0 has the key None, which is not text"):
        SFTDataModule([{"messages": messages}], tokenizer=tokenizer).setup("fit")
