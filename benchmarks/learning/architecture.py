"""The Multiway network's parts: shared attention, an expert per modality, fusion experts on top.

    python -m benchmarks.learning.architecture --out runs/learning

All rows are pretrained alike (pairs, then images, texts and pairs). The first is the paper's form
at TINY's size. "One FFN" gives images and texts the same feed-forward layers in pretraining
(`one_ffn.py`), which fine-tuning starts from and may then set apart; as it has half of the
feed-forward parameters, a second row has layers of twice the width, with the same number of
parameters and more work.

Guess: differences are within the spread of seeds, because the world is easy for 1.6M parameters and
the paper shows no table for it either. Separate attention learns words later than shared attention,
because what relates a word to a patch has to be learned twice. One FFN of twice the width is equal
to experts on pairs.
"""

from dataclasses import replace

from benchmarks.learning.runs import Run
from benchmarks.learning.study import Row, Study, Tuning, run_program
from benchmarks.learning.world_runs import make_pretraining

NETWORKS = {
    "shared attention, experts, fusion on top": "",
    "separate attention": "--task.model.shared_attention False",
    "no fusion experts": "--task.model.fusion_layers 0",
    "fusion experts in the upper half": "--task.model.fusion_layers 2",
    "fusion experts in all layers": "--task.model.fusion_layers 4",
}
ONE_FFN = {
    "one FFN for all": "--task.model.fusion_layers 0",
    "one FFN for all, twice as wide": "--task.model.fusion_layers 0 --task.model.ffn_dim 1024",
}


def tie_experts(run: Run) -> Run:
    """Returns pretraining in which images and texts share their feed-forward layers."""
    if run.task == "vqkd":
        return run
    needs = {name: tie_experts(need) for name, need in run.needs.items()}
    return replace(run, task="benchmarks.learning.one_ffn", needs=needs)


STUDY = Study(
    "architecture",
    [
        *(
            Row(name, make_pretraining().with_network(network), network)
            for name, network in NETWORKS.items()
        ),
        *(
            Row(name, tie_experts(make_pretraining().with_network(network)), network)
            for name, network in ONE_FFN.items()
        ),
    ],
    [Tuning("vqa", 300, 1000), Tuning("captioning", 120), Tuning("imagenet", 120)],
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
