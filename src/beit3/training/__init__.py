"""One loop for every task. It knows the contract (`beit3.task`) and never a task."""
