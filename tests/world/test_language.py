"""Texts about several hundred scenes, checked by the independent reading in `truth.py`."""

from collections import Counter, defaultdict

import numpy as np

from beit3.world.language import (
    ANSWERS,
    KIND_WEIGHTS,
    ask_questions,
    describe_object,
    make_statement,
    write_captions,
    write_paragraph,
)
from beit3.world.scene import Object, make_scene
from tests.world import truth

SCENES = [make_scene(seed) for seed in range(700)]


def is_well_formed(text: str) -> bool:
    return (
        text == text.lower()
        and text == " ".join(text.split())
        and all(c.isalpha() or c in " ,.:?" for c in text)
    )


def test_describe_object_names_all_attributes():
    assert (
        describe_object(Object("circle", "red", "large", "plain", 0.5, 0.5, 0.2))
        == "large red circle"
    )
    assert (
        describe_object(Object("bar", "blue", "small", "striped", 0.5, 0.5, 0.2))
        == "small striped blue bar"
    )


def test_captions_are_true_and_differ():
    rng = np.random.default_rng(0)
    seen = Counter()
    for scene in SCENES:
        captions = write_captions(scene, rng, 3)
        assert len(captions) == len(set(captions)) == 3
        for text in captions:
            assert is_well_formed(text) and 4 <= len(text.split()) <= 17, text
            assert truth.caption_holds(text, scene), (text, scene)
            seen["relation"] += any(side in text for side in truth.SIDES.split("|"))
            seen["list"] += " and " in text
    assert min(seen.values()) > 200
    assert len(write_captions(SCENES[0], rng, 50)) == 50


def test_the_check_rejects_captions_of_other_scenes():
    rng = np.random.default_rng(1)
    accepted = sum(
        truth.caption_holds(write_captions(a, rng, 1)[0], b)
        for a, b in zip(SCENES[:200], SCENES[200:400], strict=True)
    )
    assert accepted < 10


def test_paragraphs_are_true():
    rng = np.random.default_rng(2)
    for scene in SCENES:
        text = write_paragraph(scene, rng)
        sentences = text.removesuffix(" .").split(" . ")
        assert is_well_formed(text) and text.endswith(" .") and 3 <= len(sentences) <= 7, text
        for sentence in sentences:
            assert truth.sentence_holds(sentence, scene), (sentence, scene)


def test_questions_have_a_single_answer():
    rng = np.random.default_rng(3)
    questions = [(question, scene) for scene in SCENES for question in ask_questions(scene, rng, 5)]
    assert len(questions) == 5 * len(SCENES)
    for question, scene in questions:
        assert question.answer == truth.answer(question.text, scene), (question, scene)
        assert question.answer in ANSWERS and (
            is_well_formed(question.text) and question.text.endswith(" ?")
        )
    assert {question.answer for question, _ in questions} == set(ANSWERS) and 25 <= len(
        ANSWERS
    ) <= 30
    kinds = Counter(question.kind for question, _ in questions)
    assert set(kinds) == set(KIND_WEIGHTS)
    assert kinds["color"] + kinds["shape"] + kinds["size"] > 0.6 * len(questions)


def test_questions_of_one_scene_differ():
    rng = np.random.default_rng(4)
    for scene in SCENES[:50]:
        texts = [question.text for question in ask_questions(scene, rng, 8)]
        assert len(texts) == len(set(texts)) == 8


def test_answers_are_balanced():
    rng = np.random.default_rng(5)
    answer_counts = defaultdict(Counter)
    for seed in range(2500):
        for question in ask_questions(make_scene(seed), rng, 3):
            answer_counts[question.kind][question.answer] += 1
    for kind in ("exists", "relation"):
        yes, no = answer_counts[kind]["yes"], answer_counts[kind]["no"]
        assert 0.43 < yes / (yes + no) < 0.57, (kind, yes, no)
    for kind, most in (
        ("color", 0.16),
        ("shape", 0.26),
        ("size", 0.62),
        ("texture", 0.5),
        ("count", 0.6),
    ):
        assert max(answer_counts[kind].values()) < most * answer_counts[kind].total(), (
            kind,
            answer_counts[kind],
        )


def test_statements_have_right_and_balanced_labels():
    rng = np.random.default_rng(6)
    by_text = defaultdict(Counter)
    for left in SCENES:
        for right in (SCENES[i] for i in rng.integers(len(SCENES), size=8)):
            text, label = make_statement(left, right, rng)
            assert is_well_formed(text) and label == truth.statement_holds(text, left, right), (
                text,
                left,
                right,
            )
            by_text[text][label] += 1
    total = sum((counts for counts in by_text.values()), Counter())
    assert 0.47 < total[True] / total.total() < 0.53
    for text, counts in by_text.items():  # without the images, a wording says little
        if counts.total() >= 100:
            assert 0.3 < counts[True] / counts.total() < 0.7, (text, counts)


def test_the_generator_determines_the_texts():
    scene = make_scene(7, num_objects=(0, 0, 1))
    for write in (
        lambda rng: write_captions(scene, rng, 3),
        lambda rng: write_paragraph(scene, rng),
    ):
        assert write(np.random.default_rng(1)) == write(np.random.default_rng(1))
        assert len({str(write(np.random.default_rng(k))) for k in range(8)}) > 4
