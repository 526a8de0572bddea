"""`beit3 recipes`: a list of what can be trained."""

import json

from beit3.cli.options import TaskName
from beit3.config import suggest


def recipes(task: TaskName = "", /, *, released: bool = False, show: str = "") -> None:
    """List what can be trained, and what each recipe reproduces.

    ```
    beit3 recipes
    beit3 recipes vqa --show base_480
    beit3 recipes --released
    ```

    Args:
        task: Only the recipes of this task.
        released: List the files released with BEiT-3 instead, and what they can start.
        show: Print this recipe as JSON, with every field that `train` can override.
    """
    from beit3.task import list_tasks, load_task
    from beit3.weights.catalog import format_table

    if released:
        print(*format_table(task or None), sep="\n")
        return
    names = [task] if task else list_tasks()
    recipes_of_task = {name: load_task(name).recipes for name in names}
    known = sorted({label for recipes in recipes_of_task.values() for label in recipes})
    if show and show not in known:
        raise ValueError(f"no recipe {show}{suggest(show, known)} (known: {', '.join(known)})")
    for name, recipes in recipes_of_task.items():
        for label, recipe in recipes.items():
            if label == show:
                print(json.dumps(recipe.to_dict(), indent=1))
            elif not show:
                print(f"{name:10} {label:18} {recipe.note}")
