"""`benchmarks/mutate.py` changes what code computes, one place at a time, and nothing else."""

import ast

from benchmarks.mutate import ROOMS, list_mutations, sample_mutations

SOURCE = '''"""Docstring with 1."""
LIMIT: int = 3


def scale(values: "list[int]", factor: float = 0.5, flip: bool = True) -> int:
    """Returns 2."""
    if not flip and len(values) < LIMIT:
        raise ValueError(f"{1 + 2} values")
    values.reverse()
    factor += 1
    return divide(values, factor * 2, rounding=factor)
'''


def test_each_mutation_is_one_change_that_parses():
    mutations = list_mutations("model/sample.py", SOURCE)
    kinds = {(mutation.kind, mutation.before, mutation.text) for mutation in mutations}
    assert {
        ("constant", "3", "4"),
        ("constant", "0.5", "0.75"),
        ("constant", "True", "False"),
        ("comparison", "len(values) < LIMIT", "(len(values) <= LIMIT)"),
        ("sign", "not flip", "(flip)"),
        ("operator", "factor * 2", "(factor / 2)"),
        ("dropped statement", "values.reverse()", "pass"),
        ("dropped statement", "factor += 1", "pass"),
    } <= kinds
    assert any(text == "divide(values, factor * 2)" for _, _, text in kinds)
    assert any(text == "divide(factor * 2, values, rounding=factor)" for _, _, text in kinds)
    assert not any(mutation.line in (1, 6, 8) for mutation in mutations), "no texts, no messages"
    for mutation in mutations:
        content = SOURCE.encode()
        changed = content[: mutation.start] + mutation.text.encode() + content[mutation.end :]
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))


def test_samples_depend_on_the_seed_and_cover_every_room():
    sample = sample_mutations(5 * len(ROOMS), 1)
    assert sample == sample_mutations(5 * len(ROOMS), 1) != sample_mutations(5 * len(ROOMS), 2)
    assert all(sum(m.file.startswith(f"{room}/") for m in sample) == 5 for room in ROOMS)
