"""`beit3 predict`, and loading weights as its options and those of `beit3 eval` say."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from beit3.cli.options import (
    NOT_RELEASED,
    Fraction,
    PrecisionName,
    ReleasedOptions,
    Word,
    check_task_fields,
)
from beit3.config import override

if TYPE_CHECKING:
    import torch

    from beit3.predict import Predictor


def predict(
    weights: str,
    input: str,
    /,
    *inputs: Word,
    out: str = "",
    min_score: Fraction | None = None,
    precision: PrecisionName | None = None,
    int8: bool = False,
    released: ReleasedOptions = NOT_RELEASED,
) -> None:
    """Predict from an image, a text or both, as the task of the weights takes them.

    ```
    beit3 predict runs/vqa-demo picture.png "what color is the circle ?"
    beit3 predict runs/captioning-demo picture.png --task.decoding.method greedy
    beit3 predict runs/coco-demo street.jpg --out objects.png
    ```

    Args:
        weights: A weights directory, a run or a released file.
        input: An image or a text, as the task takes it first.
        inputs: Further images and texts, then `--task.field value` for how the weights are used,
            such as the decoding of captions.
        out: Also draw the objects or classes that coco or ade20k predicts onto the image, into
            this file.
        min_score: Lowest score of the objects that are drawn and listed; 0.3 by default.
        precision: Number format of the network, float32 by default; auto measures which one is
            fastest here (docs/speed.md).
        int8: The short form of --precision int8.
    """
    inputs_alone = list(takewhile(lambda word: not word.startswith("--"), inputs))
    fields = inputs[len(inputs_alone) :]
    check_task_fields(fields, predict, "predict")
    name = merge_precision(precision, int8)
    predictor = load_predictor(weights, released, precision=name, fields=fields)
    if out or min_score is not None:
        from beit3.report.drawing import predict_and_draw

        predictions = predict_and_draw(predictor, [input, *inputs_alone], out, min_score=min_score)
    else:
        predictions = predictor(input, *inputs_alone)
    print(json.dumps(predictions, ensure_ascii=False))


def merge_precision(precision: str | None, int8: bool) -> str | None:
    """Returns the format that `--precision` or `--int8` names. Raises ValueError if both differ."""
    if int8 and precision not in (None, "int8"):
        raise ValueError(f"--int8 and --precision {precision} disagree: leave one out")
    return "int8" if int8 else precision


def load_predictor(
    weights: str,
    released: ReleasedOptions,
    *,
    precision: str | None,
    fields: Sequence[str],
    device: "torch.device | str" = "cpu",
) -> "Predictor":
    """Loads weights onto a device and reports their number format if the user named one.

    `fields` (`--task.field value`) change how they are used, not the network.
    """
    from beit3.ops.collectives import compute_on_rank_zero, rank
    from beit3.precision import PrecisionChoice, compare_precisions
    from beit3.predict import load
    from beit3.recipe import Recipe

    predictor = load(
        weights,
        task=released.task,
        num_heads=released.num_heads,
        text_model=released.text_model,
        answers=released.answers,
        classes=released.classes,
        prompt=released.prompt or "",
        device=device,
    )
    config = override(Recipe(task=predictor.task.config), fields).task
    if config.model != predictor.task.config.model:
        raise ValueError(f"{' '.join(fields)}: the network of existing weights cannot change")
    predictor.task.config = config
    if precision is not None:
        choice = PrecisionChoice(precision)
        if precision == "auto":  # one choice for all processes
            choice = compute_on_rank_zero(partial(compare_precisions, predictor.task))
        predictor.change_precision(choice)
        if rank() == 0:
            print(f"precision {choice}", file=sys.stderr)
    return predictor
