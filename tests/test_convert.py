# ruff: noqa: RUF001
"""`rayml data convert`: every format is recognised by what is in it, read, and refused by its line."""

import json
from io import StringIO
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console

from rayml.cli.app import data_app
from rayml.errors import DataError
from rayml.tasks.convert import convert_data
from rayml.tasks.read import read_rows
from rayml.tasks.recipes.make import FAMILIES, write_tasks
from rayml.tasks.sources import read_sources
from rayml.tasks.table import build_tasks

NATURAL = {
    "Definition": ["Say which department a customer writes to."],
    "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
    "Instances": [
        {"id": "1", "input": "Where is my card?", "output": ["cards"]},
        {"id": "2", "input": "银行卡丢了怎么办？", "output": ["cards", "银行卡"]},
    ],
}
BIGBENCH = {
    "name": "riddles",
    "description": 'has "examples": of a kind',
    "examples": [
        {"input": "Which is larger?", "target_scores": {"mouse": 0, "whale": 1}},
        {"input": "Which is older?", "target_scores": {"pyramid": 1, "phone": 0}},
        {"input": "Say one.", "target": ["one", "1"]},
    ],
}
SQUAD = {
    "data": [
        {
            "title": "桥",
            "paragraphs": [
                {
                    "context": "长江大桥建于1957年。",
                    "qas": [
                        {"question": "大桥建于哪一年？", "answers": [{"text": "1957年"}, {"text": "1957"}]},
                        {"question": "谁设计的？", "answers": []},
                    ],
                }
            ],
        }
    ]
}
CONLL = """-DOCSTART- -X- O O

Angela NNP B-NP B-PER
Merkel NNP I-NP I-PER
visited VBD B-VP O
Berlin NNP B-NP I-LOC
. . O O

"""
BMES = "我 O\n在 O\n北 B-LOC\n京 E-LOC\n见 O\n王 B-PER\n小 M-PER\n明 E-PER\n\n他 O\n在 O\n沪 S-LOC\n"
METAICL = [
    {"task": "emo", "input": "I am so glad", "output": "joy", "options": ["joy", "anger"]},
    {"task": "quiz", "input": "2+2?", "output": "4", "options": ["3", "4"]},
    {"task": "quiz", "input": "3+3?", "output": "6", "options": ["5", "6"]},
]
CHAT = {
    "messages": [
        {"role": "system", "content": "你是客服"},
        {"role": "user", "content": "几点开门？"},
        {"role": "assistant", "content": "九点。"},
        {"role": "user", "content": "谢谢"},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
CSV = 'text,label\n"late, again\nand broken",complaint\n很好,praise\nनमस्ते,greeting\n'
FILES = {
    "natural-instructions": ("task001_dept.json", json.dumps(NATURAL, indent=1, ensure_ascii=False)),
    "bigbench": ("riddles/task.json", json.dumps(BIGBENCH, indent=1)),
    "squad": ("dev.json", json.dumps(SQUAD, ensure_ascii=False)),
    "conll": ("train.txt", CONLL),
    "metaicl": ("emo.jsonl", "".join(json.dumps(row) + "\n" for row in METAICL)),
    "chat": ("desk.jsonl", json.dumps(CHAT, ensure_ascii=False) + "\n"),
    "sharegpt": ("share.jsonl", json.dumps(SHAREGPT) + "\n"),
    "crossfit": ("ag_news_16_100_train.tsv", "stocks rise\tbusiness\nteam wins\tsports\n"),
    "csv": ("tickets.csv", CSV),
    "jsonl": ("own.jsonl", '{"text": "a\\tb", "label": "x"}\n'),
}


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def convert(given: Path, folder: Path, columns: str | None = None, **more) -> tuple[list[dict], str]:
    said = StringIO()
    options = {"format": None, "task": None, "kind": None, "force": False} | more
    to = folder / "out.jsonl"
    convert_data(str(given), to, columns=columns, out=Console(file=said, width=200), **options)
    build_tasks(read_rows([str(to)]))  # what is written is what rayml reads
    return [json.loads(line) for line in to.read_text().splitlines()], said.getvalue()


@pytest.mark.parametrize("format", FILES)
def test_a_format_is_recognised_by_its_content(format, tmp_path):
    (found,) = read_sources([str(put(tmp_path, *FILES[format]))], {})
    assert found.format == format
    assert found.why


def test_natural_instructions(tmp_path):
    rows, said = convert(put(tmp_path, *FILES["natural-instructions"]), tmp_path)
    assert rows[0] == {"task": "task001_dept", "input": "Where is my card?", "target": "cards"}
    assert rows[1] == {"task": "task001_dept", "input": "银行卡丢了怎么办？", "target": "cards", "answers": ["银行卡"]}
    assert "natural-instructions" in said
    assert "2 rows of 1 task(s)" in said


def test_bigbench_keeps_options_that_are_labels_and_asks_with_those_that_are_not(tmp_path):
    rows, said = convert(put(tmp_path, *FILES["bigbench"]), tmp_path)
    assert [row["task"] for row in rows] == ["riddles"] * 3
    assert rows[0]["input"] == "Which is larger?\nOptions: mouse; whale"
    assert rows[0]["target"] == "whale"
    assert rows[2] == {"task": "riddles", "input": "Say one.", "target": "one", "answers": ["1"]} | {
        k: rows[2][k] for k in rows[2] if k == "kind"
    }
    assert "2 row(s) have options of their own" in said


def test_metaicl_options(tmp_path):
    rows, _ = convert(put(tmp_path, *FILES["metaicl"]), tmp_path)
    assert rows[0] == {"task": "emo", "input": "I am so glad", "target": "joy", "options": ["joy", "anger"]}
    assert rows[1] == {"task": "quiz", "input": "2+2?\nOptions: 3; 4", "target": "4", "kind": "text"}


def test_squad_in_chinese(tmp_path):
    rows, _ = convert(put(tmp_path, *FILES["squad"]), tmp_path)
    assert rows == [
        {
            "task": "dev",
            "input": {"context": "长江大桥建于1957年。", "question": "大桥建于哪一年？"},
            "target": "1957年",
            "answers": ["1957"],
            "kind": "qa",
        }
    ]


def test_conll_spans_of_words_and_of_characters(tmp_path):
    (row,), _ = convert(put(tmp_path, *FILES["conll"]), tmp_path)
    assert row["input"] == "Angela Merkel visited Berlin ."
    assert row["target"] == [{"text": "Angela Merkel", "type": "PER"}, {"text": "Berlin", "type": "LOC"}]
    rows, _ = convert(put(tmp_path, "msra.bmes", BMES), tmp_path, force=True)
    assert rows[0]["input"] == "我在北京见王小明"
    assert rows[0]["target"] == [{"text": "北京", "type": "LOC"}, {"text": "王小明", "type": "PER"}]
    assert rows[1]["target"] == [{"text": "沪", "type": "LOC"}]
    two = "a B-X\nb B-X\nc I-X\nd I-Y\ne O\n"
    (row,), _ = convert(put(tmp_path, "two.conll", two), tmp_path, columns="input=0,target=1", force=True)
    assert [span["text"] for span in row["target"]] == ["a", "b c", "d"]


def test_csv_cells_hold_line_breaks_and_columns_are_mapped(tmp_path):
    path = put(tmp_path, *FILES["csv"])
    rows, _ = convert(path, tmp_path, "input=text,target=label")
    assert rows[0] == {"task": "tickets", "input": "late, again\nand broken", "target": "complaint"}
    assert [row["input"] for row in rows[1:]] == ["很好", "नमस्ते"]
    pair = put(tmp_path, "nli.tsv", "s1\ts2\tgold\r\n小王在北京\t小王在中国\tyes\r\n")
    rows, _ = convert(pair, tmp_path, "input.premise=s1,input.hypothesis=s2,target=gold", force=True)
    assert rows[0]["input"] == {"premise": "小王在北京", "hypothesis": "小王在中国"}
    assert rows[0]["kind"] == "pair"


def test_conversations_end_with_the_assistant(tmp_path):
    (row,), _ = convert(put(tmp_path, *FILES["chat"]), tmp_path, task="desk-zh")
    assert row["task"] == "desk-zh"
    assert [m["content"] for m in row["messages"]] == ["你是客服", "几点开门？", "九点。"]
    (row,), _ = convert(put(tmp_path, *FILES["sharegpt"]), tmp_path, force=True)
    assert row["messages"][1] == {"role": "assistant", "content": "hello"}


def test_a_folder_holds_tasks_of_several_files_and_parquet_is_written(tmp_path):
    put(tmp_path, "in/ag_news_16_100_train.tsv", "stocks rise\tbusiness\n")
    put(tmp_path, "in/ag_news_16_100_test.tsv", "team wins\tsports\n")
    put(tmp_path, "in/task9.json", json.dumps(NATURAL))
    rows, said = convert(tmp_path / "in", tmp_path)
    assert {row["task"] for row in rows} == {"ag_news", "task9"}
    assert "4 rows of 2 task(s)" in said
    to = tmp_path / "out.parquet"
    quiet = Console(quiet=True)
    convert_data(str(tmp_path / "in"), to, None, None, None, None, False, quiet)
    assert pyarrow.parquet.read_table(to).num_rows == 4


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gb18030"])
def test_chinese_in_other_encodings(encoding, tmp_path):
    rows, _ = convert(
        put(tmp_path, "a.csv", "input,target\n我的包裹还没有到，请帮忙查一下,快递\n".encode(encoding)), tmp_path
    )
    assert rows[0]["input"] == "我的包裹还没有到，请帮忙查一下"


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", 'text,label\n"x\ny",z\na,b,c\n', "input=text,target=label", r"a.csv:4: has 3 cells, where .* has 2"),
        ("a.csv", "text,label\na,\n", "input=text,target=label", r"a.csv:2: 'label' is empty"),
        ("a.csv", "text,label\na,b\n", "input=words", "a.csv: has no column words; there are text, label"),
        ("a.csv", 'text,label\n"a,b\n', "input=text", "a.csv:2: no CSV"),
        ("a.conll", "a B-X\nb O\n" * 9 + "c what\n", None, "a.conll:19: expected a tag such as O"),
        ("a_1_2_dev.tsv", "a\tb\nc\n", None, "a_1_2_dev.tsv:2: expected input<TAB>output, got 1"),
        ("a.jsonl", '{"task": "t", "input": "i", "output": "o"}\n{oops\n', None, "a.jsonl:2: not JSON"),
        ("a.json", '{\n"examples": [\n{"input": "a"}]}', None, "a.json:3: expected an example with"),
        ("a.json", '{\n"Instances": [\n\n{"input": "", "output": ["b"]}]}', None, "a.json:4: 'input' is empty"),
        ("a.json", '{\n"x": }', None, r"a.json:2: not JSON"),
        ("a.json", '{\n"x": 1}', None, "which columns are input and target"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', None, "a.jsonl:1: a conversation has"),
        ("a.csv", b"input,target\nok,ok\n\xff\xfe\xfa,b\n", None, "a.csv:3: not utf-8"),
        ("a.csv", "", None, "is empty"),
        ("a.csv", "a,b\n", "inputs=a", "--columns: 'inputs=a': expected NAME=COLUMN"),
    ],
)
def test_what_cannot_be_converted_is_named_by_its_line_and_leaves_nothing(name, text, columns, message, tmp_path):
    with pytest.raises(DataError, match=message):
        convert(put(tmp_path, name, text), tmp_path, columns)
    assert not list(tmp_path.glob("*out*"))


def test_what_is_there_is_not_replaced_unless_asked(tmp_path):
    path = put(tmp_path, *FILES["crossfit"])
    put(tmp_path, "out.jsonl", "mine")
    with pytest.raises(DataError, match="--force"):
        convert(path, tmp_path)
    convert(path, tmp_path, force=True)
    with pytest.raises(DataError, match="--format: 'xml' unknown"):
        convert(path, tmp_path, format="xml", force=True)


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"sentence": ["很好", "很差"], "label": [1, 0]}
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "zh")
    rows, _ = convert(f"hf:{tmp_path / 'zh'}", tmp_path, "input=sentence,target=label")
    assert rows[0] == {"task": "zh", "input": "很好", "target": "pos"}


def test_the_recipes_are_the_same_every_time_and_every_row_is_one(tmp_path):
    written = write_tasks(tmp_path / "a")
    write_tasks(tmp_path / "b")
    assert set(written) == set(FAMILIES)
    for name in FAMILIES:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
        tasks, _ = build_tasks(read_rows([str(tmp_path / "a" / f"{name}.jsonl")]))
        assert len(tasks) >= 7
        assert len({task.kind for task in tasks}) == 1
    kinds = {build_tasks(read_rows([str(tmp_path / "a" / f"{name}.jsonl")]))[0][0].kind for name in FAMILIES}
    assert kinds == {
        "label",
        "pair",
        "relation",
        "multilabel",
        "ner",
        "qa",
        "translation",
        "summary",
        "dialogue",
        "text",
    }


def test_the_command_is_there():
    assert "convert" in {command.callback.__name__ for command in data_app.registered_commands}
