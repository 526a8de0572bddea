"""One loop for every task. It knows the contract (`beit3.task`) and never a task.

`beit3.train` is the public function; importing anything of this package would put the package in its place, so the
package can be called like it.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit3.recipe import Recipe
    from beit3.task import Task


class _Callable(ModuleType):
    def __call__(
        self, recipe: "Recipe", task_class: "type[Task]", *, out: str | Path, init: str | Path = "", label: str = ""
    ) -> dict[str, Any]:
        """`beit3.train.loop.train`."""
        from beit3.train.loop import train

        return train(recipe, task_class, out=out, init=init, label=label)


sys.modules[__name__].__class__ = _Callable
