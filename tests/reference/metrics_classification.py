"""Reference VQA score of one answer: leaves one annotator out at a time."""


def score_vqa_answer(answer, annotators, normalize):
    answer, annotators = answer.strip(), [text.strip() for text in annotators]
    if any(text != annotators[0] for text in annotators):
        answer, annotators = normalize(answer), [normalize(text) for text in annotators]
    scores = []
    for left_out in range(len(annotators)):
        others = annotators[:left_out] + annotators[left_out + 1 :]
        scores.append(min(1, others.count(answer) / 3))
    return sum(scores) / len(scores)
