"""The official VQA score of a question, by leaving one annotator out at a time."""


def vqa_official(answer, annotators, normalize):
    answer, annotators = answer.strip(), [text.strip() for text in annotators]
    if any(text != annotators[0] for text in annotators):
        answer, annotators = normalize(answer), [normalize(text) for text in annotators]
    scores = []
    for left_out in range(len(annotators)):
        others = [text for place, text in enumerate(annotators) if place != left_out]
        matching = [text for text in others if text == answer]
        scores.append(min(1, len(matching) / 3))
    return sum(scores) / len(scores)
