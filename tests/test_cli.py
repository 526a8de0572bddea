"""Every verb on the tiny world; and what a person gets wrong: one line, status 2, nothing
damaged."""

import json
import logging
import shutil
import signal
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

import beit3
from beit3.cli import main
from beit3.cli.options import complete_tasks
from beit3.data.stores.records import Records, write_records
from beit3.data.stores.tokens import Tokens
from beit3.log_filters import hide_enum_warnings
from beit3.recipe import Recipe
from beit3.task import list_tasks
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.tokenizer.text import TextTokenizer
from beit3.training import loop
from tests.golden import find_fixture
from tests.world_root import NUM_CODES

NETWORK = [
    "--task.model.dim",
    "32",
    "--task.model.depth",
    "2",
    "--task.model.num_heads",
    "2",
    "--task.model.ffn_dim",
    "48",
]


def hash_files(folder: Path) -> dict[str, str]:
    """Every file below `folder` and what it holds."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def overrides(root: Path, steps: int, *batch: str) -> list[str]:
    return ["--data.root", str(root), "--run.steps", str(steps), *batch]


@pytest.fixture(scope="module")
def vqa(root, tmp_path_factory) -> Path:
    """A run of questions, by the command line."""
    out = tmp_path_factory.mktemp("cli") / "vqa"
    assert (
        main(
            [
                "train",
                "vqa",
                "demo",
                "--out",
                str(out),
                *NETWORK,
                *overrides(root, 3, "--data.batch.main", "8"),
            ]
        )
        == 0
    )
    return out


@pytest.fixture
def image_path(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "a.png")
    return tmp_path / "pictures" / "a.png"


# Verbs --------------------------------------------------------------------------------------------


def test_from_the_world_to_records_and_a_tokenizer(tmp_path, run_cli):
    """As a newcomer would: world, prepare, tokenizer, and with it texts packed to full records."""
    assert "the world is at" in run_cli(
        "world", "--out", tmp_path / "world", "--scenes", 12, "--image-size", 16, "--seed", 3
    )
    root = tmp_path / "root"
    for source in ("images", "texts", "pairs"):
        options = ["--source", source, *(["--pack", 0] if source == "texts" else [])]
        report = json.loads(
            run_cli(
                "prepare",
                "pretrain",
                "--raw",
                tmp_path / "world" / source,
                "--root",
                root,
                *options,
            )
        )
        assert report["records"]["train"] >= 12 and report["passed_over"] == []
    report = json.loads(
        run_cli("prepare", "vqa", "--raw", tmp_path / "world" / "vqa", "--root", root)
    )
    assert report["records"]["train"] == 18 and report["answers"] > 2
    model = root / "text.model"
    files = [root / f"pretrain/{source}/train.jsonl" for source in ("texts", "pairs")]
    output = run_cli(
        "tokenizer", "train", *files, "--model", model, "--vocab-size", 200, "--type", "bpe"
    )
    assert output == f"{TextTokenizer(model).vocab_size} ids at {model}\n"
    text = Records(files[1])[0]["text"]
    ids = run_cli("tokenizer", "encode", text, "--model", model).split()
    assert [int(i) for i in ids] == TextTokenizer(model).encode(text)
    assert run_cli("tokenizer", "decode", *ids, "--model", model).strip() == text
    paragraphs = list(Records(files[0]))
    run_cli(
        "prepare",
        "pretrain",
        "--raw",
        tmp_path / "world" / "texts",
        "--root",
        root,
        "--source",
        "texts",
        "--pack",
        64,
    )
    packed, tokenizer = list(Tokens(root / "pretrain/texts/train.tokens")), TextTokenizer(model)
    assert (
        1 < len(packed) < len(paragraphs)
        and max(len(record["text"]) for record in packed) <= 62
        and not files[0].exists()
    )
    assert " ".join(tokenizer.decode(record["text"]) for record in packed) == " ".join(
        record["text"] for record in paragraphs
    )


def test_a_run_can_be_evaluated_scored_asked_and_reported(vqa, root, tmp_path, run_cli, image_path):
    scores = json.loads((vqa / "scores.json").read_text())
    evaluated = json.loads(
        run_cli("eval", vqa / "last", "--data.root", root, "--predictions", tmp_path / "p.jsonl")
    )
    assert {"step": 3, **evaluated} == pytest.approx(scores)
    assert (
        json.loads(run_cli("score", "vqa", tmp_path / "p.jsonl", "--data.root", root)) == evaluated
    )
    predictions = list(Records(tmp_path / "p.jsonl"))
    assert [p["id"] for p in predictions] == [r["id"] for r in Records(root / "vqa/main/val.jsonl")]
    first = Records(root / "vqa/main/val.jsonl")[0]
    asked = json.loads(run_cli("predict", vqa / "last", root / first["image"], first["text"]))
    assert [candidate["answer"] for candidate in asked] == [
        candidate["answer"] for candidate in predictions[0]["candidates"]
    ]
    best = [
        run_cli("predict", weights, root / first["image"], first["text"])
        for weights in (vqa, vqa / "best")
    ]
    assert best[0] == best[1], "a run answers with its best weights"
    page = tmp_path / "page.html"
    assert str(page) in run_cli("report", vqa, "--out", page)
    assert page.read_text().lstrip().lower().startswith("<!doctype html")


def test_the_same_command_goes_on(vqa, root, run_cli):
    before = hash_files(vqa)
    output = run_cli(
        "train",
        "vqa",
        "demo",
        "--out",
        vqa,
        *NETWORK,
        *overrides(root, 3, "--data.batch.main", "8"),
    )
    scores = json.loads((vqa / "scores.json").read_text())
    assert json.loads(output[: output.index("}") + 1]) == scores
    assert f"weights at {vqa}/last and {vqa}/best" in output and hash_files(vqa) == before


def test_pretraining_and_fine_tuning_from_it(root, vqkd_weights, tmp_path, run_cli):
    batch = [
        "--data.batch.images",
        "4",
        "--data.batch.texts",
        "4",
        "--data.batch.pairs",
        "4",
        "--run.eval_records",
        "4",
    ]
    tokens = ["--task.visual_tokenizer", str(vqkd_weights), "--task.num_codes", str(NUM_CODES)]
    run_cli(
        "train",
        "pretrain",
        "--out",
        tmp_path / "pretrain",
        *NETWORK,
        *tokens,
        *overrides(root, 2, *batch),
    )
    scores = json.loads((tmp_path / "pretrain/scores.json").read_text())
    assert {
        "negative_loss",
        "images/image_loss",
        "texts/text_loss",
        "pairs/text_loss",
    } <= scores.keys()
    evaluated = json.loads(run_cli("eval", tmp_path / "pretrain" / "last", "--data.root", root))
    assert evaluated["images/image_loss"] > 0
    output = run_cli(
        "train",
        "vqa",
        "--out",
        tmp_path / "vqa",
        "--init",
        tmp_path / "pretrain/last",
        *NETWORK,
        *overrides(root, 1, "--data.batch.main", "8"),
    )
    assert "tensors loaded from" in output and "(pretrain)" in output


def test_recipes_are_listed_and_shown_whole(run_cli):
    listing = run_cli("recipes")
    assert (
        all(f"{task} " in listing for task in list_tasks() if task != "backbone")
        and "base_480" in listing
    )
    recipe_json = json.loads(run_cli("recipes", "vqa", "--show", "base_480"))
    assert Recipe.from_dict(recipe_json, VQA.Config) == VQA.recipes["base_480"]
    assert "giant_224" in run_cli("recipes", "pretrain") and "base_480" not in run_cli(
        "recipes", "pretrain"
    )
    for name in ("laptop", "gpu_hour"):
        assert (
            Recipe.from_dict(
                json.loads(run_cli("recipes", "pretrain", "--show", name)), Pretrain.Config
            )
            == Pretrain.recipes[name]
        )


def test_doctor_finds_nothing_wrong_here(run_cli):
    output = run_cli("doctor")
    assert "ok    torch " in output and all(
        line[:5] in ("ok   ", "note ", "FAULT") for line in output.splitlines()
    )


def test_without_a_verb_there_is_help(capsys):
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb",
    [
        "demo",
        "world",
        "prepare",
        "tokenizer",
        "train",
        "eval",
        "score",
        "predict",
        "convert",
        "recipes",
        "report",
        "doctor",
    ],
)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0 and len(capsys.readouterr().out) > 80


def test_version_is_that_of_the_package(run_cli):
    assert run_cli("--version").strip() == beit3.__version__


def test_shells_complete_every_task():
    assert sorted(complete_tasks(None)) == sorted(list_tasks())


def test_completion_is_written_for_a_shell(tmp_path, monkeypatch, run_cli):
    monkeypatch.setenv("HOME", str(tmp_path))
    script = tmp_path / "beit3.fish"
    run_cli("--install-completion", "--shell", "fish", "--output", script)
    assert "predict" in script.read_text()


def test_only_the_warnings_about_enums_are_hidden(caplog):
    hide_enum_warnings()
    logger = logging.getLogger("torch.utils._pytree")
    text = "%s is an Enum subclass and is now natively supported by torch.compile"
    logger.warning(text, "KernelPreference")
    logger.warning("another warning")
    assert [record.getMessage() for record in caplog.records] == ["another warning"]


# Mistakes -----------------------------------------------------------------------------------------


def test_data_roots_without_records(vqa, tmp_path, run_failing_cli):
    (tmp_path / "empty").mkdir()
    output = run_failing_cli(
        "train", "vqa", "--out", tmp_path / "run", "--data.root", tmp_path / "empty"
    )
    assert "no vqa/main/train.jsonl under" in output and "beit3 prepare vqa --raw DIR" in output
    assert not (tmp_path / "run").exists()
    before = hash_files(vqa)
    assert "no vqa/main/val.jsonl under" in run_failing_cli(
        "eval", vqa / "last", "--data.root", tmp_path / "empty"
    )
    assert "no vqa/main/test.jsonl under" in run_failing_cli(
        "eval", vqa / "last", "--data.root", tmp_path / "empty", "--split", "test"
    )
    (tmp_path / "p.jsonl").write_text("")
    assert "no vqa/main/val.jsonl under" in run_failing_cli(
        "score", "vqa", tmp_path / "p.jsonl", "--data.root", tmp_path / "empty"
    )
    assert hash_files(vqa) == before


def test_a_file_that_is_no_image(vqa, tmp_path, run_failing_cli, image_path):
    image_path.write_text("not an image")
    assert "a.png is not an image of a known format" in run_failing_cli(
        "predict", vqa, image_path, "what is it ?"
    )
    assert "cannot read image" in run_failing_cli(
        "predict", vqa, tmp_path / "absent.png", "what is it ?"
    )
    before = hash_files(tmp_path)
    output = run_failing_cli(
        "prepare", "vqkd", "--raw", tmp_path / "pictures", "--root", tmp_path / "root"
    )
    assert (
        "1 of 1 main records are unusable" in output
        and "a.png is not an image of a known format" in output
        and "nothing was written" in output
    )
    assert hash_files(tmp_path) == before


def test_empty_captions_and_questions(vqa, raw, tmp_path, run_failing_cli, image_path):
    for text in ("", "   "):
        assert "is empty" in run_failing_cli("predict", vqa, image_path, text)
    shutil.copytree(raw / "pairs", tmp_path / "pairs")
    path = tmp_path / "pairs" / "dataset_world.json"
    data = json.loads(path.read_text())
    for image in data["images"]:
        image["sentences"][0]["raw"] = ""
    path.write_text(json.dumps(data))
    output = run_failing_cli(
        "prepare",
        "pretrain",
        "--raw",
        tmp_path / "pairs",
        "--root",
        tmp_path / "root",
        "--source",
        "pairs",
    )
    assert "its text is empty" in output and not (tmp_path / "root").exists()


def test_lengths_beyond_the_text_table(root, tmp_path, run_failing_cli):
    """The table of the tiny sizes places 128 tokens."""
    output = run_failing_cli(
        "train", "vqa", "--out", tmp_path / "vqa", *overrides(root, 2), "--task.text_length", "300"
    )
    assert "task.text_length 300 is beyond the 128 tokens of the text table" in output
    output = run_failing_cli(
        "train",
        "pretrain",
        "--out",
        tmp_path / "p",
        *overrides(root, 2),
        "--task.monomodal_text_length",
        "129",
    )
    assert "task.monomodal_text_length 129 is beyond the 128 tokens of the text table" in output
    assert not (tmp_path / "vqa").exists() and not (tmp_path / "p").exists(), (
        "the corrected command starts afresh"
    )


def test_long_questions_are_cut(vqa, run_cli, image_path):
    """`text_length` says how long a text is read; what comes after changes nothing."""
    question = "what color is the object ? " * 10
    predictions = [
        run_cli("predict", vqa, image_path, question + end)
        for end in ("", "is there a circle ? " * 50)
    ]
    assert predictions[0] == predictions[1]


def test_text_tokenizers_that_do_not_fit(vqa, root, tmp_path, run_failing_cli, image_path):
    other = tmp_path / "other.spm"
    TextTokenizer.train(
        ["completely other words than theirs"] * 3, vocab_size=40, model_type="bpe"
    ).save(other)
    before = hash_files(vqa)
    assert "does not fit the weights" in run_failing_cli(
        "predict", vqa, image_path, "what ?", "--text-model", other
    )
    assert "does not fit the weights" in run_failing_cli(
        "eval", vqa / "last", "--data.root", root, "--text-model", other
    )
    output = run_failing_cli(
        "train",
        "vqa",
        "--out",
        tmp_path / "run",
        "--init",
        vqa / "last",
        *NETWORK,
        *overrides(root, 1),
        "--data.text_model",
        other,
    )
    assert (
        "the text tokenizer is not the one that these weights were trained with" in output
        and not (tmp_path / "run").exists()
    )
    (tmp_path / "words.txt").write_text("no model")
    assert "words.txt is not a complete SentencePiece model" in run_failing_cli(
        "tokenizer", "encode", "a", "--model", tmp_path / "words.txt"
    )
    assert hash_files(vqa) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "vqa", "demo", "--optim.lrr", "1"],
            "unknown field --optim.lrr; did you mean --optim.lr?",
        ),
        (["train", "vqa", "demo", "--optim.lr", "fast"], "cannot read --optim.lr fast"),
        (
            ["train", "vqa", "dmeo"],
            "vqa has no recipe dmeo; did you mean demo? (known: demo, laptop, base_480, "
            "large_480, large_768, ",
        ),
        (["trian", "vqa"], 'unknown command "trian". Did you mean "train"?'),
        (["train", "vqa", "--intt", "x"], "unknown field --intt; did you mean --init?"),
        (
            ["demo", "--flast"],
            "unknown option: --flast. Did you mean --fast?; see beit3 demo --help",
        ),
        (["demo", "--fast", "--full"], "--fast and --full exclude each other"),
        (["plan", "vqa", "--gpus", "1.5"], "'1.5' is no whole number"),
        (["train", "vqaa"], "unknown task 'vqaa'; did you mean vqa? (known: "),
        (["train", "json.decoder"], "module json.decoder defines 0 Task classes"),
        (["train", "../../x"], "unknown task '../../x': give a task's name, or a module"),
        (["train", "no.such.module"], "unknown task 'no.such.module': there is no module no"),
        (["recipes", "vqaa"], "unknown task 'vqaa'; did you mean vqa?"),
        (["recipes", "vqa", "--show", "base_48"], "no recipe base_48; did you mean base_480?"),
        (["prepare", "vqaa", "--raw", ".", "--root", "r"], "unknown task 'vqaa'"),
        (
            ["prepare", "pretrain", "--raw", ".", "--root", "r"],
            "task pretrain has several sources: give --source images or texts or pairs",
        ),
        (
            ["prepare", "pretrain", "--raw", ".", "--root", "r", "--source", "pair"],
            "--source pair is none of images, texts, pairs",
        ),
        (["prepare", "backbone", "--raw", ".", "--root", "r"], "task backbone reads no records"),
        (["prepare", "vqa", "--raw", "absent", "--root", "r"], "raw folder"),
        (
            ["prepare", "vqa", "--raw", ".", "--root", "r", "--pack", "512"],
            "unknown option --pack",
        ),
        (
            ["prepare", "pretrain", "--raw", ".", "--root", "r", "--source", "texts", "--pack"],
            "--pack: expected a whole number",
        ),
        (
            [
                "prepare",
                "pretrain",
                "--raw",
                ".",
                "--root",
                "r",
                "--source",
                "texts",
                "--pakc",
                "8",
            ],
            "--pakc; did you mean --pack?",
        ),
        (
            ["convert", "vqkdd", "a.pth", "--out", "o"],
            'unknown command "vqkdd". Did you mean "vqkd"?',
        ),
        (["convert", "clip", "absent.pt", "--out", "o"], "absent.pt"),
        (["predict", "absent", "a.png", "what ?"], "no weights at absent"),
        (["eval", "absent"], "no weights at absent"),
        (["report", "absent"], "absent is not a run: it has no recipe.json"),
        (["eval", "absent", "--colour", "red"], "unknown option --colour; see beit3 eval --help"),
        (["tokenizer", "decode", "7", "--model", "absent.spm"], "no text tokenizer at absent.spm"),
        (["world", "--out", "w", "--scenes", "0"], "--scenes: 0 is too few"),
        (["world", "--out", "w", "--seed", "-1"], "--seed: -1 is negative"),
        (["eval", "w", "--batch", "0"], "--batch: 0 is too few, expected at least 1"),
        (["eval", "w", "--batch", "-3"], "--batch: -3 is too few"),
        (["eval", "w", "--num-heads", "0"], "--num-heads: 0 is too few"),
        (["predict", "w", "a", "--min-score", "nan"], "--min-score: nan is no finite number"),
        (["predict", "w", "a", "--min-score", "7"], "--min-score: 7 is above 1"),
        (["plan", "vqa", "--price", "-1"], "--price: -1 is no finite number of at least 0"),
        (["plan", "vqa", "--records", "-5"], "--records: -5 is negative"),
        (["train", "vqa", "demo", "--run.steps", "-1"], "run.steps -1: expected at least 0"),
        (
            ["train", "vqa", "demo", "--run.log_every", "-1"],
            "run.log_every -1: expected at least 0",
        ),
        (["train", "vqa", "demo", "--data.workers", "-1"], "data.workers -1: expected at least 0"),
        (["train", "vqa", "demo", "--data.bad_share", "2"], "data.bad_share 2.0: expected 0 to 1"),
        (["train", "vqa", "demo", "--optim.lr", "nan"], "optim.lr nan: expected at least 0"),
        (["train", "vqa", "demo", "--optim.clip", "inf"], "optim.clip inf: expected at least 0"),
        (
            ["train", "vqa", "demo", "--data.batch.main", "-2"],
            "data.batch.main -2: expected at least 0",
        ),
    ],
)
def test_words_that_mean_nothing(arguments, message, run_failing_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run_failing_cli(*arguments)
    assert hash_files(tmp_path) == {}


def test_weights_that_are_not_there_to_start_from(root, tmp_path, run_failing_cli):
    output = run_failing_cli(
        "train",
        "vqa",
        "--out",
        tmp_path / "run",
        "--init",
        tmp_path / "absent",
        *overrides(root, 1),
    )
    assert "cannot start from" in output and "no weights at" in output
    assert not (tmp_path / "run").exists()


def test_a_network_of_another_size_to_start_from(vqa, root, tmp_path, run_failing_cli):
    output = run_failing_cli(
        "train", "vqa", "--out", tmp_path / "run", "--init", vqa / "last", *overrides(root, 1)
    )
    assert (
        "cannot start from" in output
        and "backbone.blocks.1.ffn.fusion" in output
        and not (tmp_path / "run").exists()
    )


def test_directories_that_hold_something_else(vqa, root, tmp_path, run_failing_cli, image_path):
    before = hash_files(vqa)
    same = ["train", "vqa", "demo", "--out", vqa, *NETWORK]
    output = run_failing_cli(*same, *overrides(root, 4, "--data.batch.main", "8"))
    assert "holds another run (its recipe.run.steps differs): give another --out" in output
    assert "(its task differs)" in run_failing_cli(
        "train", "vqkd", "--out", vqa, *overrides(root, 3)
    )
    assert hash_files(vqa) == before
    before = hash_files(tmp_path)
    output = run_failing_cli("train", "vqa", "--out", image_path.parent, *overrides(root, 1))
    assert "is not empty and holds no run" in output
    assert "exists already" in run_failing_cli("world", "--out", image_path.parent, "--scenes", "3")
    assert hash_files(tmp_path) == before


def test_a_released_file_needs_a_tokenizer_and_its_answers(
    root, tmp_path, run_cli, run_failing_cli, image_path
):
    file = [
        find_fixture("vqa") / "model.safetensors",
        image_path,
        "what color is it ?",
        "--num-heads",
        "4",
    ]
    tokenizer = ["--text-model", root / "text.model"]
    assert "text_model" in run_failing_cli("predict", *file)
    assert "answers=FILE" in run_failing_cli("predict", *file, *tokenizer)
    answers = tmp_path / "answers.txt"
    answers.write_text("yes\nno\n")
    assert "2 answers given, the file's head has 37 outputs" in run_failing_cli(
        "predict", *file, *tokenizer, "--answers", answers
    )
    assert "no answer list at" in run_failing_cli(
        "predict", *file, *tokenizer, "--answers", tmp_path / "absent.txt"
    )
    answers.write_text("".join(f"answer {i}\n" for i in range(37)))
    assert json.loads(run_cli("predict", *file, *tokenizer, "--answers", answers))[0][
        "answer"
    ].startswith("answer ")
    assert "num_heads" in run_failing_cli(
        "predict", *file[:3], *tokenizer, "--answers", answers, "--num-heads", "5"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "of 24 records have no prediction"),
        (lambda rows: [*rows, rows[0]], "two predictions for record"),
        (lambda rows: [row | {"id": "x"} for row in rows[:1]], "a prediction names record x"),
        (lambda rows: [{"answer": "yes"} for _ in rows], "the prediction has no field 'id'"),
        (lambda rows: [{"id": row["id"]} for row in rows], "the prediction has no field 'answer'"),
        (lambda rows: [], "24 of 24 records have no prediction"),
        (
            lambda rows: [*rows[:2], {"id": rows[2]["id"], "answer": None}],
            "p.jsonl line 3: the field 'answer' is null, expected a text or true or false",
        ),
        (lambda rows: [row | {"answer": 3} for row in rows], "line 1: the field 'answer' is 3"),
        (lambda rows: [row | {"answer": ["a"]} for row in rows], "the field 'answer' is [\"a\"]"),
        (
            lambda rows: [row | {"answer": True} for row in rows],
            "'answer' is true, expected",
        ),
        (lambda rows: ["yes"], "p.jsonl line 1 holds a str: a prediction is a JSON object"),
    ],
)
def test_predictions_that_do_not_fit(vqa, root, tmp_path, run_failing_cli, change, message):
    rows = [
        {"id": record["id"], "answer": "yes"} for record in Records(root / "vqa/main/val.jsonl")
    ]
    write_records(tmp_path / "p.jsonl", change(rows))
    assert message in run_failing_cli("score", "vqa", tmp_path / "p.jsonl", "--data.root", root)


def test_predictions_may_be_one_json_list(vqa, root, tmp_path, run_cli):
    rows = [
        {"id": record["id"], "answer": "yes"} for record in Records(root / "vqa/main/val.jsonl")
    ]
    write_records(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    scores = [
        run_cli("score", "vqa", tmp_path / name, "--data.root", root)
        for name in ("p.jsonl", "p.json")
    ]
    assert scores[0] == scores[1]


def test_texts_of_another_encoding_are_named(vqa, run_failing_cli, image_path):
    assert "is not Unicode at character 3" in run_failing_cli(
        "predict", vqa, image_path, "caf\udce9"
    )


def test_debug_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(ValueError, match="no weights at"):
        main(["predict", str(tmp_path / "absent"), "a.png", "what ?", "--debug"])
    with pytest.raises(ValueError, match="did you mean"):
        main(["train", "vqa", "demo", "--optim.lrr", "1", "--debug"])


@pytest.mark.parametrize(
    ("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)]
)
def test_a_signal_says_how_to_go_on(root, tmp_path, capsys, monkeypatch, number, status):
    """Ctrl-C, and what schedulers send; tests/training/test_directory.py sends one to another
    process."""
    arguments = [
        "train",
        "vqa",
        "--out",
        str(tmp_path / "run"),
        *NETWORK,
        *overrides(root, 3, "--data.batch.main", "4"),
    ]
    handler = signal.getsignal(getattr(signal, number))
    raised_in_steps(monkeypatch, number, times=1)
    assert main(arguments) == status
    assert "stopped after step 1 of 3; the same command resumes it" in capsys.readouterr().err
    assert signal.getsignal(getattr(signal, number)) == handler
    monkeypatch.undo()
    assert main(arguments) == 0


def test_a_second_ctrl_c_does_not_wait_for_the_step(root, tmp_path, capsys, monkeypatch):
    arguments = [
        "train",
        "vqa",
        "--out",
        str(tmp_path / "run"),
        *NETWORK,
        *overrides(root, 3, "--data.batch.main", "4"),
    ]
    raised_in_steps(monkeypatch, "SIGINT", times=2)
    assert main(arguments) == 130
    assert (
        "interrupted; the same command resumes from the last checkpoint" in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.undo()
    assert main(arguments) == 0


def raised_in_steps(monkeypatch: pytest.MonkeyPatch, number: str, *, times: int) -> None:
    rate = loop.compute_learning_rate

    def raise_signal_first(*arguments) -> float:
        for _ in range(times):
            signal.raise_signal(getattr(signal, number))
        return rate(*arguments)

    monkeypatch.setattr(loop, "compute_learning_rate", raise_signal_first)


def test_recipe_on_the_command_line_is_the_recipe_of_the_run(vqa, root):
    stored = json.loads((vqa / "recipe.json").read_text())
    recipe = VQA.recipes["demo"]
    model = replace(recipe.task.model, dim=32, depth=2, num_heads=2, ffn_dim=48)
    expected = replace(
        recipe,
        task=replace(recipe.task, model=model),
        data=replace(recipe.data, root=str(root), batch={"main": 8}),
        run=replace(recipe.run, steps=3),
    )
    assert Recipe.from_dict(stored["recipe"], VQA.Config) == expected
