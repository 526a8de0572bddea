"""Weights on disk and how tasks take them.

`store` reads and writes directories of weights, `loading` builds tasks from them, `initialization`
starts fine-tuning from them. `release_format`, `beit2_format` and `state_dicts` read foreign
files, `catalog` lists the released ones, `convert` goes from one to the other. `matching` fits the
tensors of a file to a task.
"""
