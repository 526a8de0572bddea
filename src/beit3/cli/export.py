"""`beit3 export`: networks for onnxruntime, TensorRT and torch.export."""

from typing import Annotated

from cyclopts import Parameter

from beit3.cli.options import NOT_RELEASED, ReleasedOptions


def export(
    weights: str,
    /,
    *,
    out: str,
    mode: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    int8: bool = False,
    torch: bool = False,
    fixed_size: bool = False,
    released: ReleasedOptions = NOT_RELEASED,
) -> None:
    """Export weights as ONNX, for any batch size, length of text and size of image.

    ```
    beit3 export runs/vqa-demo --out vqa-onnx
    beit3 predict vqa-onnx picture.png "what color is the circle ?"
    beit3 export runs/retrieval-demo --out features --mode image --int8
    ```

    Each graph is compared with the network at two batch sizes, lengths and image sizes;
    `parity.md` beside it says how far it is off, and one that is off too far is not written
    (docs/export.md).

    Args:
        weights: A weights directory, a run or a released file.
        out: The directory to write.
        mode: The graphs: image, text, pair, start and step of captions, match, trunk; by default
            those that the task's predictions need.
        int8: Write matrix products in 8-bit integers, for CPUs.
        torch: Also write each graph as a program of torch.export (.pt2).
        fixed_size: Images have the size of the weights alone.
    """
    from beit3.cli.predict import load_predictor
    from beit3.export.export import export_task
    from beit3.export.runtime import is_exported

    if is_exported(weights):
        raise ValueError(f"{weights} is an export already: give the weights")
    predictor = load_predictor(weights, released, precision=None, fields=())
    written = export_task(
        predictor.task,
        out,
        modes=mode,
        int8=int8,
        programs=torch,
        fixed_size=fixed_size,
        report=predictor.report,
        fingerprint=predictor.fingerprint,
        show=print,
    )
    print(*written.lines(), sep="\n")
