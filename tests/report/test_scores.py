"""Tests of the texts of scores, and of which way is better."""

from beit3.report.scores import format_column, format_score, get_direction


def test_direction_of_a_score():
    directions = {
        "accuracy": 1,
        "texts/text_accuracy": 1,
        "text_loss": -1,
        "negative_loss": 1,
        "distance": -1,
        "perplexity": 0,
        "num_codes": 0,
    }
    assert {name: get_direction(name, "pretrain") for name in directions} == directions
    assert get_direction("most_frequent", "vqa") == get_direction("codebook_use", "vqkd") == 0


def test_headline_metrics_are_better_when_larger():
    assert get_direction("score", "vqkd") == 1 and get_direction("score", "vqa") == 0


def test_rates_and_caption_scores_are_better_when_larger():
    rates = ("image_recall@10", "mean_recall", "top5", "consistency", "official")
    caption_scores = ("bleu4", "rouge_l", "cider_d", "spice")
    for name in (*rates, *caption_scores):
        assert get_direction(name, "vqa") == 1, name


def test_scores_of_a_column_have_equally_many_decimals():
    assert format_column("text_loss", [0.45947, 13.2, None]) == ["0.46", "13.20", ""]
    assert format_column("x", [-0.00012345, 0.0]) == ["-0.0001234", "0.0000000"]
    assert format_column("x", [0.0, None]) == ["0", ""]
    assert format_column("codebook_use", [1.0, 0.125]) == ["100.0%", "12.5%"]
    assert format_column("bleu4", [0.375, 3e-10]) == ["0.375", "0.000"]
    assert format_column("cider/in-domain", [1.35]) == ["1.350"]


def test_fractions_are_percentages_and_other_scores_have_four_digits():
    assert format_score("accuracy", 0.5) == "50.0%"
    assert format_score("pairs/text_accuracy", 1) == "100.0%"
    for name in ("image_recall@10", "mean_recall", "top5"):
        assert format_score(name, 0.25) == "25.0%"
    assert format_score("cider", 1.336) == "1.336" and format_score("bleu4", 3e-10) == "0.000"
    assert format_score("text_loss", 1.23456) == "1.235"
    assert format_score("note", "<x>") == '"<x>"'
