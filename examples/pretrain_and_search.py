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
# # Pretrain on your own pictures, and search in them
#
# You need a folder of pictures and a table of their captions, one row for each: `photos.csv` with
# the columns `image` and `caption` beside a folder `photos`. Several rows may name one picture.
#
# Where there is no such table, the notebook makes one of 600 drawings of colored shapes, and trains
# a tiny network on them in a few minutes of two cores. For photographs it takes the `laptop`
# recipes; 1,000 photographs with five captions each are a beginning, and take an hour.
#
# Open it with `jupytext --to notebook pretrain_and_search.py`, or in JupyterLab with jupytext
# installed.

# %%
# %matplotlib inline
import csv
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import beit3
from beit3.search.embed import embed
from beit3.search.query import Query, Searcher
from beit3.search.rerank import make_reranker, rerank
from beit3.search.stores.uri import open_store
from beit3.task import load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.training.loop import train
from beit3.world.export import write_world

TABLE = Path("photos.csv")
RUNS = Path("runs/own")
PRETRAINING_STEPS, RETRIEVAL_STEPS = 700, 100

# %% [markdown]
# ## Pictures and captions

# %%
is_drawn = not TABLE.is_file()
if is_drawn:
    world = RUNS / "shapes"
    if not world.is_dir():
        world.parent.mkdir(parents=True, exist_ok=True)
        write_world(world, num_train=600, num_val=60, num_test=1, num_questions=3)
    TABLE = world / "photos.csv"
    images = json.loads((world / "pairs/dataset_world.json").read_text(encoding="utf-8"))["images"]
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for image in images:
            for sentence in image["sentences"]:
                path = f"pairs/images/{image['filename']}"
                writer.writerow([path, sentence["raw"], image["split"]])

with TABLE.open(newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
print(f"{len(rows)} captions of {len({row['image'] for row in rows})} pictures, such as")
print(rows[0]["caption"])

# %% [markdown]
# ## Records and a text tokenizer
#
# `prepare` checks the table and writes records; `beit3 prepare` is the same as a command. The text
# tokenizer learns its pieces from your captions.

# %%
data = RUNS / "data"
raw = RUNS / "raw"
raw.mkdir(parents=True, exist_ok=True)
with (raw / "captions.jsonl").open("w", encoding="utf-8") as file:
    for row in rows:
        path = str((TABLE.parent / row["image"]).resolve())
        file.write(json.dumps(row | {"image": path}) + "\n")
for task, source in (("pretrain", "pairs"), ("retrieval", "main")):
    if not (data / task).is_dir():
        report = load_task(task).prepare(raw, data, source)
        print(task, report["records"])

captions = [row["caption"] for row in rows]
size = 400 if is_drawn else 4000
TextTokenizer.train(captions, vocab_size=size, model_type="bpe").save(data / "text.model")

# %% [markdown]
# ## Pretraining
#
# Half of each caption's words are masked and predicted from the picture and the other words. The
# network learns which words belong to what it sees. A stopped run goes on when the cell is run
# again.


# %%
def make_recipe(task: str, name: str, steps: int, source: str):
    """Returns a recipe on these records, with the batch of one source alone."""
    recipe = load_task(task).recipes[name]
    batch = {source: recipe.data.batch[source]}
    return replace(
        recipe,
        data=replace(recipe.data, root=str(data), batch=batch),
        run=replace(recipe.run, steps=steps),
    )


pretraining = make_recipe(
    "pretrain", "demo_pairs" if is_drawn else "laptop", PRETRAINING_STEPS, "pairs"
)
scores = train(pretraining, load_task("pretrain"), out=RUNS / "pairs")
print({name: round(value, 3) for name, value in scores.items() if "accuracy" in name})

# %%
lines = (RUNS / "pairs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
steps = [line for line in map(json.loads, lines) if "loss" in line]
plt.figure(figsize=(6, 3))
plt.plot([line["step"] for line in steps], [line["loss"] for line in steps])
plt.xlabel("step")
plt.ylabel("loss of masked words (nats)")
plt.show()

# %% [markdown]
# ## Retrieval
#
# From these weights the network learns one space for pictures and texts, and to judge a picture and
# a text together.

# %%
recipe = "demo_matching" if is_drawn else "laptop_matching"
retrieval = make_recipe("retrieval", recipe, RETRIEVAL_STEPS, "main")
scores = train(retrieval, load_task("retrieval"), out=RUNS / "retrieval", init=RUNS / "pairs/last")
print(f"mean recall on held-out pictures: {scores['mean_recall']:.1%}")

# %% [markdown]
# ## An index of the pictures
#
# `embed` reads each picture once and writes a folder of vectors, as `beit3 embed` does. Called
# again after pictures were added, with `update=True` among its options, it reads only these.

# %%
pictures = TABLE.parent / Path(rows[0]["image"]).parent
report = embed(RUNS / "retrieval", [pictures], RUNS / "vectors")
searcher = Searcher(open_store(str(RUNS / "vectors")))
print(report)


def show(results):
    """Shows the pictures that were found, with their scores."""
    figure, axes = plt.subplots(1, len(results), figsize=(2.2 * len(results), 2.6))
    for axis, result in zip(axes, results, strict=True):
        axis.imshow(Image.open(searcher.locate_image(result.metadata)).convert("RGB"))
        axis.set_title(f"{result.score:.2f}")
        axis.axis("off")
    plt.show()


# %% [markdown]
# ## Search by words

# %%
query = "a large red circle" if is_drawn else captions[0]
results = searcher.search(query, k=6)
show(results)

# %% [markdown]
# The matching head reads the query and each picture together, and sorts the best results anew.

# %%
predictor = beit3.load(RUNS / "retrieval")
results = searcher.search(query, k=18)
images = [searcher.locate_image(result.metadata) for result in results]
reranked = rerank(
    make_reranker(predictor.task),
    [query] * len(images),
    images,
    [result.score for result in results],
)
show([results[i] for i in reranked.order[:6]])

# %% [markdown]
# ## Search by a picture, and by a picture and words

# %%
example = searcher.locate_image(results[0].metadata)
show(searcher.search(Query(image=example), k=6))
show(searcher.search(Query("a blue square" if is_drawn else query, image=example), k=6))

# %% [markdown]
# `beit3 serve runs/own/retrieval --index runs/own/vectors` serves the same search, with a page for
# the browser.
