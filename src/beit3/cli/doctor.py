"""`beit3 doctor`: a check of this machine."""


def doctor(*, text_model: str = "", weights: str = "") -> None:
    """Check this machine: packages, text tokenizer, cores, accelerator, disk.

    ```
    beit3 doctor
    beit3 doctor --weights runs/vqa-demo/best
    ```

    Args:
        text_model: A SentencePiece file to check.
        weights: Weights, or a run, to check completely.
    """
    from beit3.doctor.examine import examine

    num_faults = 0
    for line in examine(text_model=text_model, weights=weights):
        print(line, flush=True)  # The next check may crash the interpreter itself.
        num_faults += line.startswith("FAULT")
    if num_faults:
        raise ValueError(f"{num_faults} of these lines name a fault and its remedy")
