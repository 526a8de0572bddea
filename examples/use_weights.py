# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Use weights: ask, caption, search, detect, and look inside
#
# This notebook uses the files released with BEiT-3 where you have downloaded them, for example with
#
#     beit3 download beit3_base_patch16_480_vqa beit3_base_patch16_480_coco_captioning beit3.spm
#     beit3 download beit3_base_patch16_384_coco_retrieval
#
# Until then small weights that ship with the package stand in. They know drawings of colored shapes
# and nothing else, so the pictures below are such drawings, and even of these they miss some. With
# released files put the paths of your own photographs into `pictures`, and ask about them.
#
# Open it with `jupytext --to notebook use_weights.py`, or in JupyterLab with jupytext installed.

# %%
# %matplotlib inline
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import beit3
from beit3.weights.names import is_there
from beit3.world.export import write_world

# %% [markdown]
# ## Weights and pictures
#
# Where weights are expected, a name does: of a file that `beit3 download` has fetched, of weights
# that ship (`world/vqa`), or a path.


# %%
def choose(released: str, stand_in: str) -> str:
    """Returns the name of a released file that is there, or of the weights that stand in."""
    name = released if is_there(released) else stand_in
    print(f"{stand_in.removeprefix('world/'):<12}{name}")
    return name


vqa_weights = choose("beit3_base_patch16_480_vqa", "world/vqa")
captioning_weights = choose("beit3_base_patch16_480_coco_captioning", "world/captioning")
retrieval_weights = choose("beit3_base_patch16_384_coco_retrieval", "world/retrieval")

# A released file of VQA does not hold the names of its answers: answer2label.txt does.
is_released = not vqa_weights.startswith("world/")
vqa = beit3.load(vqa_weights, answers="answer2label.txt" if is_released else None)
captioning = beit3.load(captioning_weights)
retrieval = beit3.load(retrieval_weights)
detector = beit3.load("world/coco")  # BEiT-3 released no detector

# %%
folder = Path(tempfile.mkdtemp())
write_world(folder / "shapes", num_train=60, num_val=1, num_test=1, num_questions=3, seed=1)
pictures = sorted((folder / "shapes/pairs/images").glob("*.png"))[:12]


def show(paths, titles, columns=4):
    """Shows pictures with a title each."""
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, path, title in zip(axes.flat, paths, titles, strict=False):
        axis.imshow(Image.open(path).convert("RGB"))
        axis.set_title(textwrap.fill(title, 30), fontsize=8)
    plt.show()


# %% [markdown]
# ## Captions
#
# A list of pictures gives a list of predictions.

# %%
captions = [prediction[0]["caption"] for prediction in captioning(pictures)]
show(pictures, captions)

# %% [markdown]
# ## Questions
#
# One question may belong to all pictures. Each prediction ranks five answers.

# %%
question = "how many objects are there ?"
answers = vqa(pictures[:4], question)
show(pictures[:4], [f"{ranked[0]['answer']}  ({ranked[0]['score']:.0%})" for ranked in answers])

# %% [markdown]
# ## Search
#
# Retrieval encodes pictures and texts apart, as unit vectors in one space. Their products are
# similarities, so a search is one matrix product. `beit3 embed` and `beit3 search` do the same for
# folders of any size.

# %%
query = "a small orange square"
features = retrieval.embed(images=pictures, texts=[query])
similarities = features["text"][0] @ features["image"].T
best = np.argsort(-similarities)[:4]
show([pictures[i] for i in best], [f"{similarities[i]:.2f}" for i in best])

# %% [markdown]
# The same weights classify into any names that you give, without a head for them.

# %%
names = ["a circle", "a square", "a triangle", "a cross", "a bar"]
classifier = beit3.load(retrieval_weights, task="imagenet", classes=names)
labels = classifier(pictures[:4])
show(pictures[:4], [f"{ranked[0]['name']}  ({ranked[0]['score']:.0%})" for ranked in labels])

# %% [markdown]
# ## Objects
#
# Boxes are [x, y, width, height] in pixels of the picture, as in COCO.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3))
for axis, picture, prediction in zip(axes, pictures, detector(pictures[:4]), strict=False):
    axis.imshow(Image.open(picture).convert("RGB"))
    axis.axis("off")
    for item in prediction[0]["objects"]:
        if item["score"] < 0.5:
            continue
        left, top, width, height = item["box"]
        corner = (left - 0.5, top - 0.5)
        axis.add_patch(plt.Rectangle(corner, width, height, fill=False, color="w", lw=2))
        axis.text(left, top, f"{item['name']} {item['score']:.0%}", fontsize=8, va="bottom")
plt.show()

# %% [markdown]
# ## Look inside
#
# `inspect` gives the states between the blocks, and how much each word attends to each patch.

# %%
question = "what color is the square ?"
inspection = vqa.inspect(pictures[0], question, attention=True)
maps = inspection.get_word_attention()  # [words, rows, columns], mean of heads and layers
print(vqa(pictures[0], question)[0])

figure, axes = plt.subplots(1, len(maps) + 1, figsize=(1.6 * (len(maps) + 1), 2))
axes[0].imshow(Image.open(pictures[0]).convert("RGB"))
for axis, word, attention in zip(axes[1:], inspection.words, maps, strict=True):
    axis.imshow(attention, cmap="magma", vmin=0, vmax=maps.max())
    axis.set_title(word.strip())
for axis in axes:
    axis.axis("off")
plt.show()
